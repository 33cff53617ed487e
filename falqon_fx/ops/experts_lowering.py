"""What the ops of `falqon_fx.ops.experts` compute, on a CPU and on a GPU: ATen alone, so that a
compiler may open them.

A GPU with FP8 multiplies x with W by torch where it has such a product
(`falqon_fx.ops.grouped.takes_fp8`), and all else by generated kernels
(`falqon_fx.ops.grouped_kernels`). Everything else are grouped products of decoded values. Whatever
the number of experts, it is as many calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from falqon_fx.ops import experts_cpu, grouped_kernels
from falqon_fx.ops.grouped import (
    Routing,
    Stack,
    added,
    fp8_times,
    grouped_outer,
    padded_mm,
    routing,
    takes_fp8,
    times,
)
from falqon_fx.ops.grouped_kernels import Low, generated
from falqon_fx.ops.lowering import cast_fp8, decode, gemm_dtype
from falqon_fx.site.numerics import E4M3, as_operand, without_autocast
from falqon_fx.site.spec import SiteSpec, parse_spec


class Experts(NamedTuple):
    """The arguments of `falqon_fx.ops.experts.merged_experts`, in order."""

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


def as_read(weight: Tensor) -> Tensor:
    """FP8 as `decode_fp8` reads it fastest where nothing is compiled."""
    return weight.view(torch.uint8) if weight.device.type == "cpu" else weight


@without_autocast
def lower_merged_experts(given: Experts) -> list[Tensor]:
    """What `merged_experts` computes."""
    spec, dtype = parse_spec(given.spec_text), gemm_dtype(given.out_dtype, given.x.device)
    exact = spec.scale == "pow2"
    way = routing(given.groups, given.by_id, given.rows, given.experts)
    stack = Stack.of(given.weight, 1.0, given.experts)
    rank = given.a[0].shape[0] // given.experts if given.a else 0
    in_kernel = generated(given.x, spec, rank, stack.code.shape[1:], given.out_dtype)
    in_fp8 = takes_fp8(given.x, stack, given.out_dtype) and spec.kernel != "triton"
    cast = cast_fp8(given.x, E4M3, spec, dtype, keep=given.keep_x or in_fp8 or in_kernel)
    code_x = cast.code if in_kernel else None
    by_cpu = experts_cpu.takes(cast.value, dtype, spec)
    value = cast.value if in_kernel or by_cpu else way.taken(cast.value)
    of_x = None if exact or in_kernel else way.taken(cast.scale)

    def product(code: Tensor, scale: Tensor, term: Low | None = None) -> Tensor:
        """value · dq(code)ᵀ of each expert; on a CPU with the term that is added."""
        if by_cpu:
            return experts_cpu.product(value, way, given.products, code, scale, term)
        if code_x is not None:
            parts = code_x, cast.scale, way, Stack.of(code, 1.0, given.experts), scale, dtype, None
            return grouped_kernels.product(*parts, skinny=True)
        stack = Stack.of(code, scale if exact else 1.0, given.experts)
        y = times(value, stack, way.offs, turned=False)
        if of_x is None:
            return y
        return (y.to(torch.float32) * of_x * by_row(scale, way, len(y))).to(dtype)

    out_a = value.new_empty((given.products, 0))
    low: list[Low] = []
    for code, scale, b in zip(given.a, given.a_scale, given.b, strict=True):
        out_a = product(code, scale)
        low = [Low(out_a, stacked_b(b.to(dtype), given.experts))]
    kept = [cast.code, cast.scale] if given.keep_x and cast.code is not None else []
    if code_x is not None and not in_fp8:
        operands = code_x, cast.scale, way, stack, given.scale, given.out_dtype
        y = grouped_kernels.product(*operands, low[0] if low else None)
        return [way.restored(y), out_a, *kept]
    if in_fp8 and cast.code is not None:
        rows = way.taken(cast.code), way.taken(cast.scale), stack, given.scale
        y = fp8_times(*rows, way.offs, spec.accumulation == "fast")
    else:
        y = product(given.weight, given.scale, low[0] if low else None)
    for term in [] if by_cpu else low:
        y = added(y, padded_mm(term.left, term.right.transpose(1, 2), way.offs))
    return [way.restored(y.to(given.out_dtype)), out_a, *kept]


def stacked_b(b: Tensor, experts: int) -> Tensor:
    """B_e [E, out, r] of lora_B [out, r * E], whose columns have the experts fastest."""
    # As the transpose of a matrix, which ATen copies in blocks.
    return b.reshape(-1, experts).t().contiguous().view(experts, b.shape[0], -1)


def by_row(scale: Tensor, way: Routing, count: int) -> Tensor:
    """The scales [E * m, 1] of the expert of each row, float32 [count, m]."""
    experts = way.offs.shape[0]
    return scale.view(experts, -1).index_select(0, way.experts(count))


@without_autocast
def lower_grad_x(
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
    """See `falqon_fx.ops.experts.merged_experts_grad_x`."""
    way = routing(groups, by_id, rows, experts)
    spec, dtype = parse_spec(spec_text), gemm_dtype(grad.dtype, grad.device)
    low: list[Low] = []
    for d_j, code, a_scale_j in zip(d, a, a_scale, strict=True):
        scaled = (d_j.to(torch.float32) * by_row(a_scale_j, way, d_j.shape[0])).to(dtype)
        low.append(Low(scaled, as_read(code)))
    shape = Stack.of(weight, 1.0, experts).code.shape
    if generated(grad, spec, d[0].shape[1] if d else 0, shape[1:], x_dtype):
        folded = way.sorted(grad).to(torch.float32) * by_row(scale, way, grad.shape[0])
        cast = cast_fp8(folded, spec.grad_dtype, spec, dtype, keep=True)
        assert cast.code is not None
        term = low[0] if low else None
        if term is not None:
            codes = Stack.of(term.right, 1.0, experts)
            term = Low(term.left, codes.decoded(dtype))
        wide = x_dtype if way.rows is None else torch.float32
        stack = Stack.of(weight, 1.0, experts)
        y = grouped_kernels.product(
            cast.code, cast.scale, way, stack, None, wide, term, backward=True
        )
        return way.added_up(y, n).to(x_dtype)
    if experts_cpu.takes(grad, dtype, spec):
        operands = as_read(weight), scale, low[0] if low else None
        made = experts_cpu.grad_x(way.sorted(grad), n, way, *operands, spec, x_dtype)
        if made is not None:
            return made
    value, rest = cast_by_expert(way.sorted(grad), scale, way, spec, dtype)
    y = times(value, Stack.of(as_read(weight), 1.0, experts), way.offs, turned=True)
    total = y.to(torch.float32)
    if rest is not None:
        total = total * rest
    for term in low:
        total = added(
            total, times(term.left, Stack.of(term.right, 1.0, experts), way.offs, turned=True)
        )
    return way.added_up(total, n).to(x_dtype)


def cast_by_expert(
    grad: Tensor, scale: Tensor, way: Routing, spec: SiteSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """dL/dO ⊙ s_W,e of sorted rows [S, m], cast to FP8: its values in ``dtype``, and the scales
    [S, 1] that they lack, if any. Rows behind the last expert's are anything.
    """
    exact = spec.scale == "pow2"
    if grad.device.type != "cpu":
        folded = grad.to(torch.float32) * by_row(scale, way, len(grad))
        cast = cast_fp8(folded, spec.grad_dtype, spec, dtype)
        return cast.value, None if exact else cast.scale
    value = grad.new_zeros(grad.shape, dtype=dtype)
    rest = None if exact else grad.new_ones((len(grad), 1), dtype=torch.float32)
    ends = [0, *way.offs.tolist()]
    # An expert at a time, since a row's factors are its expert's: [S, m] of them would be read.
    for columns, *place in zip(scale.view(len(way.offs), 1, -1), ends, ends[1:], strict=False):
        rows = slice(*place)
        if place[0] < place[1]:
            cast = cast_fp8(
                grad[rows], spec.grad_dtype, spec, dtype, columns=columns, to=value[rows]
            )
            if rest is not None:
                rest[rows] = cast.scale
    return value, rest


@without_autocast
def lower_grads(
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
    """See `falqon_fx.ops.experts.merged_experts_grads`."""
    way = routing(groups, by_id, rows, experts)
    sizes = [grad.shape[1], *(code.shape[1] for code in kept[:1])]
    in_kernel = {a_dtype, b_dtype} <= {torch.float32, torch.bfloat16}
    if in_kernel and generated(grad, parse_spec(spec_text), out_a.shape[1], sizes):
        of_low = grouped_kernels.adapter_gradient
        grads = [of_low(out_a, way.sorted(grad), way, scaling, b_dtype, of_a=False)]
        for d_j, code, scale in [(*d, *kept)] if kept else []:
            scaled = (d_j.to(torch.float32) * way.taken(scale)).to(d_j.dtype)
            grads.append(of_low(scaled, as_operand(code), way, 1.0, a_dtype, of_a=True))
        return grads
    if experts_cpu.takes(grad, out_a.dtype, parse_spec(spec_text)):
        grads = [experts_cpu.grad_b(way.sorted(grad), out_a, way, scaling, b_dtype)]
        for d_j, code, scale in [(*d, *kept)] if kept else []:
            scaled = (d_j.to(torch.float32) * way.taken(scale)).to(d_j.dtype)
            grads.append(experts_cpu.grad_a(scaled, as_read(code), way, a_dtype))
        return grads
    of_b = grouped_outer(way.sorted(grad).to(out_a.dtype), out_a, way.offs).to(torch.float32)
    flat = (of_b * scaling).reshape(experts, -1).t().contiguous()  # as in `stacked_b`
    grads = [flat.view(grad.shape[1], -1).to(b_dtype)]
    for d_j, code, scale in [(*d, *kept)] if kept else []:
        value = decode(as_read(code), 1.0, d_j.dtype)
        scaled = (d_j.to(torch.float32) * way.taken(scale)).to(d_j.dtype)
        of_a = grouped_outer(scaled, way.taken(value), way.offs)
        grads.append(of_a.reshape(-1, code.shape[1]).to(a_dtype).contiguous())
    return grads


@without_autocast
def lower_grad_out_a(
    grad: Tensor,
    groups: Tensor,
    by_id: bool,
    experts: int,
    b: Tensor,
    dtype: torch.dtype,
    spec_text: str,
) -> Tensor:
    """See `falqon_fx.ops.experts.merged_experts_grad_out_a`."""
    way = routing(groups, by_id, (), experts)
    factor = stacked_b(b.to(dtype), experts)
    if generated(grad, parse_spec(spec_text), factor.shape[2], [grad.shape[1]], dtype):
        return grouped_kernels.grad_out_a(way.sorted(grad).to(dtype), factor, way)
    if experts_cpu.takes(grad, dtype, parse_spec(spec_text)):
        return experts_cpu.grad_out_a(way.sorted(grad).to(dtype), factor, way)
    return padded_mm(way.sorted(grad).to(dtype), factor, way.offs).contiguous()
