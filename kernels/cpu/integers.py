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

from falqon_fx.kernels.cpu.build import compiled

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_FLOATS = (torch.float32, torch.bfloat16)


@functools.cache
def library() -> Any | None:
    """The compiled code; None where no compiler works, with the reason in the log."""
    return compiled(
        Path(__file__).with_suffix(".cpp"),
        ("cast_int8", "rescale"),
        "the casts to INT8 can't be compiled for this CPU and run as ATen operations, several "
        "times slower",
    )


@functools.cache
def exact() -> bool:
    """Whether the library adds up products of integers exactly: with VNNI. Without it oneDNN sums
    pairs of them up in 16 bits, which clamps: 127 · -128 twice is already beyond.
    """
    left, right = (torch.full((16, 64), n, dtype=torch.int8, device="cpu") for n in (127, -128))
    return bool((torch.ops.aten._int_mm(left, right.t()) == 64 * 127 * -128).all())


def cast_rows(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor] | None:
    """INT8 codes [n, k] of x [n, k] and their scales, float32 [n, 1]. None where there is no
    compiled code, or it doesn't take x.
    """
    dense = x.shape[1] <= 1 or x.stride(1) == 1
    if x.dtype not in _FLOATS or not dense or not _plain(x) or library() is None:
        return None
    n, k = x.shape
    scale = torch.empty(n, 1, dtype=torch.float32, device="cpu")
    codes = torch.empty(n, k, dtype=torch.int8, device="cpu")
    sizes = (x.dtype == torch.bfloat16, x.stride(0), n, k, pow2, torch.get_num_threads())
    places = _POINTER(scale.data_ptr()), _POINTER(codes.data_ptr())
    _call("falqon_cast_int8", _POINTER(x.data_ptr()), *map(_INT64, sizes), *places)
    return codes, scale


def rescale(sums: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``sums`` int32 [n, m] times ``left`` [n, 1] or [], times ``right`` [1, m] or [], in
    ``dtype``; None as above.
    """
    given = (sums, left, right)
    if dtype not in _FLOATS or not all(map(_plain, given)) or not sums.is_contiguous():
        return None
    if library() is None:
        return None
    n, m = sums.shape
    result = torch.empty(n, m, dtype=dtype, device="cpu")
    of_left, of_right = (t.stride(axis) if t.dim() else 0 for t, axis in ((left, 0), (right, 1)))
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


def _call(name: str, *arguments: Any) -> None:
    getattr(library(), name)(*arguments)


def _plain(tensor: Tensor) -> bool:
    """Whether it has memory on this CPU; what is traced has none."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
