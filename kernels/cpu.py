"""The proxy update on a CPU, casts to FP8 and back, and copies as compiled code: ``cpu.cpp``, built
by Inductor's compiler at need.

What `falqon_fx.update` and `falqon_fx.numerics` compute with ATen's operations, and bit for bit the
same but for the sign of zeros and the order of the update's sums of r products (a row's score, and
scaling · ΔB · Â).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falqon_fx import _compat
from falqon_fx.spec import SiteSpec

log = logging.getLogger(__name__)

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Matrix(ctypes.Structure):
    _fields_ = (("data", _POINTER), ("row_stride", _INT64), ("column_stride", _INT64))


class _Copy(ctypes.Structure):
    _fields_ = (("to", _POINTER), ("from_", _POINTER), ("bytes", _INT64))


class _Site(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "scale", "applied", "lora_b")),
        *((name, _POINTER) for name in ("counters", "writes")),
        ("scaling", ctypes.c_float),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        *((name, _INT64) for name in ("out", "in_", "rank", "count")),
        ("seed", ctypes.c_uint64),
        *((name, _INT32) for name in ("b_is_bfloat16", "applied_is_bfloat16", "per_row")),
        *((name, _INT32) for name in ("pow2", "stochastic", "drop")),
    )


_TOLD = ("rows", "worth", "old", "asked", "score", "remains")  # also the fields of `Chosen`


class _Told(ctypes.Structure):
    _fields_ = tuple((name, _POINTER) for name in _TOLD)


@functools.cache
def library() -> Any | None:
    """The compiled code; None where no compiler works, with the reason in the log."""
    source = Path(__file__).with_suffix(".cpp").read_text()
    try:
        built = _compat.compile_cpp(source)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        log.warning(
            "falqon: the update can't be compiled for this CPU and runs as ATen operations, five "
            "times slower. Remedy: install a C++ compiler, or name one with CXX=... Reason: %s",
            error,
        )
        return None
    for name in ("fingerprints", "update", "copy", "decode", "round"):
        getattr(built, f"falqon_{name}").restype = None
    return built


def fingerprints(matrices: Sequence[Tensor]) -> Tensor | None:
    """`falqon_fx.update.fingerprint` of each of G matrices [m, n] of one shape and dtype on a CPU,
    int64 [G]; None where there is no compiled code.
    """
    if library() is None:
        return None
    (rows, columns), size = matrices[0].shape, matrices[0].element_size()
    places = (_Matrix * len(matrices))()
    for place, matrix in zip(places, matrices):
        place.data = matrix.data_ptr()
        place.row_stride, place.column_stride = (stride * size for stride in matrix.stride())
    result = torch.empty(len(matrices), dtype=torch.int64)
    sizes = (len(matrices), rows, columns, size, torch.get_num_threads())
    _call("falqon_fingerprints", places, *map(_INT64, sizes), result)
    return result


def copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Write the second of each pair into the first, around the cache; both are contiguous, on a CPU
    and of as many bytes. False where no compiled code is loaded yet, which takes seconds (the
    import of Inductor, a probe of the compiler): more than a copy can win.
    """
    if not library.cache_info().currsize or library() is None:
        return False
    copies = [_Copy(to.data_ptr(), of.data_ptr(), of.nbytes) for to, of in pairs]
    places = (_Copy * len(copies))(*copies)
    _call("falqon_copy", places, _INT64(len(pairs)), _INT64(torch.get_num_threads()))
    return True


