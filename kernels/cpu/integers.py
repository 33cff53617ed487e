"""What stands before and after products of integers on a CPU as compiled code: ``integers.cpp``,
built at need. Bit for bit what `falqon_fx.ops.lowering` computes with ATen's operations.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falqon_fx._compat import native_int8
from falqon_fx.kernels.cpu.build import compiled

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_FLOATS = (torch.float32, torch.bfloat16)


@functools.cache
def library() -> Any | None:
    """The compiled code; None where no compiler works, with the reason in the log."""
    return compiled(
        Path(__file__).with_suffix(".cpp"),
        ("cast_int8", "rescale", "scale_columns"),
        "the casts to INT8 can't be compiled for this CPU and run as ATen operations, several "
        "times slower",
    )


@functools.cache
def exact() -> bool:
    """Whether the library adds up products of integers exactly, and not slower than float32: with
    VNNI. Without it oneDNN sums pairs of them up in 16 bits, which clamps: 127 · -128 twice is
    already beyond.
    """
    if not native_int8():
        return False
    left, right = (torch.full((16, 64), n, dtype=torch.int8, device="cpu") for n in (127, -128))
    return bool((torch.ops.aten._int_mm(left, right.t()) == 64 * 127 * -128).all())


def cast_rows(x: Tensor, pow2: bool, apart: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """INT8 codes [n, k] of x [n, k] and their scales, float32 [n, 1]; zeros in the channels
    ``apart``, bool [k]. None where there is no compiled code, or it doesn't take x.
    """
    if not _by_rows(x) or library() is None:
        return None
    n, k = x.shape
    scale = torch.empty(n, 1, dtype=torch.float32, device="cpu")
    codes = torch.empty(n, k, dtype=torch.int8, device="cpu")
    sizes = (x.dtype == torch.bfloat16, x.stride(0), n, k, pow2, torch.get_num_threads())
    bits = None if apart is None else apart.to(torch.int32) - 1
    of_bits = _POINTER(None if bits is None else bits.data_ptr())
    places = of_bits, _POINTER(scale.data_ptr()), _POINTER(codes.data_ptr())
    _call("falqon_cast_int8", _POINTER(x.data_ptr()), *map(_INT64, sizes), *places)
    return codes, scale


def rescale(sums: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``sums`` int32 [n, m] times ``left`` [n, 1] or [], times ``right`` [1, m] or [], in
    ``dtype``; None as above.
    """
    known = sums.dtype == torch.int32 and sums.is_contiguous() and _plain(sums)
    if not known or dtype not in _FLOATS or library() is None:
        return None
    n, m = sums.shape
    of_left, of_right = _apart(left, n), _apart(right, m)
    if of_left is None or of_right is None:
        return None
    result = torch.empty(n, m, dtype=dtype, device="cpu")
    _call(
        "falqon_rescale",
        _POINTER(sums.data_ptr()),
        _POINTER(left.data_ptr()),
        _INT64(of_left),
        _POINTER(right.data_ptr()),
        _INT64(of_right),
        *map(_INT64, (n, m, torch.get_num_threads())),
        _POINTER(result.data_ptr()),
        _INT64(dtype == torch.bfloat16),
    )
    return result


def scale_columns(x: Tensor, factor: Tensor, to: Tensor) -> bool:
    """Write x [n, m] times ``factor`` [1, m] or [] into ``to`` [n, m]. False where there is no
    compiled code, or it doesn't take these; nothing is written then.
    """
    n, m = x.shape
    known = _by_rows(x) and _by_rows(to) and to.shape == x.shape
    if not known or _apart(factor, m) is None or library() is None:
        return False
    of_column = factor.reshape(1, -1).expand(1, m).contiguous()
    _call(
        "falqon_scale_columns",
        _POINTER(x.data_ptr()),
        *map(_INT64, (x.dtype == torch.bfloat16, x.stride(0))),
        _POINTER(of_column.data_ptr()),
        *map(_INT64, (n, m)),
        _POINTER(to.data_ptr()),
        *map(_INT64, (to.dtype == torch.bfloat16, to.stride(0), torch.get_num_threads())),
    )
    return True


def _call(name: str, *arguments: Any) -> None:
    getattr(library(), name)(*arguments)


def _apart(factor: Tensor, count: int) -> int | None:
    """How far apart ``count`` float32 factors lie in memory, 0 where one is for all; None where
    they are others.
    """
    if factor.dtype != torch.float32 or not _plain(factor):
        return None
    if factor.numel() == 1:
        return 0
    lengths = [axis for axis, size in enumerate(factor.shape) if size != 1]
    fits = len(lengths) == 1 and factor.numel() == count
    return factor.stride(lengths[0]) if fits else None


def _by_rows(matrix: Tensor) -> bool:
    """Whether compiled code can read it row by row, any distance apart."""
    dense = matrix.shape[1] <= 1 or matrix.stride(1) == 1
    return dense and matrix.dtype in _FLOATS and _plain(matrix)


def _plain(tensor: Tensor) -> bool:
    """Whether it has memory on this CPU; what is traced has none."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
