"""The ops of update="rows": ``falqon::proxy_update_``, and the layer that `prepare`
makes for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from falqon_fx.rows import cuda, update
from falqon_fx.site.numerics import decode_fp8, without_autocast


@torch.library.custom_op(
    "falqon::proxy_update_", mutates_args=("weight", "scale", "applied", "counters", "writes")
)
def proxy_update_(
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    applied: Sequence[Tensor],
    counters: Sequence[Tensor],
    writes: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    base: Sequence[Tensor | None],
    scaling: Sequence[float],
    spec_text: str,
) -> None:
    """Write the steps of B into W' for all sites of a graph, once per change of B.

    See `falqon_fx.rows.update.proxy_update_`. ``base`` holds the base weights, None where prepare()
    freed them.
    """
    columns = weight, scale, applied, counters, writes, lora_b, lora_a, base, scaling
    with update.lock:  # or another thread would find fingerprints whose rows are not written yet
        on_gpu = bool(weight) and weight[0].device.type == "cuda"
        run = cuda.proxy_update_ if on_gpu else update.proxy_update_
        run(columns, spec_text)


@proxy_update_.register_fake
def _(*_: Any) -> None:
    return None


def dequantize_base(weight: Tensor, scale: Tensor, applied: Tensor, scaling: float) -> Tensor:
    """dq(W) - scaling · applied · dq(A), float32 [out, in]: the base weight without its adapter."""
    out, _ = applied.shape
    merged = decode_fp8(weight, scale, torch.float32)
    return merged[:out] - (applied.to(torch.float32) * scaling) @ merged[out:]


@torch.library.custom_op("falqon::pending", mutates_args=())
def pending(lora_b: Tensor, applied: Tensor, scaling: float, wide: bool) -> Tensor:
    """``scaling * (B - applied)`` [out, r], the part of B that W' does not contain, in bfloat16 or
    float32 where ``wide``.
    """
    return pending_part(lora_b, applied, scaling, wide)


def pending_part(lora_b: Tensor, applied: Tensor, scaling: float, wide: bool) -> Tensor:
    """See `pending`; as a composition of ATen ops."""
    rest = (lora_b.detach().to(torch.float32) - applied.to(torch.float32)) * scaling
    return rest if wide else rest.to(torch.bfloat16)


@pending.register_fake
def _(lora_b: Tensor, applied: Tensor, scaling: float, wide: bool) -> Tensor:
    return lora_b.new_empty(lora_b.shape, dtype=torch.float32 if wide else torch.bfloat16)


def _constant(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _no_gradient(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    return None, None, None, None


pending.register_autograd(_no_gradient, setup_context=_constant)


@torch.library.custom_op("falqon::rows_base_linear", mutates_args=())
def rows_base_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    applied: Tensor,
    counters: Tensor,
    writes: Tensor,
    bias: Tensor | None,
    scaling: float,
    spec_text: str,
) -> Tensor:
    """The base layer of a prepared site alone: x · (dq(W) - scaling · applied · dq(A))ᵀ + bias.

    ``counters``, ``writes`` and ``spec`` are not read: with them the site's whole state is in the
    graph, where the passes find it.
    """
    base = dequantize_base(weight, scale, applied, scaling).to(x.dtype)
    return F.linear(x, base, None if bias is None else bias.to(x.dtype))


@rows_base_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, applied: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], applied.shape[0]))


def _save_base(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, applied, _, _, bias, scaling, _ = inputs
    ctx.save_for_backward(weight, scale, applied)
    ctx.bias_dtype, ctx.scaling = None if bias is None else bias.dtype, scaling


@without_autocast
def _backward_base(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, applied = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        base = dequantize_base(weight, scale, applied, ctx.scaling)
        grad_x = grad @ base.to(grad.dtype)
    if ctx.needs_input_grad[6]:
        flat = grad.reshape(-1, grad.shape[-1])
        grad_bias = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, None, grad_bias, None, None


rows_base_linear.register_autograd(_backward_base, setup_context=_save_base)

BASE_LINEAR = torch.ops.falqon.rows_base_linear
