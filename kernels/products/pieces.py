"""One piece of a product by torch's own operations, and what is left to do to a result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from falqon_fx import _compat
from falqon_fx.config import Accumulation
from falqon_fx.kernels.gemm.launch import Piece
from falqon_fx.site import nvfp4

MatMul = Callable[..., Tensor]  # has the signature of `falqon_fx._compat.scaled_mm`


def by_library(
    mm: MatMul,
    q: Tensor,
    q_scale: Tensor,
    piece: Piece,
    dtype: torch.dtype,
    accumulation: Accumulation,
) -> Tensor:
    """One piece by a library: its own GEMM, then the extra term and the bias."""
    n, rows = q.shape[0], piece.weight.shape[0]
    by_row = q_scale.numel() > 1 or (piece.scale is not None and piece.scale.numel() > 1)
    w_scale = piece.scale
    if w_scale is None:
        w_scale = q_scale.new_ones((1, rows) if by_row else ())
    if by_row:  # the library wants both by row, or neither
        q_scale = q_scale.reshape(-1, 1).expand(n, 1).contiguous()
        w_scale = w_scale.reshape(1, -1).expand(1, rows).contiguous()
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    fast = accumulation == "fast"
    y = mm(q, piece.weight.t(), q_scale, w_scale, out_dtype=wide, use_fast_accum=fast)
    return finished(y, piece, dtype)


def int_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """The same of integers as `MatMul`: the library's product, and the scales behind it."""
    sums: Tensor = torch.ops.aten._int_mm(a, b)
    return (sums.to(torch.float32) * scale_a * scale_b).to(out_dtype)


def by_mm(q: Tensor, q_scale: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
    """One piece by ``torch.mm`` on the decoded operands, in bfloat16 where the result is that."""
    y = decoded(q, dtype) @ decoded(piece.weight, dtype).t()
    wide = y.to(torch.float32) * q_scale
    if piece.scale is not None:
        wide = wide * piece.scale.reshape(1, -1)
    return finished(wide, piece, dtype)


def added(parts: Sequence[Tensor]) -> Tensor:
    """The sum, in float32 where there is something to add."""
    return functools.reduce(torch.add, [p.to(torch.float32) for p in parts[1:]], parts[0])


def finished(y: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
    """y + left · rightᵀ + bias, in ``dtype``; in y's memory, or as a graph will have it
    (`falqon_fx.passes.add_in_place`).
    """
    if piece.left is not None:
        assert piece.right is not None
        y, factors = y.to(piece.left.dtype), (piece.left, piece.right.t())
        y = torch.addmm(y, *factors) if _compat.is_fake(y) else y.addmm_(*factors)
    if piece.bias is not None:
        y = y + piece.bias.to(y.dtype)
    return y.to(dtype)


def decoded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Values to multiply: bfloat16 holds every one; a raw sum of them overflows float16."""
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return nvfp4.decode(tensor, 1.0, wide) if nvfp4.is_packed(tensor) else tensor.to(wide)


def joined(parts: list[Tensor], a_pieces: int) -> list[Tensor]:
    """The results, the last ``a_pieces`` side by side in one."""
    if not a_pieces:
        return parts
    y, a = parts[: len(parts) - a_pieces], parts[len(parts) - a_pieces :]
    return [*y, a[0] if len(a) == 1 else torch.cat(a, dim=1)]


def alike(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """The pieces with biases of one dtype: those of several become float32."""
    if len({piece.bias.dtype for piece in pieces if piece.bias is not None}) < 2:
        return pieces
    wide = [None if piece.bias is None else piece.bias.to(torch.float32) for piece in pieces]
    return [replace(piece, bias=bias) for piece, bias in zip(pieces, wide, strict=True)]
