"""What stays out of FP8, multiplied in float32 on a CPU that has no products in bfloat16: frozen
layers and attention.

There torch multiplies bfloat16 twenty times as slowly as float32, so that the output head alone
takes longer than all sites. The numbers are those of bfloat16 up to the order of sums, since both
add up in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from falqon_fx.site.numerics import without_autocast

WIDE = torch.float32


@torch.library.custom_op("falqon::wide_linear", mutates_args=())
@without_autocast
def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] · Wᵀ + bias [..., out] in x's dtype, computed and added up in float32: as a
    product in bfloat16 is, but for the order of the sum. W [out, in] and bias are frozen.
    """
    of_bias = None if bias is None else bias.to(WIDE)
    return F.linear(x.to(WIDE), weight.to(WIDE), of_bias).to(x.dtype)


@wide_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _ = inputs
    ctx.save_for_backward(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    (weight,) = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return None, None, None
    return (grad.to(WIDE) @ weight.to(WIDE)).to(grad.dtype), None, None


wide_linear.register_autograd(_backward, setup_context=_save)
OP = torch.ops.falqon.wide_linear.default


def wide_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention` of bfloat16 tensors, computed in float32."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(WIDE)
    q, k, v = (t.to(WIDE) for t in (query, key, value))
    result = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **options)
    return result.to(query.dtype)
