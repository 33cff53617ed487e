"""``torch.ops.falqon.*``: schema, fake implementation, autograd.

What the ops compute stands in `falqon_fx.lowering` and `falqon_fx.update`, and for GPUs in
`falqon_fx.cuda`. The ops are opaque in a graph, so that a person can read it; `decompositions`
opens them below autograd for Inductor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from falqon_fx import cuda, lowering, products, update
from falqon_fx._compat import inductor_decompositions
from falqon_fx.numerics import without_autocast
from falqon_fx.spec import lowering_version


@torch.library.custom_op("falqon::merged_linear", mutates_args=())
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
    """O_i [..., out_i] = x · dq(W_i)ᵀ + bias_i of each site i that reads x, then the O_A of all of
    them side by side, [n, Σ r_i] = x · dq(A_i)ᵀ; x and W'_i = [W_i; A_i] in FP8.

    See `falqon_fx.lowering.merged_linear`. ``bias`` has one entry a site, or none. Gradients reach
    x, lora_b and bias: dL/dB_i = scaling_i · (dL/dO_i)ᵀ · O_A,i (paper section 2).
    """
    codes = [_as_read(w) for w in weight]
    return lower_merged_linear(x, codes, scale, applied, lora_b, bias, scaling, out_dtype, spec)


def _as_read(weight: Tensor) -> Tensor:
    """W' as `decode_fp8` reads it fastest where nothing is compiled."""
    return weight.view(torch.uint8) if weight.device.type == "cpu" else weight


def lower_merged_linear(x: Tensor, *rest: Any) -> list[Tensor]:
    """`falqon_fx.lowering.merged_linear`, or its like for GPUs."""
    run = cuda.merged_linear if x.device.type == "cuda" else lowering.merged_linear
    return run(x, *rest)


def lower_grad_x(grad: Sequence[Tensor], *rest: Any) -> Tensor:
    """`falqon_fx.lowering.merged_linear_grad_x`, or its like for GPUs."""
    on_gpu = grad[0].device.type == "cuda"
    run = cuda.merged_linear_grad_x if on_gpu else lowering.merged_linear_grad_x
    return run(grad, *rest)


@merged_linear.register_fake
def _(
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
    tokens, rank = x.shape[:-1], sum(a.shape[1] for a in applied)
    shapes = [(a.shape[0], a.shape[1]) for a in applied]
    outputs = [lowering.empty_output(x, tokens, *shape, out_dtype, spec) for shape in shapes]
    out_a = x.new_empty((math.prod(tokens), rank), dtype=lowering.gemm_dtype(out_dtype))
    return [*outputs, out_a]


@torch.library.custom_op("falqon::merged_linear_grad_x", mutates_args=())
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
    """dL/dx [n, in] = Σ_i q(dL/dO_i) · dq(W_i[:out_i]), dL/dO_i [n, out_i] cast to FP8.

    See `falqon_fx.lowering.merged_linear_grad_x`.
    """
    codes = [_as_read(w) for w in weight]
    return lower_grad_x(grad, codes, scale, applied, lora_b, scaling, x_dtype, spec)


@merged_linear_grad_x.register_fake
def _(
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    applied: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    x_dtype: torch.dtype,
    spec: str,
) -> Tensor:
    return grad[0].new_empty((grad[0].shape[0], weight[0].shape[1]), dtype=x_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, scale, applied, lora_b, bias, scaling, _, spec = inputs
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1], *weight, *scale, *applied, *lora_b)
    ctx.x_dtype, ctx.x_shape = x.dtype, x.shape
    ctx.ranks = [a.shape[1] for a in applied]
    ctx.bias_dtypes = [b.dtype for b in bias]
    ctx.scaling, ctx.spec = scaling, spec


