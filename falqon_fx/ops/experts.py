"""``falqon::merged_experts``: the products of stacked experts, with their adapters.

A stack of weights [E, out, in] is cast, kept and found as the matrix [E * out, in] of all its rows,
one scale a row. PEFT's adapters of it stay as they lie: lora_A [E * r, in] has the experts slowest,
lora_B [out, r * E] has them **fastest**.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError
from falqon_fx.ops.grouped import Routing, Stack, grouped_outer, padded_mm, routing, times
from falqon_fx.ops.lowering import cast_fp8, decode, gemm_dtype
from falqon_fx.ops.once import once
from falqon_fx.site.numerics import E4M3, without_autocast
from falqon_fx.site.spec import parse_spec


class Experts(NamedTuple):
    """The arguments of `merged_experts`, in order."""

    x: Tensor
    rows: Sequence[Tensor]
    groups: Tensor
    by_id: bool
    experts: int
    weight: Tensor
    scale: Tensor
    a: Sequence[Tensor]
    a_scale: Sequence[Tensor]
    b: Sequence[Tensor]
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    scaling: Sequence[float]
    keep_x: bool
    out_dtype: torch.dtype
    spec_text: str

    @property
    def products(self) -> int:
        """The number of rows that are multiplied."""
        return self.groups.numel() if self.by_id else (*self.rows, self.x)[0].shape[0]


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
            _as_read(weight),
            scale,
            [_as_read(code) for code in a],
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


def _as_read(weight: Tensor) -> Tensor:
    """FP8 as `decode_fp8` reads it fastest where nothing is compiled."""
    return weight.view(torch.uint8) if weight.device.type == "cpu" else weight


@without_autocast
def lower_merged_experts(given: Experts) -> list[Tensor]:
    """What `merged_experts` computes."""
    spec, dtype = parse_spec(given.spec_text), gemm_dtype(given.out_dtype, given.x.device)
    exact = spec.scale == "pow2"
    way = routing(given.groups, given.by_id, given.rows, given.experts)
    cast = cast_fp8(given.x, E4M3, spec, dtype, keep=given.keep_x)
    value = way.taken(cast.value)
    of_x = None if exact else way.taken(cast.scale)

    def product(code: Tensor, scale: Tensor) -> Tensor:
        """value · dq(code)ᵀ of each expert."""
        stack = Stack.of(code, scale if exact else 1.0, given.experts)
        y = times(value, stack, way.offs, turned=False)
        if of_x is None:
            return y
        return (y.to(torch.float32) * of_x * by_row(scale, way, len(y))).to(dtype)

    y = product(given.weight, given.scale)
    out_a = y.new_empty((len(y), 0))
    for code, scale, b in zip(given.a, given.a_scale, given.b, strict=True):
        out_a = product(code, scale)
        y = y + padded_mm(out_a, stacked_b(b.to(dtype), given.experts).transpose(1, 2), way.offs)
    kept = [cast.code, cast.scale] if given.keep_x and cast.code is not None else []
    return [way.restored(y.to(given.out_dtype)), out_a, *kept]


def stacked_b(b: Tensor, experts: int) -> Tensor:
    """B_e [E, out, r] of lora_B [out, r * E], whose columns have the experts fastest."""
    return b.reshape(b.shape[0], -1, experts).permute(2, 0, 1).contiguous()


def by_row(scale: Tensor, way: Routing, count: int) -> Tensor:
    """The scales [E * m, 1] of the expert of each row, float32 [count, m]."""
    experts = way.offs.shape[0]
    return scale.view(experts, -1).index_select(0, way.experts(count))


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
    way = routing(groups, by_id, rows, experts)
    spec, dtype = parse_spec(spec_text), gemm_dtype(grad.dtype, grad.device)
    folded = way.sorted(grad).to(torch.float32) * by_row(scale, way, grad.shape[0])
    cast = cast_fp8(folded, spec.grad_dtype, spec, dtype)
    y = times(cast.value, Stack.of(_as_read(weight), 1.0, experts), way.offs, turned=True)
    total = y.to(torch.float32) * cast.rest
    for d_j, code, a_scale_j in zip(d, a, a_scale, strict=True):
        scaled = (d_j.to(torch.float32) * by_row(a_scale_j, way, d_j.shape[0])).to(dtype)
        total += times(scaled, Stack.of(_as_read(code), 1.0, experts), way.offs, turned=True)
    return way.added_up(total, n).to(x_dtype)


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
) -> list[Tensor]:
    """dL/dB [out, r * E] = s · (dL/dO_e)ᵀ · O_A,e, and where ``kept`` = [x̂, its scale] is given
    dL/dA [E * r, in] = D_eᵀ · x̂_e, as PEFT lays them out.
    """
    way = routing(groups, by_id, rows, experts)
    of_b = grouped_outer(way.sorted(grad).to(out_a.dtype), out_a, way.offs).to(torch.float32)
    flat = (of_b * scaling).permute(1, 2, 0).reshape(grad.shape[1], -1)
    grads = [flat.to(b_dtype, memory_format=torch.contiguous_format)]
    for d_j, code, scale in [(*d, *kept)] if kept else []:
        value = decode(_as_read(code), 1.0, d_j.dtype)
        scaled = (d_j.to(torch.float32) * way.taken(scale)).to(d_j.dtype)
        of_a = grouped_outer(scaled, way.taken(value), way.offs)
        grads.append(of_a.reshape(-1, code.shape[1]).to(a_dtype).contiguous())
    return grads


@merged_experts_grads.register_fake
def _(
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
) -> list[Tensor]:
    columns = out_a.shape[1] * experts
    grads = [grad.new_empty((grad.shape[1], columns), dtype=b_dtype)]
    if kept:
        grads.append(grad.new_empty((columns, kept[0].shape[1]), dtype=a_dtype))
    return grads


@torch.library.custom_op("falqon::merged_experts_grad_out_a", mutates_args=())
def merged_experts_grad_out_a(
    grad: Tensor, groups: Tensor, by_id: bool, experts: int, b: Tensor, dtype: torch.dtype
) -> Tensor:
    """D_e = dL/dO_e · b_e [S, r], in the order of the experts."""
    way = routing(groups, by_id, (), experts)
    factor = stacked_b(b.to(dtype), experts)
    return padded_mm(way.sorted(grad).to(dtype), factor, way.offs).contiguous()


@merged_experts_grad_out_a.register_fake
def _(
    grad: Tensor, groups: Tensor, by_id: bool, experts: int, b: Tensor, dtype: torch.dtype
) -> Tensor:
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
        d = []
        if a and (needs_x or trains_a):
            d = [torch.ops.falqon.merged_experts_grad_out_a(grad, *way, b[0], out_a.dtype)]
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
            made_b, *made_a = torch.ops.falqon.merged_experts_grads(
                grad, rows, *way, out_a, *own, ctx.scaling[0], of_b, of_a
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
