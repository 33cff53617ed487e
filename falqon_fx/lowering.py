"""What the ``falqon::`` ops compute, written once as compositions of ATen ops.

The same functions run as the eager kernels and as the decompositions that Inductor traces below
autograd, where the casts fuse into whatever made x or dL/dO.

Shapes: x [n, in], W' = [W; A] [out + r, in] (E4M3, or its bytes), scale [] or [out + r, 1] float32,
applied and lora_b [out, r], dL/dO [n, out].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from falqon_fx.numerics import (
    E4M3,
    amax_to_scale,
    decode_fp8,
    round_to_fp8,
    round_to_scaled_fp8,
)
from falqon_fx.spec import SiteSpec, parse_spec


def quantize(x: Tensor, dtype: torch.dtype, spec: SiteSpec) -> tuple[Tensor, Tensor | float]:
    """``x ≈ value * rest``: float32 ``x`` [n, k] cast to FP8 with one scale a row, or one in all.

    A scale that is a power of two is already in ``value``, which bfloat16 still holds exactly.
    Others are left in ``rest``, [n, 1] or [], for the GEMM's result.
    """
    amax = x.abs().amax(dim=1, keepdim=True)
    if not spec.per_row:
        # The padded zero is the amax of no tokens at all.
        amax = F.pad(amax, (0, 0, 0, 1)).amax()
    scale = amax_to_scale(amax, dtype, spec.scale)
    if spec.scale == "pow2":
        return round_to_scaled_fp8(x, scale, dtype), 1.0
    return round_to_fp8(x * scale.reciprocal(), dtype), scale


def gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 for bfloat16 results, else float32 (a raw FP8 sum overflows float16)."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def pending_part(lora_b: Tensor, applied: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """``scaling * (B - applied)``, the part of B that W' does not contain, [out, r]."""
    return ((lora_b.to(torch.float32) - applied.to(torch.float32)) * scaling).to(dtype)


def merged_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    applied: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    out_dtype: torch.dtype,
    spec: str,
) -> tuple[Tensor, Tensor]:
    """[O | O_A] = q(x) · W'ᵀ (paper section 2); O [..., out] in ``out_dtype``, O_A [n, r].

    With pending="apply", O += scaling · O_A · (B - applied)ᵀ.
    """
    plan = parse_spec(spec)
    out, rank = applied.shape
    dtype = gemm_dtype(out_dtype)
    q, rest = quantize(x.reshape(-1, x.shape[-1]).to(torch.float32), E4M3, plan)
    exact = plan.scale == "pow2"
    values = decode_fp8(weight, scale if exact else 1.0, dtype)
    # Two GEMMs, so that O and O_A lie in their own buffers: a view of [O | O_A] kept for backward
    # would keep all of it alive.
    y, out_a = q.to(dtype) @ values[:out].t(), q.to(dtype) @ values[out:].t()
    if not exact:
        w_scale, a_scale = (scale[:out].t(), scale[out:].t()) if plan.per_row else (scale, scale)
        y = (y.to(torch.float32) * rest * w_scale).to(dtype)
        out_a = (out_a.to(torch.float32) * rest * a_scale).to(dtype)
    if plan.pending == "apply":
        y = torch.addmm(y, out_a, pending_part(lora_b, applied, scaling, dtype).t())
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(out_dtype).reshape(*x.shape[:-1], out), out_a


def merged_linear_grad_x(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    applied: Tensor,
    lora_b: Tensor,
    scaling: float,
    x_dtype: torch.dtype,
    spec: str,
) -> Tensor:
    """dL/dx = q(dL/dO · diag(s_W)) · W[:out] (paper section 2), [n, in] in ``x_dtype``.

    The row scales of W belong to the dimension that is summed over, so they go into dL/dO before
    its cast. With pending="apply", dL/dx += (scaling · dL/dO · (B - applied)) · dq(A): r columns
    that are too few to gain from FP8.
    """
    plan = parse_spec(spec)
    out, _ = applied.shape
    dtype = gemm_dtype(grad.dtype)
    wide = grad.to(torch.float32)
    if plan.per_row:
        wide = wide * scale[:out].t()
    q, rest = quantize(wide, plan.grad_dtype, plan)
    # Row scales of W are in q by now; one scale for all goes in or behind as in the forward pass.
    exact = plan.scale == "pow2"
    left: Tensor | float = 1.0 if plan.per_row else scale
    values = decode_fp8(weight, left if exact else 1.0, dtype)
    product = q.to(dtype) @ values[:out]
    if not exact:
        product = (product.to(torch.float32) * rest * left).to(dtype)
    if plan.pending == "apply":
        tail = grad.to(dtype) @ pending_part(lora_b, applied, scaling, dtype)
        if plan.per_row or not exact:  # values[out:] lacks the scales of A
            a_scale = scale[out:].t() if plan.per_row else scale
            tail = (tail.to(torch.float32) * a_scale).to(dtype)
        product = torch.addmm(product, tail, values[out:])
    return product.to(x_dtype)


def dequantize_base(weight: Tensor, scale: Tensor, applied: Tensor, scaling: float) -> Tensor:
    """dq(W) - scaling · applied · dq(A), float32 [out, in]: the base weight without its adapter."""
    out, _ = applied.shape
    merged = decode_fp8(weight, scale, torch.float32)
    return merged[:out] - (applied.to(torch.float32) * scaling) @ merged[out:]


def base_linear(
    x: Tensor, weight: Tensor, scale: Tensor, applied: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """x · (dq(W) - scaling · applied · dq(A))ᵀ + bias in x's dtype: a prepared base layer alone."""
    base = dequantize_base(weight, scale, applied, scaling).to(x.dtype)
    return F.linear(x, base, None if bias is None else bias.to(x.dtype))