@without_autocast
def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    out_a, *state = ctx.saved_tensors
    sites = len(ctx.ranks)
    weight, scale, applied, lora_b = (state[i : i + sites] for i in range(0, 4 * sites, sites))
    flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads[:-1]]
    grad_x = None
    reached = [i for i, g in enumerate(flat) if g is not None]
    nothing: list[None] = [None] * sites
    grad_b: list[Tensor | None] = [*nothing]
    grad_bias: list[Tensor | None] = [None] * len(ctx.bias_dtypes)
    parts = out_a.split(ctx.ranks, dim=1)
    if reached and ctx.needs_input_grad[0]:
        columns = [flat, weight, scale, applied, lora_b, ctx.scaling, parts]
        *given, of_a = ([c[i] for i in reached] for c in columns)
        arguments: list[Any] = [*given, ctx.x_dtype, ctx.spec]
        every_b = all(ctx.needs_input_grad[4][i] for i in reached)
        if every_b and cuda.casts_with_grad_b(out_a.device, ctx.spec):
            grad_x, together = cuda.merged_linear_grads(of_a, *arguments)
            for i, b in zip(reached, together):
                grad_b[i] = b
        else:
            grad_x = merged_linear_grad_x(*arguments)
        grad_x = grad_x.reshape(ctx.x_shape)
    for i in reached:
        g = flat[i]
        assert g is not None
        if ctx.needs_input_grad[4][i] and grad_b[i] is None:
            on_gpu = g.device.type == "cuda"
            run = torch.ops.falqon.grad_b_product if on_gpu else products.plain_grad_b
            grad_b[i] = run(g, parts[i], ctx.scaling[i], lora_b[i].dtype, ctx.spec)
        if grad_bias and ctx.needs_input_grad[5][i]:
            grad_bias[i] = g.sum(0, dtype=torch.float32).to(ctx.bias_dtypes[i])
    return grad_x, nothing, nothing, nothing, grad_b, grad_bias, None, None, None


merged_linear.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("falqon::base_linear", mutates_args=())
def base_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    applied: Tensor,
    counters: Tensor,
    writes: Tensor,
    bias: Tensor | None,
    scaling: float,
    spec: str,
) -> Tensor:
    """The base layer of a prepared site alone: x · (dq(W) - scaling · applied · dq(A))ᵀ + bias.

    ``counters``, ``writes`` and ``spec`` are not read: with them the site's whole state is in the
    graph, where the passes find it.
    """
    return lowering.base_linear(x, weight, scale, applied, bias, scaling)


@base_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    applied: Tensor,
    counters: Tensor,
    writes: Tensor,
    bias: Tensor | None,
    scaling: float,
    spec: str,
) -> Tensor:
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
        base = lowering.dequantize_base(weight, scale, applied, ctx.scaling)
        grad_x = grad @ base.to(grad.dtype)
    if ctx.needs_input_grad[6]:
        flat = grad.reshape(-1, grad.shape[-1])
        grad_bias = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, None, grad_bias, None, None


base_linear.register_autograd(_backward_base, setup_context=_save_base)


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
    spec: str,
) -> None:
    """Write the steps of B into W' for all sites of a graph, once per change of B.

    See `falqon_fx.update.proxy_update_`. ``base`` holds the base weights, None where prepare()
    freed them.
    """
    on_gpu = bool(weight) and weight[0].device.type == "cuda"
    run = cuda.proxy_update_ if on_gpu else update.proxy_update_
    run(weight, scale, applied, counters, writes, lora_b, lora_a, base, scaling, spec)


@proxy_update_.register_fake
def _(
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    applied: Sequence[Tensor],
    counters: Sequence[Tensor],
    writes: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    base: Sequence[Tensor | None],
    scaling: Sequence[float],
    spec: str,
) -> None:
    return None


class Decompositions(dict[torch._ops.OpOverload, Callable[..., Any]]):
    """A decomposition table that stands in a disk cache's key as what made it.

    Inductor pickles the table into the key of its graph cache, and gives up caching where an entry
    can't be pickled.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return decompositions, (torch.__version__, lowering_version())


def decompositions(_torch: str = "", _lowering: str = "") -> Decompositions:
    """Inductor's decompositions and those that open the ``falqon::`` ops below autograd."""
    table = Decompositions(inductor_decompositions())
    table[torch.ops.falqon.merged_linear.default] = lower_merged_linear
    table[torch.ops.falqon.merged_linear_grad_x.default] = lower_grad_x
    return table
