"""Products of stacked experts on a CPU that multiplies bfloat16, as compiled code: ``experts.cpp``,
built at need. What `falqon_fx.ops.grouped` computes with ATen's operations, but that sums are
rounded to bfloat16 once, with what the adapter adds to them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falqon_fx.kernels.cpu.build import compiled

_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_BYTES = (torch.uint8, torch.float8_e4m3fn)


class _Stack(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("code", "values", "scale", "left", "right")),
        *((name, _INT64) for name in ("m", "k", "rank")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (("rows", _POINTER), ("ends", _POINTER), ("experts", _INT64), ("count", _INT64))


@functools.cache
def library() -> Any | None:
    """The compiled code; None where no compiler works, with the reason in the log, or where the CPU
    doesn't multiply bfloat16 (AVX512_BF16), or does it in tiles (AMX), as torch's products do.
    """
    made = compiled(
        Path(__file__).with_suffix(".cpp"),
        ("takes", "experts_forward", "experts_backward", "experts_outer"),
        "the products of experts can't be compiled for this CPU and run as ATen operations, slower",
    )
    if made is None:
        return None
    takes = _INT64(0)
    made.falqon_takes(ctypes.byref(takes))
    return made if takes.value else None


@dataclass(frozen=True)
class Rows:
    """Row i of a product reads row ``rows[i]`` (int64 [S]) of x [n, .], or without these row i.
    Expert e has the rows up to ``ends[e]`` (int32 [E]), of ``count`` in all.
    """

    rows: Tensor | None
    ends: Tensor
    count: int

    def own(self) -> Rows:
        """The same rows of what is sorted as they are."""
        return Rows(None, self.ends, self.count)


@dataclass(frozen=True)
class Weights:
    """Matrices [E, m, k]: E4M3 (or bytes), with a ``scale`` a row or none, or bfloat16; and what a
    product adds, ``left`` [S, r] times ``right``, [E, m, r] in bfloat16 where these are multiplied
    as their transposes, else [E, r, k] in E4M3.
    """

    stack: Tensor
    scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None


def forward(x: Tensor, weights: Weights, rows: Rows) -> Tensor:
    """x_e · W_eᵀ + left_e · right_eᵀ, bfloat16 [S, m], for x [n, k]. Rows behind the last expert's
    are zeros.
    """
    experts, m, k = weights.stack.shape
    y = torch.empty((rows.count, m), dtype=torch.bfloat16, device="cpu")
    stack = _stack(weights, rows, lambda rank: (experts, m, rank), torch.bfloat16)
    places = _rows(rows, experts, len(x))
    at = _address(x, (len(x), k), torch.bfloat16)
    library().falqon_experts_forward(  # type: ignore[union-attr]
        at, _INT64(k), ctypes.byref(places), ctypes.byref(stack), _threads(), _address(y)
    )
    return y


def backward(g: Tensor, weights: Weights, rows: Rows, sums: Tensor | None) -> Tensor:
    """g_e · W_e + left_e · right_e of g [S, m]: added to ``sums``, float32 [n, k], in the rows that
    ``rows`` names; or where it names none bfloat16 [S, k], without ``sums``.
    """
    experts, m, k = weights.stack.shape
    if (sums is None) != (rows.rows is None):
        raise ValueError("sums are those of rows that are named")
    stack = _stack(weights, rows, lambda rank: (experts, rank, k), *_BYTES)
    to = torch.empty((rows.count, k), dtype=torch.bfloat16, device="cpu") if sums is None else sums
    places = _rows(rows, experts, len(to))
    if sums is not None:
        _address(sums, (len(sums), k), torch.float32)
    added, stored = (None, to) if sums is None else (to, None)
    library().falqon_experts_backward(  # type: ignore[union-attr]
        _address(g, (rows.count, m), torch.bfloat16),
        ctypes.byref(places),
        ctypes.byref(stack),
        _threads(),
        _address(added),
        _address(stored),
    )
    return to


def outer(
    low: Tensor, wide: Tensor, rows: Rows, factor: float, dtype: torch.dtype, *, fastest: bool
) -> Tensor:
    """factor · low_eᵀ · wide_e of each expert, for low [S, r] and wide [n, k], bfloat16 or E4M3 (or
    bytes): [E * r, k], or with ``fastest`` [k, r * E], the experts fastest. In float32 or bfloat16.
    """
    experts, rank, (n, k) = len(rows.ends), low.shape[1], wide.shape
    shape = (k, rank * experts) if fastest else (experts * rank, k)
    to = torch.empty(shape, dtype=dtype, device="cpu")
    coded = wide.dtype in _BYTES
    at = _address(wide, (n, k), *(_BYTES if coded else (torch.bfloat16,)))
    places = _rows(rows, experts, n)
    library().falqon_experts_outer(  # type: ignore[union-attr]
        _address(low, (rows.count, rank), torch.bfloat16),
        None if coded else at,
        at if coded else None,
        ctypes.byref(places),
        _INT64(rank),
        _INT64(k),
        _INT64(fastest),
        _threads(),
        _FLOAT(factor),
        _INT64(dtype == torch.bfloat16),
        _address(to, shape, torch.float32, torch.bfloat16),
    )
    return to


def _stack(
    weights: Weights, rows: Rows, shape: Callable[[int], tuple[int, ...]], *dtypes: torch.dtype
) -> _Stack:
    """``shape``, by its rank, and ``dtypes`` are those of the right factor of what is added."""
    stack, left, right = weights.stack, weights.left, weights.right
    experts, m, k = stack.shape
    coded, rank = stack.dtype in _BYTES, 0 if left is None else left.shape[1]
    at = _address(stack, stack.shape, *(_BYTES if coded else (torch.bfloat16,)))
    return _Stack(
        at if coded else None,
        None if coded else at,
        _address(weights.scale, (experts * m, 1), torch.float32),
        _address(left, (rows.count, rank), torch.bfloat16),
        _address(right, shape(rank), *dtypes),
        m,
        k,
        rank,
    )


def _rows(rows: Rows, experts: int, read: int) -> _Rows:
    """``read``: how many rows there are to read."""
    if rows.rows is None and read != rows.count:
        raise ValueError(f"{read} rows for a product of {rows.count}")
    at = _address(rows.rows, (rows.count,), torch.int64)
    if rows.rows is not None and rows.count and not _within(rows.rows, read):
        raise IndexError(f"a row that is not one of {read}")
    return _Rows(at, _address(rows.ends, (experts,), torch.int32), experts, rows.count)


def _within(places: Tensor, count: int) -> bool:
    least, most = torch.aminmax(places)
    return int(least) >= 0 and int(most) < count


def _address(tensor: Tensor | None, shape: Any = None, *dtypes: torch.dtype) -> Any:
    """Where a tensor lies, for C++, which takes it to be contiguous in the memory of the CPU, of
    this shape and one of these dtypes; null without one.
    """
    if tensor is None:
        return None
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"a tensor on {tensor.device} with strides {tensor.stride()}")
    if shape is not None and (tensor.shape != torch.Size(shape) or tensor.dtype not in dtypes):
        found = f"{list(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"a tensor {found} is not {list(shape)} of {dtypes}")
    return _POINTER(tensor.data_ptr())


def _threads() -> Any:
    return _INT64(torch.get_num_threads())
