"""Host side of the FP8 GEMM over several pieces: allocates the outputs and launches the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from triton import cdiv

from falqon_fx import _compat
from falqon_fx.kernels.gemm.spec import GemmSpec
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import Described, launch
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import POINTER, Sizes
from falqon_fx.site.numerics import E4M3, FP8_DTYPES, INT8
from falqon_fx.site.nvfp4 import is_packed, shape_of

_TYPE = {"e4m3": "fp8e4nv", "e5m2": "fp8e5", "int8": "i8"}
_DTYPES = {**FP8_DTYPES, "int8": INT8}


@dataclass(frozen=True)
class Piece:
    """One right operand and what belongs to its columns of the output.

    ``weight``: E4M3 (or int8) [rows, K] (layout "nk") or [K, rows] ("kn"), rows without gaps, or
    NVFP4 in their place.
    ``scale``: float32 [rows, 1], [] or None. ``left`` [n, r] and ``right`` [rows, r]: see
    `GemmSpec`. For memory "tma" the weights of all pieces are consecutive rows of one tensor.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None


@dataclass(frozen=True)
class Product:
    """One more q · Wᵀ, with its scale, that is added to that of a single piece."""

    q: Tensor
    q_scale: Tensor
    weight: Tensor


def gemm(
    q: Tensor,
    q_scale: Tensor,
    pieces: Sequence[Piece],
    spec: GemmSpec,
    more: Sequence[Product] = (),
) -> list[Tensor]:
    """Y_g [n, rows_g] as `GemmSpec` says, each in its own buffer; those of the last ``a_pieces``
    side by side in one.

    ``q`` [n, K] is FP8 or int8 with rows of any stride, ``q_scale`` float32 [n, 1] or []. Sums are
    float32 (but see ``accumulation``) or int32, and so is all that follows up to the store. An
    empty q launches nothing.

    Raises ValueError where the tensors are not what the spec is for.
    """
    _check(q, q_scale, pieces, spec, more)
    n, k = q.shape
    rows = [_rows(piece, spec) for piece in pieces]
    y_pieces = spec.pieces - spec.a_pieces
    columns = [*rows[:y_pieces], *([sum(rows[y_pieces:])] if spec.a_pieces else [])]
    y = [
        torch.empty((n, width), dtype=getattr(torch, dtype), device=q.device)
        for width, dtype in zip(columns, spec.dtypes, strict=True)
    ]
    if n == 0:
        return y
    arguments: list[object] = [*_operands(q, pieces, spec), q_scale]
    if spec.w_scale != "none":
        arguments += [piece.scale for piece in pieces]
    for part in y:
        arguments += [part, part.stride(0)]
    if spec.bias != "none":
        unread = torch.empty(1, dtype=getattr(torch, spec.bias), device=q.device)
        for piece, m in zip(pieces, rows, strict=True):
            absent = piece.bias is None
            arguments += [unread if absent else piece.bias, 0 if absent else m]
    if spec.extra:
        for piece in pieces:
            assert piece.left is not None
            assert piece.right is not None
            left, right = piece.left, piece.right.contiguous()
            if spec.tail:
                left, right = _bytes([left, right], spec)
            arguments += [left, left.stride(0), right, right.shape[1]]
    arguments += [*rows, n, k]
    for other in more:
        other_q, other_w = _bytes([other.q, other.weight], spec)
        strides = [other_q.stride(0), other_w.stride(0)]
        arguments += [other_q, other_w, other.q_scale, other_q.shape[1], *strides]
    if spec.memory == "pointer":
        arguments += [q.stride(0), pieces[0].weight.stride(0)]
    tiles = cdiv(n, spec.block_m) * sum(cdiv(m, spec.block_n) for m in rows)
    if spec.persistent:
        tiles = min(tiles, programs(q.device))
    return launch(
        load(spec, runs_interpreted(q)).gemm,
        (tiles,),
        arguments,
        [f"y{g}_ptr" for g in range(len(y))],
        num_warps=spec.num_warps,
        num_stages=spec.num_stages,
    )


