"""The proxy update on a CPU, casts to FP8 and back, and copies as compiled code: ``native.cpp``,
built at need.

What `falqon_fx.rows.update` and `falqon_fx.site.numerics` compute with ATen's operations, and bit
for bit the same but for the sign of zeros and the order of the update's sums of r products (a row's
score, and scaling · ΔB · Â).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falqon_fx.kernels.cpu.build import compiled

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Matrix(ctypes.Structure):
    _fields_ = (("data", _POINTER), ("row_stride", _INT64), ("column_stride", _INT64))


class _Copy(ctypes.Structure):
    _fields_ = (("to", _POINTER), ("from_", _POINTER), ("bytes", _INT64))


class _Site(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "scale", "applied", "lora_b")),
        *((name, _POINTER) for name in ("counters", "writes")),
        ("base", _Matrix),
        ("scaling", ctypes.c_float),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        *((name, _INT64) for name in ("out", "in_", "rank", "count")),
        ("seed", ctypes.c_uint64),
        *((name, _INT32) for name in ("b_is_bfloat16", "applied_is_bfloat16", "base_dtype")),
        *((name, _INT32) for name in ("per_row", "pow2", "stochastic", "drop")),
        ("limit", ctypes.c_float),
    )


_BASE_DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # 0 where there is none
_FLOATS = {torch.float32, torch.bfloat16}
COUNTERS = 8  # of a site (`falqon_fx.rows.update`)
# Also the fields of `ChosenRows`.
_TOLD = ("rows", "worth", "old", "asked", "value", "score", "remains")


class _Told(ctypes.Structure):
    _fields_ = tuple((name, _POINTER) for name in _TOLD)


@functools.cache
def library() -> Any | None:
    """The compiled code; None where no compiler works, with the reason in the log."""
    return compiled(
        Path(__file__).with_suffix(".cpp"),
        ("fingerprints", "update", "copy", "decode", "decode_nvfp4", "round"),
        "the update can't be compiled for this CPU and runs as ATen operations, five times slower",
    )


def fingerprints(matrices: Sequence[Tensor]) -> Tensor | None:
    """`falqon_fx.rows.update.fingerprint` of each of G matrices [m, n] of one shape and dtype on a
    CPU, int64 [G]; None where there is no compiled code.
    """
    if library() is None:
        return None
    first = matrices[0]
    (rows, columns), size = first.shape, first.element_size()
    places = (_Matrix * len(matrices))(*(_place(m, first.dtype, first.shape) for m in matrices))
    result = torch.empty(len(matrices), dtype=torch.int64, device="cpu")
    sizes = (len(matrices), rows, columns, size, torch.get_num_threads())
    _call("falqon_fingerprints", places, *map(_INT64, sizes), _address(result, torch.int64))
    return result


def copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Write the second of each pair into the first, around the cache; both are contiguous, on a CPU
    and of as many bytes. False where no compiled code is loaded yet, which may take seconds
    (it may be compiled first): more than a copy can win.
    """
    if not library.cache_info().currsize or library() is None:
        return False
    copies = [_copy_of(to, of) for to, of in pairs]
    places = (_Copy * len(copies))(*copies)
    _call("falqon_copy", places, _INT64(len(pairs)), _INT64(torch.get_num_threads()))
    return True


def _copy_of(to: Tensor, of: Tensor) -> _Copy:
    if to.nbytes != of.nbytes:
        raise ValueError(f"a copy of {of.nbytes} bytes into {to.nbytes}")
    return _Copy(_address(to, to.dtype), _address(of, of.dtype), of.nbytes)


