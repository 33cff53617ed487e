"""``falqon::merged_experts``: the products of stacked experts, with their adapters.

A stack of weights [E, out, in] is cast, kept and found as the matrix [E * out, in] of all its rows,
one scale a row. PEFT's adapters of it stay as they lie: lora_A [E * r, in] has the experts slowest,
lora_B [out, r * E] has them **fastest**.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError
from falqon_fx.ops.experts_lowering import (
    Experts,
    as_read,
    lower_grad_out_a,
    lower_grad_x,
    lower_grads,
    lower_merged_experts,
)
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.ops.once import once
from falqon_fx.site.numerics import E4M3, without_autocast


@torch.library.custom_op("falqon::merged_experts", mutates_args=())
def merged_experts(
    x: Tensor,
    rows: Sequence[Tensor],
    groups: Tensor,
    by_id: bool,
    experts: int,
    weight: Tensor,
    scale: Tensor,
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    b: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    keep_x: bool,
    out_dtype: torch.dtype,
    spec_text: str,
) -> list[Tensor]:
    """O [S, out] = x_e · dq(W_e)ᵀ + O_A,e · b_eᵀ of the rows of each expert e; then
    O_A,e = x_e · dq(Â_e)ᵀ [S, r], in the order of the experts; then, where ``keep_x``, x̂ [n, in]
    and its scale.

    x [n, in] is cast to FP8 once a row. Row i of the product reads row ``rows[0][i]`` of x, or row
    i without ``rows``. ``groups`` are the offsets [E] of rows that are sorted by expert, or with
    ``by_id`` the expert of each row, in any order. ``a``, ``a_scale``, ``b`` (see `proxy_update`),
    ``lora_a``, ``lora_b`` and ``scaling`` have one entry or none.

    With D_e = dL/dO_e · s · B_e:

        dL/dB_e = s · (dL/dO_e)ᵀ · O_A,e      dL/dA_e = D_eᵀ · x̂_e
        dL/dx_e = q(dL/dO_e ⊙ s_W,e) · W_e + D_e · dq(Â_e)
    """
    return lower_merged_experts(
        Experts(
            x,
            rows,
            groups,
            by_id,
            experts,
            as_read(weight),
            scale,
            [as_read(code) for code in a],
            a_scale,
            b,
            lora_a,
            lora_b,
            scaling,
            keep_x,
            out_dtype,
            spec_text,
        )
    )


@merged_experts.register_fake
def _(*args: Any) -> list[Tensor]:
    given = Experts(*args)
    x, count = given.x, given.products
    out = given.weight.shape[0] // given.experts
    rank = given.a[0].shape[0] // given.experts if given.a else 0
    dtype = gemm_dtype(given.out_dtype, x.device)
    results = [x.new_empty((count, out), dtype=given.out_dtype)]
    results.append(x.new_empty((count, rank), dtype=dtype))
    if given.keep_x:
        results.append(x.new_empty(x.shape, dtype=E4M3))
        results.append(x.new_empty((x.shape[0], 1), dtype=torch.float32))
    return results


@torch.library.custom_op("falqon::merged_experts_grad_x", mutates_args=())
def merged_experts_grad_x(
    grad: Tensor,
    n: int,
    rows: Sequence[Tensor],
    groups: Tensor,
    by_id: bool,
    experts: int,
    weight: Tensor,
    scale: Tensor,
    d: Sequence[Tensor],
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    x_dtype: torch.dtype,
    spec_text: str,
) -> Tensor:
    """dL/dx [n, in] = Σ q(dL/dO_e ⊙ s_W,e) · W_e + D_e · dq(Â_e), over all rows that read one of
    x; ``d`` has the rows in the order of the experts.

    The row scales of W belong to the dimension that is summed over, so they go into dL/dO before
    its cast, which is in FP8 with one scale a row.
    """
    return lower_grad_x(
        grad, n, rows, groups, by_id, experts, weight, scale, d, a, a_scale, x_dtype, spec_text
    )


@merged_experts_grad_x.register_fake
def _(grad: Tensor, n: int, *rest: Any) -> Tensor:
    _, _, _, _, weight, _, _, _, _, x_dtype, _ = rest
    return grad.new_empty((n, weight.shape[1]), dtype=x_dtype)


@torch.library.custom_op("falqon::merged_experts_grads", mutates_args=())
def merged_experts_grads(
    grad: Tensor,
    rows: Sequence[Tensor],
    groups: Tensor,
    by_id: bool,
    experts: int,
    out_a: Tensor,
    d: Sequence[Tensor],
    kept: Sequence[Tensor],
    scaling: float,
    b_dtype: torch.dtype,
    a_dtype: torch.dtype,
    spec_text: str,
) -> list[Tensor]:
    """dL/dB [out, r * E] = s · (dL/dO_e)ᵀ · O_A,e, and where ``kept`` = [x̂, its scale] is given
    dL/dA [E * r, in] = D_eᵀ · x̂_e, as PEFT lays them out.
    """
    return lower_grads(
        grad, rows, groups, by_id, experts, out_a, d, kept, scaling, b_dtype, a_dtype, spec_text
    )


@merged_experts_grads.register_fake
def _(grad: Tensor, *rest: Any) -> list[Tensor]:
    _, _, _, experts, out_a, _, kept, _, b_dtype, a_dtype, _ = rest
    columns = out_a.shape[1] * experts
    grads = [grad.new_empty((grad.shape[1], columns), dtype=b_dtype)]
    if kept:
        grads.append(grad.new_empty((columns, kept[0].shape[1]), dtype=a_dtype))
    return grads


@torch.library.custom_op("falqon::merged_experts_grad_out_a", mutates_args=())
def merged_experts_grad_out_a(
    grad: Tensor,
    groups: Tensor,
    by_id: bool,
    experts: int,
    b: Tensor,
    dtype: torch.dtype,
    spec_text: str,
) -> Tensor:
    """D_e = dL/dO_e · b_e [S, r], in the order of the experts."""
    return lower_grad_out_a(grad, groups, by_id, experts, b, dtype, spec_text)


@merged_experts_grad_out_a.register_fake
def _(grad: Tensor, *rest: Any) -> Tensor:
    _, _, experts, b, dtype, _ = rest
    return grad.new_empty((grad.shape[0], b.shape[1] // experts), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given = Experts(*inputs)
    _, out_a, *kept = output
    ctx.mark_non_differentiable(out_a, *kept)
    ctx.set_materialize_grads(False)
    columns = (
        [*given.rows],
        [given.groups, given.weight, given.scale, out_a],
        [*given.a],
        [*given.a_scale],
        [*given.b],
        kept,
    )
    ctx.save_for_backward(*(tensor for column in columns for tensor in column))
    ctx.lengths = [len(column) for column in columns]
    ctx.by_id, ctx.experts, ctx.keep_x = given.by_id, given.experts, given.keep_x
    ctx.x_shape, ctx.x_dtype = given.x.shape, given.x.dtype
    ctx.dtypes = [[t.dtype for t in column] for column in (given.lora_a, given.lora_b)]
    ctx.scaling, ctx.spec_text = [*given.scaling], given.spec_text
    ctx.trained = [p for p in (*given.lora_a, *given.lora_b) if p.requires_grad]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    results = _gradients(ctx, grads)
    if torch.is_grad_enabled():  # create_graph=True
        given = [t for t in (grads[0], *ctx.trained) if t is not None and t.requires_grad]
        if given:
            return once(results, given)
    return results


@without_autocast
@torch.no_grad()
def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    tensors = iter(ctx.saved_tensors)
    rows, (groups, weight, scale, out_a), a, a_scale, b, kept = (
        [next(tensors) for _ in range(count)] for count in ctx.lengths
    )
    needs_x, needs_a, needs_b = (ctx.needs_input_grad[i] for i in (0, 10, 11))
    grad = grads[0]
    grad_x = None
    grad_a: list[Tensor | None] = [None] * len(a)
    grad_b: list[Tensor | None] = [None] * len(a)
    if grad is not None:
        way = (groups, ctx.by_id, ctx.experts)
        trains_a = bool(a) and needs_a[0]
        if trains_a and not ctx.keep_x:
            raise FalqonError(
                "", "lora_A trains now, but did not when this graph was compiled", _RECOMPILE
            )
        d: list[Tensor] = []
        if a and (needs_x or trains_a):
            low = (b[0], out_a.dtype, ctx.spec_text)
            d = [torch.ops.falqon.merged_experts_grad_out_a(grad, *way, *low)]
        if needs_x:
            grad_x = merged_experts_grad_x(
                grad,
                ctx.x_shape[0],
                rows,
                *way,
                weight,
                scale,
                d,
                a,
                a_scale,
                ctx.x_dtype,
                ctx.spec_text,
            )
        if a and (needs_b[0] or trains_a):
            of_a, of_b = (column[0] for column in ctx.dtypes)
            own = (d, kept) if trains_a else ([], [])
            said = (ctx.scaling[0], of_b, of_a, ctx.spec_text)
            made_b, *made_a = torch.ops.falqon.merged_experts_grads(
                grad, rows, *way, out_a, *own, *said
            )
            grad_b = [made_b if needs_b[0] else None]
            grad_a = [*made_a] or [None]
    nothing: list[None] = [None] * len(a)
    numbers: list[None] | None = None if ctx.scaling else []  # an empty list is one of tensors
    return (
        grad_x,
        [None] * len(rows),
        None,
        None,
        None,
        None,
        None,
        nothing,
        nothing,
        nothing,
        grad_a,
        grad_b,
        numbers,
        None,
        None,
        None,
    )


_RECOMPILE = "Call torch._dynamo.reset() after changing requires_grad"

merged_experts.register_autograd(_backward, setup_context=_save)

OP = torch.ops.falqon.merged_experts.default
