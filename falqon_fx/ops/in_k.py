"""The products that ``falqon::merged_linear`` with adapters in FP8 is lowered to on a GPU.

As those of `falqon_fx.ops.products` they open into what was chosen in graphs whose sizes are all
known, and stay opaque ops elsewhere. A matrix of FP8 has the columns of x or of all dL/dO, then
those of the adapters, each block from a multiple of 16 on, with zeros between: one product each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from falqon_fx import _compat
from falqon_fx.kernels.fixed import Fixed
from falqon_fx.kernels.spec import MAX_PIECES, aligned
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.ops.products import define, launches, options_of
from falqon_fx.site.casts import cast_with_scale
from falqon_fx.site.numerics import filled


def beside(parts: Sequence[Tensor], more: int) -> Tensor:
    """FP8 [n, ...] with the columns of each part from a multiple of 16 on, and ``more`` behind."""
    widths = [aligned(part.shape[1]) for part in parts]
    places = [sum(widths[:i]) for i in range(len(parts))]
    return placed(dict(zip(places, parts, strict=True)), sum(widths) + more)


def placed(parts: Mapping[int, Tensor], total: int) -> Tensor:
    """FP8 [n, total] with the columns of each part from its place on, and zeros behind them up to a
    multiple of 16; whatever there is in all others.
    """
    first = next(iter(parts.values()))
    result = first.new_empty((len(first), total))
    for start, part in parts.items():
        width, at = part.shape[1], start
        blocks = [part]
        if width % 16:
            blocks.append(part.new_zeros((len(first), aligned(width) - width)))
        for block in blocks:
            if _compat.is_fake(result):  # Inductor writes it in place, by what makes the block
                result = torch.as_strided_scatter(result, block, block.shape, (total, 1), at)
            else:
                result.narrow(1, at, block.shape[1]).copy_(block)
            at += block.shape[1]
    return result


def merged_product_in_k(
    q: Tensor,
    q_scale: Tensor,
    own_q: Sequence[Tensor],
    own_scale: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    b: Sequence[Tensor],
    alpha: Sequence[Tensor],
    count: Sequence[Tensor],
    error: Sequence[Tensor],
    owner: Sequence[int],
    joined: Sequence[Tensor],
    out_dtype: torch.dtype,
    spec_text: str,
) -> list[Tensor]:
    """O_i [n, out_i] of the sites i that share x, O_A [n, Σ r_j], and [q | t | e] in FP8:

        O_i   = ([q | t_j | e_j ...] · [W_i | b_j ...]ᵀ) ⊙ s_q ⊙ s_W,i + bias_i  over owner[j] == i
        O_A,j = t_j ⊙ s_q ⊙ α_j       t_j = q(dq(q_j) · dq(Â_j)ᵀ / (s_q ⊙ α_j))

    e_j = q(error_j / s_q) stands behind t_j where b_j is wider than Â_j is high, as its last
    columns do; ``error`` has those of such adapters in turn, float32 [n, c].
    q_j, with its scale, is q unless the adapters read something else (``own_q``). What is clamped
    of the t_j is added to ``count`` of their site, int32 [1]. ``joined`` may have [W_i; ...] of all
    sites with adapters, with room for the b_j behind them, which are written there.
    """
    from falqon_fx.kernels.gemm.launch import Piece
    from falqon_fx.kernels.products import dispatch, in_k
    from falqon_fx.kernels.products.tails import all_tails
    from falqon_fx.kernels.tails.launch import Tail

    dtype, options = gemm_dtype(out_dtype, q.device), options_of(spec_text)
    q, own_q, weight, a = (filled(q), *([filled(t) for t in ts] for ts in (own_q, weight, a)))
    k, order = q.shape[1], sorted(range(len(owner)), key=owner.__getitem__)
    errors = dict(zip((j for j in range(len(a)) if b[j].shape[1] > len(a[j])), error, strict=True))
    place, at, parts = dict[int, int](), k, {0: q}
    for j in order:
        place[j], at = at, at + aligned(len(a[j]))
        if j in errors:
            parts[at] = cast_with_scale(errors[j], q_scale, q.dtype)
            at += aligned(errors[j].shape[1])
    wide = placed(parts, at)

    def adapters_of(wide: Tensor) -> list[Tail]:
        return [
            Tail(
                own_q[j] if own_q else wide,  # a view of its columns takes the host as long
                a[j],
                alpha[j],
                own_scale[j] if own_q else q_scale,
                a_scale[j],
                place[j],
                count[owner[j]],
            )
            for j in range(len(a))
        ]

    given = adapters_of, wide, q_scale, True, dtype, options.kernel
    out_a, wide = all_tails("forward", *given)
    x = in_k.Columns(wide, k)
    biases: Sequence[Tensor | None] = bias or [None] * len(weight)
    sites = [Piece(w, s, of_site) for w, s, of_site in zip(weight, scale, biases, strict=True)]
    own = [[j for j in order if owner[j] == i] for i in range(len(weight))]
    results: dict[int, Tensor] = {}
    for members in launches([bool(of_site) for of_site in own]):
        for first in range(0, len(members), MAX_PIECES):
            part_of = members[first : first + MAX_PIECES]
            pieces = [
                replace(sites[i], right=_side_by_side([b[j] for j in own[i]])) for i in part_of
            ]
            if own[part_of[0]]:
                places = [place[own[i][0]] for i in part_of]
                kept = joined if len(part_of) == sum(map(bool, own)) else ()
                contest = in_k.forward(x, q_scale, pieces, places, out_dtype, options, kept)
            else:
                contest = dispatch.forward(x.q, q_scale, pieces, 0, out_dtype, dtype, options)
            made_of = contest.run()
            if len(part_of) > 1 and not _compat.is_fake(q):
                made_of = [y.clone() for y in made_of]  # an op's results share no memory
            results |= zip(part_of, made_of, strict=True)
    return [*(results[i] for i in range(len(weight))), out_a, wide]


def _side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """b of the adapters of a site, each from a multiple of 16 on."""
    if not parts:
        return None
    columns = [_filled(part) for part in parts]
    if len(columns) == 1:
        return columns[0]
    return torch.cat([part.view(torch.uint8) for part in columns], dim=1).view(parts[0].dtype)


def _filled(b: Tensor) -> Tensor:
    """b [out, r] with columns of zeros up to a multiple of 16, which kernels store beside it."""
    rows, rank = b.shape
    width = aligned(rank)
    if rank == width:
        return b
    if b.stride() == (width, 1):
        return b.as_strided((rows, width), (width, 1))
    return beside([b], 0)


def _of_all_rows(b: Tensor) -> Tensor:
    """b [out, r] with rows of zeros up to a multiple of 16; rows start at multiples of 16."""
    if len(b) % 16 == 0:
        return b
    return filled(filled(b, axis=0)).narrow(1, 0, b.shape[1])


def _merged_product_fake(
    q: Tensor, q_scale: Tensor, own_q: Sequence[Tensor], own_scale: Any, *rest: Any
) -> list[Tensor]:
    weight, _, _, a, _, b, *_, out_dtype, _ = rest
    n, dtype = q.shape[0], gemm_dtype(out_dtype, q.device)
    ys = [q.new_empty((n, w.shape[0]), dtype=out_dtype) for w in weight]
    wide = aligned(q.shape[1]) + sum(aligned(factor.shape[1]) for factor in b)
    out_a = q.new_empty((n, sum(code.shape[0] for code in a)), dtype=dtype)
    return [*ys, out_a, q.new_empty((n, wide))]


def grad_product_in_k(
    g: Sequence[Tensor],
    s_g: Tensor,
    weight: Sequence[Tensor],
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    b: Sequence[Tensor],
    alpha: Sequence[Tensor],
    count: Sequence[Tensor],
    owner: Sequence[int],
    through_x: bool,
    needs_x: bool,
    turned: Sequence[Tensor],
    x_dtype: torch.dtype,
    d_dtype: torch.dtype,
    spec_text: str,
) -> list[Tensor]:
    """dL/dx [n, in] ([0, in] unless ``needs_x``), and D [n, Σ r_j], the D_j side by side:

        dL/dx = ([g_1 | ... | D'_1 | ...] · [W_1; ...; Â_1; ...]) ⊙ s_g
        D_j = (g_i · b_j) ⊙ s_g / α_j    D'_j = q(g_i · b_j ⊙ s_A,j / α_j)    with i = owner[j]

    The D'_j are part of it where the adapters read x (``through_x``); what is clamped of them is
    added to ``count`` of their site. Without ``b`` there is no D. ``turned`` may have [W_1ᵀ | ...]
    with room for the Â_jᵀ behind them, which are written there.
    """
    from falqon_fx.kernels.products import in_k
    from falqon_fx.kernels.products.tails import all_tails
    from falqon_fx.kernels.tails.launch import Tail

    options, stores = options_of(spec_text), through_x and needs_x and bool(b)
    outs, ranks = [part.shape[1] for part in g], [factor.shape[1] for factor in b]
    starts = [sum(map(aligned, outs[:i])) for i in range(len(outs) + 1)]
    wide = beside(g, sum(map(aligned, ranks)) if stores else 0)

    def adapters_of(wide: Tensor) -> list[Tail]:
        return [
            Tail(
                wide.narrow(1, start, wide.shape[1] - start) if start else wide,
                _of_all_rows(b[j]),
                alpha[j],
                None,
                a_scale[j],
                starts[-1] + sum(map(aligned, ranks[:j])),
                count[owner[j]],
            )
            for j, start in enumerate(starts[i] for i in owner)
        ]

    given = adapters_of, wide, s_g, stores, d_dtype, options.kernel
    of_adapters, wide = all_tails("backward", *given)
    if not needs_x:
        return [wide.new_empty((0, weight[0].shape[1]), dtype=x_dtype), of_adapters]
    rows = weight, a if stores else []
    return [*in_k.grad_x(wide, s_g, *rows, x_dtype, options, turned).run(), of_adapters]


def _grad_product_fake(
    g: Sequence[Tensor], s_g: Tensor, weight: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    _, _, b, _, _, _, _, needs_x, _, x_dtype, d_dtype, _ = rest
    n, first = len(g[0]), g[0]
    dx = first.new_empty((n if needs_x else 0, weight[0].shape[1]), dtype=x_dtype)
    return [dx, first.new_empty((n, sum(factor.shape[1] for factor in b)), dtype=d_dtype)]


def adapter_casts(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    fixed: Fixed,
    plain: Any,
    spec_text: str,
) -> list[Tensor]:
    """[Â_j, its scale, b_j, α_j] of each adapter in turn, at most `MAX_PIECES`."""
    from falqon_fx.kernels.products import tails

    given = lora_a, lora_b, scaling, base_scale, plain, spec_text
    return tails.adapter_casts(*given, *fixed).run()


define("merged_product_in_k", merged_product_in_k, _merged_product_fake)
define("grad_product_in_k", grad_product_in_k, _grad_product_fake)