def decode(code: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor | None:
    """`falqon_fx.numerics.decode_fp8` of bytes [..., n], ``scale`` [..., 1], [] or a number. None
    where there is no compiled code, or it doesn't take these.
    """
    scale = torch.as_tensor(scale)
    if dtype not in (torch.float32, torch.bfloat16) or not _by_rows(code, torch.uint8, scale):
        return None
    result = torch.empty(code.shape, dtype=dtype)
    sizes = (*_rows_of(code, scale), dtype == torch.bfloat16, torch.get_num_threads())
    _call("falqon_decode", code, scale, *map(_INT64, sizes), result)
    return result


def round_scaled(x: Tensor, scale: Tensor | float, mantissa: int, spacing: float) -> Tensor | None:
    """`falqon_fx.numerics.round_to_scaled_fp8` of float32 [..., n], likewise."""
    scale = torch.as_tensor(scale)
    if not _by_rows(x, torch.float32, scale):
        return None
    result = torch.empty_like(x)
    sizes = (*_rows_of(x, scale), mantissa, torch.get_num_threads())
    _call("falqon_round", x, scale, *map(_INT64, sizes), ctypes.c_float(spacing), result)
    return result


def _by_rows(x: Tensor, dtype: torch.dtype, scale: Tensor) -> bool:
    """Whether compiled code can read these row by row."""
    return (
        type(x) is Tensor  # what is traced has no memory
        and x.device.type == "cpu"
        and x.dtype == dtype
        and scale.dtype == torch.float32
        and x.dim() > 0
        and scale.shape in ((), (*x.shape[:-1], 1))
        and x.is_contiguous()
        and scale.is_contiguous()
        and library() is not None
    )


def _rows_of(x: Tensor, scale: Tensor) -> tuple[int, int, int]:
    """The stride of the scales, the rows and the columns."""
    columns = x.shape[-1]
    return (1 if scale.dim() else 0), x.numel() // max(1, columns), columns


def _call(name: str, *arguments: Any) -> None:
    pointers = (_POINTER(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments)
    getattr(library(), name)(*pointers)


@dataclass(frozen=True)
class Chosen:
    """The rows chosen and what was asked of them; names and shapes as in `audit.Written`."""

    rows: Tensor
    worth: Tensor
    old: Tensor
    asked: Tensor
    score: Tensor
    remains: Tensor


Columns = Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]


def takes(sites: Columns) -> bool:
    """Whether `write_rows` can do these sites: on a CPU, alike, contiguous, B and applied float32
    or bfloat16.
    """
    _, scale, applied, lora_b, *_ = sites[0]
    return (
        applied.device.type == "cpu"
        and {applied.dtype, lora_b.dtype} <= {torch.float32, torch.bfloat16}
        and all(s.dim() == scale.dim() and a.dtype == applied.dtype for _, s, a, *_ in sites)
        and all(tensor.is_contiguous() for site in sites for tensor in site)
        and library() is not None
    )


def write_rows(
    sites: Columns, scaling: Sequence[float], count: int, plan: SiteSpec, watched: bool
) -> Chosen | None:
    """Choose ``count`` rows of each site and write them (`falqon_fx.update.proxy_update_`).

    A site is weight (uint8), scale, applied, B, counters and writes; all have the same shapes and
    dtypes, which `takes` accepted. Says what it did if ``watched``.
    """
    number = len(sites)
    weight, scale, applied, lora_b, _, _ = sites[0]
    out, rank = applied.shape
    places = (_Site * number)(
        *(
            _Site(*(tensor.data_ptr() for tensor in site), factor)
            for site, factor in zip(sites, scaling)
        )
    )
    shape = _Plan(
        out,
        weight.shape[1],
        rank,
        count,
        plan.seed,
        lora_b.dtype == torch.bfloat16,
        applied.dtype == torch.bfloat16,
        scale.dim() == 2,
        plan.scale == "pow2",
        plan.rounding == "stochastic",
        plan.pending == "drop",
    )
    told: Any = None
    rows: Chosen | None = None
    if watched:
        wide = (number, count, weight.shape[1])
        rows = Chosen(
            torch.empty(number, count, dtype=torch.int64),
            torch.empty(number, count, dtype=torch.bool),
            torch.empty(wide),
            torch.empty(wide),
            torch.empty(number, out),
            torch.empty(number, count),
        )
        columns = [vars(rows)[name] for name in _TOLD]
        told = (_Told * number)(
            *(_Told(*(column[i].data_ptr() for column in columns)) for i in range(number))
        )
    threads = _INT64(torch.get_num_threads())
    _call("falqon_update", places, told, _INT64(number), ctypes.byref(shape), threads)
    return rows
