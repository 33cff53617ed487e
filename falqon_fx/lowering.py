"""What the ``falqon::`` ops compute, written once as compositions of ATen ops.

The same functions run as the eager kernels and as the decompositions that Inductor traces below
autograd, where the casts fuse into whatever made x or dL/dO.

Shapes: x [n, in], W' = [W; A] [out + r, in] (E4M3, or its bytes), scale [] or [out + r, 1] float32,
applied and lora_b [out, r], dL/dO [n, out].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from falqon_fx.numerics import (
    E4M3,
    amax_to_scale,
    decode_fp8,
    round_to_fp8,
    round_to_scaled_fp8,
    without_autocast,
)
from falqon_fx.spec import SiteSpec, parse_spec


def scale_of(x: Tensor, dtype: torch.dtype, spec: SiteSpec) -> Tensor:
    """The scale of each row of ``x`` [n, k], float32 [n, 1], or of all of it, []."""
    amax = x.abs().amax(dim=1, keepdim=True)
    if not spec.per_row:
        # The padded zero is the amax of no tokens at all.
        amax = F.pad(amax, (0, 0, 0, 1)).amax()
    return amax_to_scale(amax, dtype, spec.scale)


def quantize(x: Tensor, dtype: torch.dtype, spec: SiteSpec) -> tuple[Tensor, Tensor | float]:
    """``x ≈ value * rest``: ``x`` [n, k] cast to FP8 with one scale a row, or one in all; ``value``
    is float32.

    A scale that is a power of two is already in ``value``, which bfloat16 still holds exactly.
    Others are left in ``rest``, [n, 1] or [], for the GEMM's result.
    """
    # The amax of x as it is: were x widened first, Inductor would keep a wide copy of a costly x.
    scale, wide = scale_of(x, dtype, spec), x.to(torch.float32)
    if spec.scale == "pow2":
        return round_to_scaled_fp8(wide, scale, dtype), 1.0
    return round_to_fp8(wide * scale.reciprocal(), dtype), scale


def gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 for bfloat16 results, else float32 (a raw FP8 sum overflows float16)."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def pending_part(lora_b: Tensor, applied: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """``scaling * (B - applied)``, the part of B that W' does not contain, [out, r]."""
    return ((lora_b.to(torch.float32) - applied.to(torch.float32)) * scaling).to(dtype)


def empty_output(
    like: Tensor, tokens: Sequence[int], out: int, rank: int, dtype: torch.dtype, spec: str
) -> Tensor:
    """An O [*tokens, out] without values, in memory as the spec says."""
    if parse_spec(spec).output == "strided":
        return like.new_empty((*tokens, out + rank), dtype=dtype)[..., :out]
    return like.new_empty((*tokens, out), dtype=dtype)


@without_autocast
def merged_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    applied: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    bias: Sequence[Tensor],
    scaling: Sequence[float],
    out_dtype: torch.dtype,
    spec: str,
) -> list[Tensor]:
    """[O_i | O_A,i] = q(x) · W'_iᵀ (paper section 2) for the sites i that read x: each
    O_i [..., out_i] in ``out_dtype``, then the O_A of all of them side by side, [n, Σ r_i].

    With pending="apply", O_i += scaling_i · O_A,i · (B_i - applied_i)ᵀ. ``bias`` has one entry a
    site, or none.
    """
    plan = parse_spec(spec)
    outs, ranks = [a.shape[0] for a in applied], [a.shape[1] for a in applied]
    dtype = gemm_dtype(out_dtype)
    q, rest = quantize(x.reshape(-1, x.shape[-1]), E4M3, plan)
    q = q.to(dtype)
    exact = plan.scale == "pow2"
    values = [decode_fp8(w, s if exact else 1.0, dtype) for w, s in zip(weight, scale)]
    # O_A in a buffer of its own: a view of [O | O_A] kept for backward would keep all of it alive.
    out_a = q @ _stack([v[out:] for v, out in zip(values, outs)]).t()
    rows = [(s[:out], s[out:]) if plan.per_row else (s, s) for s, out in zip(scale, outs)]
    if not exact:
        parts = out_a.split(ranks, dim=1)
        out_a = torch.cat([_rescale(o, rest, of_a) for o, (_, of_a) in zip(parts, rows)], dim=1)
    ys = []
    for i, (w, o) in enumerate(zip(values, out_a.split(ranks, dim=1))):
        y = q @ w[: outs[i]].t()
        if not exact:
            y = _rescale(y, rest, rows[i][0])
        if plan.pending == "apply":
            y = torch.addmm(y, o, pending_part(lora_b[i], applied[i], scaling[i], dtype).t())
        if bias:
            y = y + bias[i].to(dtype)
        if plan.output == "strided":
            y = empty_output(y, y.shape[:1], outs[i], ranks[i], out_dtype, spec).copy_(y)
        # Not `reshape`: below autograd that makes a view, which may not be written in place later.
        shaped = torch.ops.aten._unsafe_view(y.to(out_dtype), (*x.shape[:-1], outs[i]))
        ys.append(shaped)
    return [*ys, out_a]


