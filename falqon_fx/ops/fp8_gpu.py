"""What `falqon_fx.ops.fp8_adapter` computes, on a GPU: one FP8 product for O, and one for dL/dx.

As in `falqon_fx.ops.gpu` casts of x and dL/dO are ATen, which Inductor fuses into what made these;
the products, and what stands beside q(x) and g, are in `falqon_fx.ops.in_k`. Numbers are those of
a CPU, but that a product is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from falqon_fx import _compat
from falqon_fx.kernels.fixed import NONE_FIXED, Fixed
from falqon_fx.ops import fp8_adapter, in_k, products
from falqon_fx.ops.arguments import Merged, MergedGrad
from falqon_fx.ops.cast_errors import cast_errors
from falqon_fx.ops.gpu import by_launches, quantize
from falqon_fx.ops.lowering import gemm_dtype, stacked
from falqon_fx.site.casts import cast_fp8
from falqon_fx.site.numerics import (
    E4M3,
    FP8_MAX,
    amax_to_scale,
    as_operand,
    filled,
    without_autocast,
)
from falqon_fx.site.spec import parse_spec


@without_autocast
def proxy_update(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    spec_text: str,
    fixed: Fixed = NONE_FIXED,
) -> list[Tensor]:
    """See `falqon_fx.ops.fp8_adapter.proxy_update`; α leaves room for every b."""

    def cast(a: list[Tensor], b: list[Tensor], own: list[int]) -> list[Tensor]:
        given = a, b, [scaling[j] for j in own], [base_scale[j] for j in own], fixed.of(own)
        return in_k.adapter_casts(*given, partial(_plain_casts, *given, spec_text), spec_text)

    return by_launches(lora_a, lora_b, cast)


def _plain_casts(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    fixed: Fixed,
    spec_text: str,
) -> list[Tensor]:
    casts: list[Tensor] = []
    for j, s in enumerate(base_scale):
        own = fixed.of([j])
        rank = own.rank(len(lora_a[j]))
        a = stacked(lora_a[j], own.error_a, 0, rank)
        code, scale = cast_fp8(a.to(torch.float32), E4M3, spec_text)
        values = code.to(torch.float32) * scale
        b = stacked(lora_b[j].to(torch.float32) * scaling[j], own.error_b, 1, rank)
        scaled, alpha = fp8_adapter.to_range(values, b, s)
        whole = torch.cat([scaled, *(part.to(torch.float32) / s for part in own.columns)], dim=1)
        most = FP8_MAX[E4M3]
        of_b = filled(whole.clamp(-most, most).to(E4M3))  # as kernels store it
        casts += [code, scale, of_b.narrow(1, 0, whole.shape[1]), alpha]
    return casts


@without_autocast
def merged_linear(given: Merged) -> list[Tensor]:
    """See `falqon_fx.ops.fp8_adapter.merged_linear`. x̂ is kept as it is multiplied: E4M3 and its
    scale.
    """
    x, spec_text = given.x, given.spec_text
    q, q_scale = quantize(x.reshape(-1, x.shape[-1]), E4M3, spec_text)
    own = [quantize(x_j.reshape(-1, x_j.shape[-1]), E4M3, spec_text) for x_j in given.adapter_x]
    *ys, out_a, wide = products.call(
        in_k.merged_product_in_k,
        q,
        q_scale,
        [code for code, _ in own],
        [scale for _, scale in own],
        [as_operand(w) for w in given.weight],
        given.scale,
        given.bias,
        [as_operand(code) for code in given.a],
        given.a_scale,
        given.b,
        given.alpha,
        counts(given.clamped, len(given.weight), x),
        [*cast_errors(given, q_scale, torch.float32).values()],
        given.owner,
        given.joined,
        given.out_dtype,
        spec_text,
    )
    # Not `reshape`: below autograd that makes a view, which may not be written in place later.
    ys = [torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in ys]
    if not given.keep_x:
        return [*ys, out_a]
    # In a graph q(x) stands where the products read it alone.
    kept = wide.narrow(1, 0, q.shape[1]) if _compat.is_fake(wide) else q
    return [*ys, out_a, *(part for cast in own or [(kept, q_scale)] for part in cast)]


def counts(given: Sequence[Tensor], sites: int, like: Tensor) -> Sequence[Tensor]:
    """Where each site counts what is clamped; an op that was given no counts, but a CPU's B, counts
    for nobody.
    """
    if given and given[0].dtype == torch.int32:
        return given
    nobody = like.new_zeros(1, dtype=torch.int32)
    return [nobody] * sites


@without_autocast
def merged_linear_grad(given: MergedGrad) -> list[Tensor]:
    """See `falqon_fx.ops.fp8_grad.merged_linear_grad`."""
    spec, first, x_dtype = parse_spec(given.spec_text), given.grad[0], given.x_dtype
    fp8, dtype = spec.grad_dtype, gemm_dtype(first.dtype, first.device)
    of_rows = [s.reshape(1, -1) for s in given.scale]
    wide = [g.to(torch.float32) * s for g, s in zip(given.grad, of_rows, strict=True)]
    each = [g.abs().amax(dim=1, keepdim=True) for g in wide]
    amax = reduce(torch.maximum, each)
    if not spec.per_row:
        amax = torch.nn.functional.pad(amax, (0, 0, 0, 1)).amax()  # zero where there are no tokens
    s_g = amax_to_scale(amax, fp8, spec.scale) * fp8_adapter.ROOM_G[fp8]
    if _compat.is_fake(s_g):
        # Inductor computes at once what has strides of its own. Else it would take each code for
        # too long an expression of dL/dO, and store g as float32 in between.
        s_g = s_g.as_strided(s_g.shape, s_g.stride())
    most = FP8_MAX[fp8]
    codes = [(g / s_g).clamp(-most, most).to(fp8) for g in wide]
    # A product that is rounded to bfloat16 on its way is not for a float32 dL/dO.
    rounds_twice = x_dtype == torch.bfloat16 and dtype != torch.bfloat16
    of_x, d = products.call(
        in_k.grad_product_in_k,
        codes,
        s_g,
        [as_operand(w) for w in given.weight],
        [as_operand(code) for code in given.a],
        given.a_scale,
        given.b,
        given.alpha,
        counts(given.counted, len(given.weight), first),
        given.owner,
        given.through_x,
        given.needs_x,
        given.turned,
        torch.float32 if rounds_twice else x_dtype,
        dtype,
        given.spec_text,
    )
    return [of_x.to(x_dtype), d]