def signatures(spec: GemmSpec) -> dict[str, dict[str, str]]:
    """Argument types of the kernel, for `aot.compile_ahead`: aligned, sizes divisible by 16."""
    g = range(spec.pieces)
    x, w = _TYPE[spec.x], "i8" if spec.x == "int8" else "u8" if spec.packed else "fp8e4nv"
    if spec.operands in ("bfloat16", "float32") and spec.x != "int8":
        x = w = "u8"
    types: dict[str, str] = {}
    if spec.memory == "tma":
        w_block = (
            (spec.block_n, spec.block_k) if spec.layout == "nk" else (spec.block_k, spec.block_n)
        )
        types["x_desc"] = f"tensordesc<{x}[{spec.block_m}, {spec.block_k}]>"
        types["w_desc"] = f"tensordesc<{w}[{w_block[0]}, {w_block[1]}]>"
    else:
        types["x_ptr"] = f"*{x}:16"
        types |= {f"w{i}_ptr": f"*{w}:16" for i in g}
    types["x_scale_ptr"] = "*fp32:16"
    if spec.w_scale != "none":
        types |= {f"w{i}_scale_ptr": "*fp32:16" for i in g}
    for i, dtype in enumerate(spec.dtypes):
        types[f"y{i}_ptr"] = POINTER[dtype]
        types[f"y{i}_stride"] = "i32:16"
    if spec.bias != "none":
        for i in g:
            types |= {f"bias{i}_ptr": POINTER[spec.bias], f"bias{i}_rows": "i32:16"}
    if spec.extra:
        left, right = [POINTER[spec.a_dtype]] * 2
        if spec.tail:
            left, right = f"*{x}:16", f"*{w}:16"
        for i in g:
            types |= {f"left{i}_ptr": left, f"left{i}_stride": "i32:16"}
            types |= {f"right{i}_ptr": right, f"rank{i}": "i32:16"}
    types |= {f"rows{i}": "i32:16" for i in g}
    types |= {"n": "i32", "k": "i32:16"}
    for i in range(1, spec.k_pieces):
        types |= {f"x{i}_ptr": f"*{x}:16", f"w_{i}_ptr": f"*{w}:16", f"x{i}_scale_ptr": "*fp32:16"}
        types |= {f"k{i}": "i32:16", f"x{i}_stride": "i32:16", f"w_{i}_stride": "i32:16"}
    if spec.memory == "pointer":
        types |= {"x_stride": "i32:16", "w_stride": "i32:16"}
    return {"gemm": types}


def unaligned(spec: GemmSpec) -> dict[Sizes, str]:
    """The parameters that such sizes make no multiples of 16, as a pattern."""
    y = spec.pieces - spec.a_pieces
    of_a = "".join(f"|(rows|w){g}(_scale_ptr)?" for g in range(y, spec.pieces))
    of_a += f"|y{y}_stride" if spec.a_pieces else ""
    rank = rf"(left|right)\d_(ptr|stride)|rank\d{of_a}"
    return {"rank": rank, "any": rf"{rank}|rows\d|y\d_stride|w\d_scale_ptr|bias\d_rows"}