def _stack(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim)


def _rescale(y: Tensor, rest: Tensor | float, scale: Tensor) -> Tensor:
    """Multiply a GEMM's result by the scales that its operands lack, in float32."""
    return (y.to(torch.float32) * rest * (scale.t() if scale.dim() == 2 else scale)).to(y.dtype)


@without_autocast
def merged_linear_grad_x(
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    applied: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    x_dtype: torch.dtype,
    spec: str,
) -> Tensor:
    """dL/dx = Σ_i q(dL/dO_i · diag(s_W,i)) · W_i[:out_i] (paper section 2), [n, in] in ``x_dtype``.

    The row scales of W belong to the dimension that is summed over, so they go into dL/dO before
    its cast. With pending="apply", dL/dx += (scaling_i · dL/dO_i · (B_i - applied_i)) · dq(A_i): r
    columns that are too few to gain from FP8.
    """
    plan = parse_spec(spec)
    dtype = gemm_dtype(grad[0].dtype)
    exact = plan.scale == "pow2"
    left: list[Tensor] = []
    right: list[Tensor] = []
    products: list[Tensor] = []
    for g, w, s, a, b, factor in zip(grad, weight, scale, applied, lora_b, scaling):
        out = a.shape[0]
        # Row scales of W go into dL/dO before its cast; one scale for all, into W or behind.
        wide = g.to(torch.float32)
        q, rest = quantize(wide * s[:out].t() if plan.per_row else wide, plan.grad_dtype, plan)
        values = decode_fp8(w, s if exact and not plan.per_row else 1.0, dtype)
        if exact:
            left.append(q.to(dtype))
        else:
            product = (q.to(dtype) @ values[:out]).to(torch.float32) * rest
            products.append(product if plan.per_row else product * s)
            values = values[out:]
        if plan.pending == "apply":
            tail = g.to(dtype) @ pending_part(b, a, factor, dtype)
            if plan.per_row or not exact:  # values[out:] lacks the scales of A
                tail = _rescale(tail, 1.0, s[out:] if plan.per_row else s)
            left.append(tail)
            right.append(values)
        elif exact:
            right.append(values[:out])
    if left:  # as one GEMM: it adds up in float32, and nothing is written in between
        products.append(_stack(left, dim=1) @ _stack(right))
    if len(products) == 1:
        return products[0].to(x_dtype)
    return functools.reduce(torch.add, [p.to(torch.float32) for p in products]).to(x_dtype)


def dequantize_base(weight: Tensor, scale: Tensor, applied: Tensor, scaling: float) -> Tensor:
    """dq(W) - scaling · applied · dq(A), float32 [out, in]: the base weight without its adapter."""
    out, _ = applied.shape
    merged = decode_fp8(weight, scale, torch.float32)
    return merged[:out] - (applied.to(torch.float32) * scaling) @ merged[out:]


@without_autocast
def base_linear(
    x: Tensor, weight: Tensor, scale: Tensor, applied: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """x · (dq(W) - scaling · applied · dq(A))ᵀ + bias in x's dtype: a prepared base layer alone."""
    base = dequantize_base(weight, scale, applied, scaling).to(x.dtype)
    return F.linear(x, base, None if bias is None else bias.to(x.dtype))
