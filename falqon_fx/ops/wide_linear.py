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
# Rows of W that are float32 at once. An output head has 50,000 and more: widened whole, W and its
# logits take hundreds of megabytes, and a third of the time goes into getting their memory.
ROWS = 1024


@torch.library.custom_op("falqon::wide_linear", mutates_args=())
@without_autocast
def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] · Wᵀ + bias [..., out] in x's dtype, computed and added up in float32: as a
    product in bfloat16 is, but for the order of the sum. W [out, in] and bias are frozen.
    """
    wide, result = x.to(WIDE), x.new_empty((*x.shape[:-1], weight.shape[0]))
    for first in range(0, weight.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        of_rows = None if bias is None else bias[rows].to(WIDE)
        result[..., rows] = F.linear(wide, weight[rows].to(WIDE), of_rows)
    return result


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
    return wide_linear_grad_x(grad, weight), None, None


@torch.library.custom_op("falqon::wide_linear_grad_x", mutates_args=())
@without_autocast
def wide_linear_grad_x(grad: Tensor, weight: Tensor) -> Tensor:
    """dL/dx [..., in] = dL/dO · W in dL/dO's dtype, computed and added up in float32."""
    flat = grad.reshape(-1, grad.shape[-1])
    total = flat.new_zeros((flat.shape[0], weight.shape[1]), dtype=WIDE)
    for first in range(0, weight.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        total.addmm_(flat[:, rows].to(WIDE), weight[rows].to(WIDE))
    return total.to(grad.dtype).reshape(*grad.shape[:-1], weight.shape[1])


@wide_linear_grad_x.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _backward_again(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (weight,) = ctx.saved_tensors
    return wide_linear(grad, weight, None), None  # dL/dx is linear in dL/dO


wide_linear_grad_x.register_autograd(
    _backward_again, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1])
)
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