def programs(device: torch.device) -> int:
    """How many programs of a persistent kernel run at once; 3 under the interpreter, to test it."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _operands(q: Tensor, pieces: Sequence[Piece], spec: GemmSpec) -> list[object]:
    q, *weights = _bytes([q, *(piece.weight for piece in pieces)], spec)
    if spec.memory == "pointer":
        return [q, *weights]
    first, total = weights[0], sum(_rows(piece, spec) for piece in pieces)
    nk = spec.layout == "nk"
    shape = (total, first.shape[1]) if nk else tuple(first.shape)
    block = (spec.block_n, spec.block_k) if nk else (spec.block_k, spec.block_n)
    whole = first if len(pieces) == 1 else first.as_strided(shape, (first.stride(0), 1))
    return [Described(q, (spec.block_m, spec.block_k)), Described(whole, block)]


def _bytes(tensors: Sequence[Tensor], spec: GemmSpec) -> list[Tensor]:
    """Operands as the kernel takes them: as they are, or of FP8 as bytes that it decodes."""
    as_they_are = spec.operands in ("fp8", "float16") or spec.x == "int8"
    return [t if as_they_are else t.view(torch.uint8) for t in tensors]


def _rows(piece: Piece, spec: GemmSpec) -> int:
    return shape_of(piece.weight)[1 - _k_axis(spec)]


def _check(
    q: Tensor, q_scale: Tensor, pieces: Sequence[Piece], spec: GemmSpec, more: Sequence[Product]
) -> None:
    if len(pieces) != spec.pieces or len(more) != spec.k_pieces - 1:
        raise ValueError(
            f"gemm: {len(pieces)} pieces and {len(more)} more products, {spec} takes others"
        )
    _check_product(q, q_scale, pieces[0].weight, spec)
    n, k = q.shape
    for other in more:
        if other.q.shape[0] != n or shape_of(other.weight)[1 - _k_axis(spec)] != _rows(
            pieces[0], spec
        ):
            raise ValueError("gemm: products of different shapes")
        _check_product(other.q, other.q_scale, other.weight, spec)
    if spec.operands != "float32" and runs_interpreted(q):
        raise ValueError("gemm: the interpreter needs operands='float32'")
    for piece in pieces:
        rows = _rows(piece, spec)
        _check_product(q, q_scale, piece.weight, spec)
        wanted = {"none": None, "tensor": 1, "row": rows}[spec.w_scale]
        if (None if piece.scale is None else piece.scale.numel()) != wanted:
            raise ValueError(f"gemm: a weight's scale does not fit w_scale={spec.w_scale!r}")
        if piece.bias is not None and piece.bias.dtype != getattr(torch, spec.bias, None):
            raise ValueError(f"gemm: a bias is {piece.bias.dtype}, the spec says {spec.bias!r}")
        _check_extra(piece, n, rows, spec)
    if spec.memory == "tma":
        _check_described(q, pieces)


def _check_product(q: Tensor, q_scale: Tensor, weight: Tensor, spec: GemmSpec) -> None:
    if q.dim() != 2 or q.shape[1] == 0 or _has_gaps(q) or q.dtype != _DTYPES[spec.x]:
        raise ValueError(f"gemm: q is {q.dtype} {tuple(q.shape)}, {spec} takes [n, K] {spec.x}")
    n, k = q.shape
    if q_scale.numel() != (n if spec.x_scale == "row" else 1):
        raise ValueError(f"gemm: q_scale {tuple(q_scale.shape)} is not x_scale={spec.x_scale!r}")
    if spec.even_k and k % spec.block_k:
        raise ValueError(f"gemm: K = {k} is not a multiple of {spec.block_k}, as even_k says")
    wanted = torch.uint8 if spec.packed else INT8 if spec.x == "int8" else E4M3
    row = weight.flatten(1) if spec.packed and is_packed(weight) else weight
    if weight.dtype != wanted or is_packed(weight) != spec.packed or _has_gaps(row):
        raise ValueError(f"gemm: a weight is {weight.dtype} with strides {weight.stride()}")
    if shape_of(weight)[_k_axis(spec)] != k:
        raise ValueError(f"gemm: a weight is {tuple(weight.shape)}, K is {k}")


def _has_gaps(matrix: Tensor) -> bool:
    return matrix.shape[1] > 1 and matrix.stride(1) != 1


def _check_extra(piece: Piece, n: int, rows: int, spec: GemmSpec) -> None:
    dtypes = [getattr(torch, spec.a_dtype)] * 2
    if spec.tail:
        dtypes = [FP8_DTYPES[spec.x], FP8_DTYPES["e4m3"]]
    for side, length, dtype in ((piece.left, n, dtypes[0]), (piece.right, rows, dtypes[1])):
        if (side is None) != (spec.extra == 0):
            raise ValueError("gemm: left and right go with extra > 0, and it with them")
        if side is not None and (
            side.dtype != dtype
            or side.shape[0] != length
            or _has_gaps(side)
            or not 0 < side.shape[1] <= spec.extra
        ):
            raise ValueError(f"gemm: left or right is {side.dtype} {tuple(side.shape)}")


def _k_axis(spec: GemmSpec) -> int:
    return 1 if spec.layout == "nk" else 0


def _check_described(q: Tensor, pieces: Sequence[Piece]) -> None:
    for tensor in (q, pieces[0].weight):
        if _start(tensor) % 16 or tensor.stride(0) % 16:
            raise ValueError("gemm: memory='tma' takes rows that start at multiples of 16 bytes")
    for before, after in pairwise(pieces):
        if not follows(before.weight, after.weight):
            raise ValueError("gemm: memory='tma' takes pieces that are rows of one tensor")


def follows(before: Tensor, after: Tensor) -> bool:
    """Whether ``after`` begins where ``before`` ends, as rows of one tensor: tensors apart may lie
    like that by chance.
    """
    at_end = after.storage_offset() == before.storage_offset() + before.numel()
    return at_end and _compat.share_storage(before, after)


def _start(tensor: Tensor) -> int:
    """Where FP8 rows start, up to a multiple of 16: in a graph that is traced memory is aligned."""
    return int(tensor.storage_offset()) if _compat.is_fake(tensor) else tensor.data_ptr()