def decode(
    code: Tensor, scale: Tensor | float, dtype: torch.dtype, to: Tensor | None = None
) -> Tensor | None:
    """`falqon_fx.site.numerics.decode_fp8` of E4M3 or its bytes [..., n], ``scale`` [..., 1], []
    or a number, into ``to`` where that is given. None where there is no compiled code, or it
    doesn't take these.
    """
    scale = _as_scale(scale)
    if dtype not in _FLOATS or not _by_rows(code, {torch.uint8, torch.float8_e4m3fn}, scale):
        return None
    result = torch.empty(code.shape, dtype=dtype, device="cpu") if to is None else to
    if not result.is_contiguous():
        return None
    sizes = (*_rows_of(code, scale), dtype == torch.bfloat16, torch.get_num_threads())
    operands = (_address(code, code.dtype), _address(scale, torch.float32))
    _call("falqon_decode", *operands, *map(_INT64, sizes), _address(result, dtype, code.shape))
    return result


def decode_nvfp4(
    packed: Tensor, scale: Tensor | float, dtype: torch.dtype, to: Tensor | None = None
) -> Tensor | None:
    """`falqon_fx.site.nvfp4.decode` of uint8 [out, 9, in / 16], ``scale`` [] or a number."""
    scale = _as_scale(scale)
    if scale.dim() or dtype not in _FLOATS or not _by_rows(packed, {torch.uint8}, scale):
        return None
    rows, _, blocks = packed.shape
    shape = (rows, 16 * blocks)
    result = torch.empty(shape, dtype=dtype, device="cpu") if to is None else to
    if packed.shape[1] != 9 or not result.is_contiguous():
        return None
    operands = (_address(packed, torch.uint8), _address(scale, torch.float32))
    sizes = (rows, blocks, dtype == torch.bfloat16, torch.get_num_threads())
    _call("falqon_decode_nvfp4", *operands, *map(_INT64, sizes), _address(result, dtype, shape))
    return result


def round_scaled(x: Tensor, scale: Tensor | float, mantissa: int, spacing: float) -> Tensor | None:
    """`falqon_fx.site.numerics.round_to_scaled_fp8` of float32 [..., n], likewise."""
    scale = _as_scale(scale)
    if not _by_rows(x, {torch.float32}, scale):
        return None
    result = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    sizes = (*_rows_of(x, scale), mantissa, torch.get_num_threads())
    operands = (_address(x, torch.float32), _address(scale, torch.float32))
    rest = (ctypes.c_float(spacing), _address(result, torch.float32))
    _call("falqon_round", *operands, *map(_INT64, sizes), *rest)
    return result


def _as_scale(scale: Tensor | float) -> Tensor:
    if isinstance(scale, Tensor):
        return scale
    return torch.tensor(scale, dtype=torch.float32, device="cpu")


