"""``falqon::base_linear``, ``falqon::dequantize``, ``falqon::stacked_weight``: the layers and the
stacks of weights that `falqon_fx.prepare` makes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from falqon_fx.ops import lowering
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.site.base import Base, bases
from falqon_fx.site.numerics import INT8, as_scale, without_autocast
from falqon_fx.site.nvfp4 import shape_of


@torch.library.custom_op("falqon::base_linear", mutates_args=())
def base_linear(
    x: Tensor,
    code: Tensor,
    scale: Tensor,
    digest: Tensor,
    bias: Tensor | None,
    spec_text: str,
    error_a: Tensor | None = None,
    error_b: Tensor | None = None,
    channels: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """The layer that `prepare` makes: x · dq(W)ᵀ + (x · A_cᵀ) · B_cᵀ + bias, in x's dtype, and in
    INT8 x_S · W_Sᵀ in place of the channels S.

    ``code`` uint8 [out, in], the bytes of W in E4M3, or int8; ``scale`` int32 [out, 1] or [1], the
    bits of its float32 scales; ``digest`` uint8 [8] their hash. ``spec`` says what they were made
    with, for the passes, which find all of it in the graph.

    ``error_a`` A_c [r, in] and ``error_b`` B_c [out, r], where there are any, stand for the cast
    error of W. With ``channels`` S int32 [c] and ``columns`` W_S [out, c] compiled code adds what
    the cast of x loses (see `falqon_fx.ops.cast_errors`); here x is not cast.
    """
    bases.verify("a prepared layer", Base(code, as_scale(scale)), digest)
    return _product(x, code, scale, bias, _Terms(error_a, error_b, channels, columns))


def with_columns(
    weight: Tensor, code: Tensor, channels: Tensor | None, columns: Tensor | None
) -> Tensor:
    """dq(W) [out, in], in INT8 with W_S [out, c] in the channels S that its cast leaves out. What
    FP8's rounding did to W_S other channels make up for.
    """
    if channels is None or columns is None or code.dtype != INT8:
        return weight
    return weight.index_copy(1, channels.long(), columns.detach().to(weight.dtype))


class _Terms(NamedTuple):
    """What a calibration has added."""

    error_a: Tensor | None
    error_b: Tensor | None
    channels: Tensor | None
    columns: Tensor | None

    def weight(self, code: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """dq(W), in INT8 with W_S."""
        weight = lowering.dequantize(code, scale, dtype)
        return with_columns(weight, code, self.channels, self.columns)

    def error(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A_c and B_c."""
        if self.error_a is None or self.error_b is None:
            return None
        return self.error_a.to(dtype), self.error_b.to(dtype)


@without_autocast
def _product(
    x: Tensor,
    code: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    terms: _Terms,
) -> Tensor:
    wide = _plain_dtype(x)
    of_bias = None if bias is None else bias.to(wide)
    y = F.linear(x.to(wide), terms.weight(code, scale, wide), of_bias)
    if error := terms.error(wide):
        y = y + (x.to(wide) @ error[0].t()) @ error[1].t()
    return y.to(x.dtype)


def _plain_dtype(x: Tensor) -> torch.dtype:
    """What a plain product with x is computed in: x's dtype, but for bfloat16 on a CPU that
    can't.
    """
    return gemm_dtype(x.dtype, x.device) if x.dtype == torch.bfloat16 else x.dtype


@base_linear.register_fake
def _(x: Tensor, code: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], code.shape[0]))


def _save_base(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, code, scale, _, bias, _, *terms = inputs
    ctx.save_for_backward(code, scale, *terms)
    ctx.bias_dtype = None if bias is None else bias.dtype


@without_autocast
def _backward_base(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    code, scale, *terms = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _grad_x(grad, code, scale, _Terms(*terms))
    if ctx.needs_input_grad[4]:
        flat = grad.reshape(-1, grad.shape[-1])
        grad_bias = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None, None, None


def _grad_x(grad: Tensor, code: Tensor, scale: Tensor, terms: _Terms) -> Tensor:
    """dL/dx = dL/dO · dq(W) + (dL/dO · B_c) · A_c, in INT8 with W_S in dq(W)'s channels S."""
    wide = _plain_dtype(grad)
    result = grad.to(wide) @ terms.weight(code, scale, wide)
    if error := terms.error(wide):
        result = result + (grad.to(wide) @ error[1]) @ error[0]
    return result.to(grad.dtype)


base_linear.register_autograd(_backward_base, setup_context=_save_base)


@torch.library.custom_op("falqon::dequantize", mutates_args=())
def dequantize(code: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """dq(W) [out, in] of a prepared layer, where code reads its ``weight``; see `base_linear`."""
    return lowering.dequantize(code, scale, dtype)


@dequantize.register_fake
def _(code: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return code.new_empty(shape_of(code), dtype=dtype)


@torch.library.custom_op("falqon::stacked_weight", mutates_args=())
def stacked_weight(
    code: Tensor,
    scale: Tensor,
    digest: Tensor,
    experts: int,
    transposed: bool,
    dtype: torch.dtype,
    spec_text: str,
) -> Tensor:
    """dq(W) [experts, out, in], or [experts, in, out] where ``transposed``, of a prepared stack
    [experts * out, in]; see `base_linear`. Grouped products with it are multiplied in FP8.
    """
    bases.verify("a prepared stack of experts", Base(code, as_scale(scale)), digest)
    weight = lowering.dequantize(code, scale, dtype).view(experts, -1, code.shape[1])
    return weight.transpose(1, 2).contiguous() if transposed else weight


@stacked_weight.register_fake
def _(
    code: Tensor,
    scale: Tensor,
    digest: Tensor,
    experts: int,
    transposed: bool,
    dtype: torch.dtype,
    spec_text: str,
) -> Tensor:
    out, features = code.shape[0] // experts, code.shape[1]
    shape = (experts, features, out) if transposed else (experts, out, features)
    return code.new_empty(shape, dtype=dtype)


STACK = torch.ops.falqon.stacked_weight
OP = torch.ops.falqon.base_linear
