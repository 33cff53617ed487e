"""Products whose adapters are r more of K, by whichever kernel is best here: adapter_dtype="fp8".

========================  ====================================================================
triton:<spec>             a generated kernel; in forward the columns of b lie apart from W
scaled_mm+joined          the library's, on [W | b], which is put together each time
scaled_mm+kept            on a W that is kept with room for b, which is written there
...+transpose             behind one transpose of [W; Â], which dL/dx needs anyway
...+stored                behind that of Â alone, into columns beside a Wᵀ that is kept
dequantize                ``torch.mm`` on decoded operands
========================  ====================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from falqon_fx.kernels.gemm.launch import Piece
from falqon_fx.kernels.launching import FORWARD, with_last_columns
from falqon_fx.kernels.products.choice import Candidate
from falqon_fx.kernels.products.contest import Contest, Options
from falqon_fx.kernels.products.dispatch import by_libraries, forward_key, generated_candidates
from falqon_fx.kernels.products.pieces import MatMul, alike, by_library, by_mm, finished
from falqon_fx.kernels.products.problem import key_of, problem_of
from falqon_fx.kernels.spec import aligned
from falqon_fx.kernels.transpose.kept import transposed_together, with_columns


@dataclass(frozen=True)
class Columns:
    """FP8 [n, width] whose first ``k`` columns are q(x); behind them stand blocks of t."""

    wide: Tensor
    k: int

    @property
    def q(self) -> Tensor:
        return self.wide.narrow(1, 0, self.k)

    def block(self, place: int, columns: int) -> Tensor:
        return self.wide.narrow(1, place, columns)


def forward(
    x: Columns,
    q_scale: Tensor,
    pieces: Sequence[Piece],
    places: Sequence[int],
    out_dtype: torch.dtype,
    options: Options,
    kept: Sequence[Tensor] = (),
) -> Contest:
    """O_g = ([q | t_g] · [W_g | b_g]ᵀ) ⊙ s_q ⊙ s_W,g + bias_g of each piece: ``right`` is b_g
    [rows, r], r a multiple of 16, and t_g stands from ``places[g]`` on. ``kept`` has [W_1; ...]
    with as many columns as x, where it is there already.
    """
    pieces = [
        replace(piece, left=x.block(place, piece.right.shape[1]))  # type: ignore[union-attr]
        for piece, place in zip(alike(pieces), places, strict=True)
    ]
    placed = [*zip(pieces, places, strict=True)]
    mode = options.accumulation
    problem = problem_of(x.q, q_scale, pieces, 0, out_dtype, out_dtype, mode)
    problem = replace(problem, tail=True)
    suffix = "+kept" if kept else "+joined"
    wide = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32

    def library(mm: MatMul) -> list[Tensor]:
        # One product for all sites, with zeros where b of one would meet t of another.
        if kept:
            weight = with_last_columns(kept[0], partial(_room, x, pieces, places), FORWARD)
        else:
            weight = _cat([_joined(x, p, place) for p, place in placed])
        whole = Piece(weight, _scale_of(pieces))
        y = by_library(mm, x.wide, q_scale, whole, wide, mode)
        parts = y.split([len(p.weight) for p in pieces], dim=1)
        return [_biased(part, p, out_dtype) for part, p in zip(parts, pieces, strict=True)]

    def by_aten() -> list[Tensor]:
        plain = [Piece(_joined(x, p, place), p.scale, p.bias) for p, place in placed]
        return [by_mm(x.wide, q_scale, p, out_dtype) for p in plain]

    candidates: dict[str, Candidate] = dict(generated_candidates(problem, x.q, q_scale, pieces))
    sizes = [x.wide.shape[1], sum(problem.rows)]
    candidates |= by_libraries(options, x.wide, sizes, library, suffix)
    candidates["dequantize"] = by_aten
    return Contest(forward_key(problem, bool(kept)), candidates, x.wide, options.kernel)


def with_room_for(weight: Sequence[Tensor], room: int) -> Tensor:
    """[W_1; ... | 0], the rows of FP8 matrices filled up to a multiple of 16 columns, with so many
    more.
    """
    features = weight[0].shape[1]
    whole = weight[0].new_zeros((sum(map(len, weight)), aligned(features) + room))
    at = 0
    for w in weight:
        whole[at : at + len(w), :features].copy_(w)
        at += len(w)
    return whole


def _room(x: Columns, pieces: Sequence[Piece], places: Sequence[int]) -> Tensor:
    """b of all pieces in the columns where their t stand, one below the other, between zeros."""
    rows = []
    for piece, place in zip(pieces, places, strict=True):
        assert piece.right is not None
        before, columns = place - x.k, piece.right.shape[1]
        behind = x.wide.shape[1] - place - columns
        rows.append(torch.nn.functional.pad(piece.right.view(torch.uint8), (before, behind)))
    whole = rows[0] if len(rows) == 1 else torch.cat(rows)
    return whole.view(pieces[0].weight.dtype)


def grad_x(
    g: Tensor,
    s_g: Tensor,
    weight: Sequence[Tensor],
    a: Sequence[Tensor],
    x_dtype: torch.dtype,
    options: Options,
    kept: Sequence[Tensor] = (),
) -> Contest:
    """[dL/dx], dL/dx [n, in] = (g · [W_1; W_2; ...; Â_1; ...]) ⊙ s_g, W and Â E4M3 [rows, in] each;
    those of g's columns that belong to each begin at a multiple of 16. ``kept`` has [W_1ᵀ | ...],
    with as many columns as g, where it is there already.
    """
    features, mode = weight[0].shape[1], options.accumulation
    suffix = "+stored" if kept else "+transpose"

    def turned() -> Piece:
        whole = with_columns(kept[0], a) if kept else transposed_together([*weight, *a])
        return Piece(whole, None)

    like = Piece(g.new_empty((features, g.shape[1]), dtype=weight[0].dtype, device="meta"), None)
    problem = problem_of(g, s_g, [like], 0, x_dtype, x_dtype, mode)

    def library(mm: MatMul) -> list[Tensor]:
        return [by_library(mm, g, s_g, turned(), x_dtype, mode)]

    candidates: dict[str, Candidate] = {}
    made = generated_candidates(problem, g, s_g, [like], turn=lambda _: [turned().weight])
    candidates |= {f"{name}{suffix}": run for name, run in made}
    candidates |= by_libraries(options, g, [g.shape[1], features], library, suffix)
    candidates["dequantize"] = lambda: [by_mm(g, s_g, turned(), x_dtype)]
    what = "dL/dx in K by kept" if kept else "dL/dx in K"
    return Contest(key_of(what, problem), candidates, g, options.kernel)


def _joined(x: Columns, piece: Piece, place: int) -> Tensor:
    """[W | 0 | b | 0], as wide as x."""
    assert piece.right is not None
    parts, at = [piece.weight], piece.weight.shape[1]
    for columns, start in ((piece.right, place), (None, x.wide.shape[1])):
        if start > at:
            parts.append(piece.weight.new_zeros((len(piece.weight), start - at)))
        if columns is not None:
            parts.append(columns)
            at = start + columns.shape[1]
    bytes_of = [part.view(torch.uint8) for part in parts]
    return torch.cat(bytes_of, dim=1).view(piece.weight.dtype)


def _cat(weights: Sequence[Tensor]) -> Tensor:
    if len(weights) == 1:
        return weights[0]
    return torch.cat([w.view(torch.uint8) for w in weights]).view(weights[0].dtype)


def _scale_of(pieces: Sequence[Piece]) -> Tensor:
    """s_W of all rows [Σ rows, 1]; that of one piece as it is."""
    scales = [piece.scale for piece in pieces]
    given = [s for s in scales if s is not None]
    if len(given) == 1:
        return given[0]
    rows = [len(piece.weight) for piece in pieces]
    return torch.cat([s.reshape(-1, 1).expand(r, 1) for s, r in zip(given, rows, strict=True)])


def _biased(y: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
    return finished(y, Piece(piece.weight, None, piece.bias), dtype)