def _by_rows(x: Tensor, dtypes: Set[torch.dtype], scale: Tensor) -> bool:
    """Whether compiled code can read these row by row."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)  # what is traced has no memory
        and x.device.type == "cpu"
        and x.dtype in dtypes
        and scale.device.type == "cpu"
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


def _address(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int] | None = None) -> int:
    """Where a tensor lies, for C++, which takes it to be contiguous, of this dtype and shape, and
    in the memory of the CPU.
    """
    _check(tensor, dtype, shape)
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor with strides {tensor.stride()} is not contiguous")
    return tensor.data_ptr()


def _place(matrix: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> _Matrix:
    """The same of a matrix of any strides."""
    _check(matrix, dtype, shape)
    size = matrix.element_size()
    rows, columns = matrix.stride()
    return _Matrix(matrix.data_ptr(), rows * size, columns * size)


def _check(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int] | None) -> None:
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(f"a {tensor.dtype} tensor on {tensor.device} is not {dtype} on the CPU")
    if shape is not None and tensor.shape != torch.Size(shape):
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is not of {list(shape)}")


def _call(name: str, *arguments: Any) -> None:
    function = getattr(library(), name)
    function(*(_POINTER(a) if isinstance(a, int) else a for a in arguments))


@dataclass(frozen=True)
class ChosenRows:
    """k rows of each of G sites of one shape.

    Attributes:
        rows, worth: [G, k], the rows chosen and which of them were written.
        old, value: float32 [G, k, in], W's rows before, and old + asked.
        asked: float32 [G, k, in], scaling · ΔB · Â.
        score: [G, out], Σ|B - applied| of each row before the write.
        remains: [G, k], the same of the chosen rows after it.
    """

    rows: Tensor
    worth: Tensor
    old: Tensor
    asked: Tensor
    value: Tensor
    score: Tensor
    remains: Tensor


# Weight (uint8), scale, applied, B, counters and writes of a site, and its base weight if any.
SiteTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


def takes(sites: Sequence[SiteTensors]) -> bool:
    """Whether `write_rows` can do these sites, which are alike: on a CPU, B and applied float32 or
    bfloat16, all but the base weight contiguous.
    """
    _, _, applied, lora_b, _, _, base = sites[0]
    return (
        applied.device.type == "cpu"
        and {applied.dtype, lora_b.dtype} <= _FLOATS
        and (base is None or base.dtype in _BASE_DTYPES)
        and all(tensor.is_contiguous() for *site, _ in sites for tensor in site)
        and library() is not None
    )


def write_rows(
    sites: Sequence[SiteTensors],
    scaling: Sequence[float],
    count: int,
    *,
    seed: int,
    pow2: bool,
    stochastic: bool,
    drop: bool,
    limit: float | None,
    watched: bool,
) -> ChosenRows | None:
    """Choose ``count`` rows of each site and write them (`falqon_fx.rows.update.proxy_update_`).
    A row with a magnitude beyond ``limit`` times its scale stays as it is and is counted.

    All sites have the same shapes and dtypes, which `takes` accepted. Says what it did if
    ``watched``.

    Raises:
        ValueError: a tensor that is not like the first site's, or more rows than a site has.
    """
    weight, scale, applied, lora_b, _, _, base = sites[0]
    (out, rank), (_, width) = applied.shape, weight.shape
    if not 0 <= count <= out or len(scaling) != len(sites):
        raise ValueError(f"{count} rows of {out}, {len(scaling)} factors for {len(sites)} sites")
    if not {applied.dtype, lora_b.dtype} <= _FLOATS:
        raise ValueError(f"applied is {applied.dtype}, B {lora_b.dtype}")
    wanted = (
        (torch.uint8, (out + rank, width)),
        (torch.float32, (out + rank, 1) if scale.dim() else ()),
        (applied.dtype, (out, rank)),
        (lora_b.dtype, (out, rank)),
        (torch.int64, (COUNTERS,)),
        (torch.int32, (out,)),
    )
    lines = []
    for (*tensors, own), factor in zip(sites, scaling):
        addresses = [_address(t, *known) for t, known in zip(tensors, wanted, strict=True)]
        if (own is None) != (base is None):
            raise ValueError("a base weight is given for some sites of a batch only")
        of_base = _Matrix()
        if own is not None and base is not None:
            of_base = _place(own, base.dtype, (out, width))
        lines.append(_Site(*addresses, of_base, factor))
    places = (_Site * len(lines))(*lines)
    shape = _Plan(
        out,
        width,
        rank,
        count,
        seed,
        lora_b.dtype == torch.bfloat16,
        applied.dtype == torch.bfloat16,
        0 if base is None else _BASE_DTYPES[base.dtype],
        scale.dim() == 2,
        pow2,
        stochastic,
        drop,
        limit or 0.0,
    )
    told: Any = None
    chosen: ChosenRows | None = None
    if watched:
        number = len(sites)
        floats = functools.partial(torch.empty, dtype=torch.float32, device="cpu")
        chosen = ChosenRows(
            torch.empty(number, count, dtype=torch.int64, device="cpu"),
            torch.empty(number, count, dtype=torch.bool, device="cpu"),
            floats(number, count, width),
            floats(number, count, width),
            floats(number, count, width),
            floats(number, out),
            floats(number, count),
        )
        columns = [vars(chosen)[name] for name in _TOLD]
        told = (_Told * number)(
            *(_Told(*(column[i].data_ptr() for column in columns)) for i in range(number))
        )
    threads = _INT64(torch.get_num_threads())
    _call("falqon_update", places, told, _INT64(len(sites)), ctypes.byref(shape), threads)
    return chosen
