"""``torch.ops.falqon.*``: schema, fake implementation, autograd.

What the ops compute stands in `falqon_fx.ops.lowering`, and for GPUs in `falqon_fx.ops.gpu`. The
ops are opaque in a graph, so that a person can read it; `falqon_fx.ops.decompositions` opens them
below autograd for Inductor. Those of update="rows" stand in `falqon_fx.rows.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError
from falqon_fx.kernels.spec import aligned
from falqon_fx.ops import adapter_casts, fp8_adapter, fp8_gpu, fp8_grad, gpu, lowering
from falqon_fx.ops.adapter_grads import Batch, OutAGrads, lower_adapter_grads, lower_grad_out_a
from falqon_fx.ops.arguments import Merged
from falqon_fx.ops.cast_errors import KeptErrors, kept_errors, receivers
from falqon_fx.ops.grad_x import merged_linear_grad_x
from falqon_fx.ops.once import once
from falqon_fx.site.numerics import without_autocast
from falqon_fx.site.spec import parse_spec


@torch.library.custom_op("falqon::merged_linear", mutates_args=())
def merged_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    b: Sequence[Tensor],
    alpha: Sequence[Tensor],
    clamped: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    adapter_x: Sequence[Tensor],
    owner: Sequence[int],
    scaling: Sequence[float],
    keep_x: bool,
    turned: Sequence[Tensor],
    joined: Sequence[Tensor],
    channels: Sequence[Tensor],
    out_dtype: torch.dtype,
    spec_text: str,
) -> list[Tensor]:
    """O_i [..., out_i] = x · dq(W_i)ᵀ + Σ_j O_A,j · b_jᵀ + bias_i of the sites i that read x, over
    the adapters j with ``owner[j] == i``; then O_A,j = x_j · dq(Â_j)ᵀ of all adapters side by side,
    [n, Σ r_j]; then, where ``keep_x``, the casts of what the adapters read, with their scales, and
    in INT8 what these lack in some channels (`falqon_fx.ops.cast_errors`).

    x, W_i and Â_j are multiplied in FP8 or INT8. ``weight``, ``scale`` and ``bias`` have one entry
    per site (bias may have none), as ``clamped`` may, to which a GPU adds how much of adapters in
    FP8 is clamped; ``a``, ``a_scale``, ``b``, ``alpha`` (see `proxy_update`; the last two may have
    none), ``lora_a``, ``lora_b``, ``owner`` and ``scaling`` one per adapter; ``adapter_x``, what
    each adapter reads where that is not x (dropout), one per adapter or none. ``turned`` has the
    W_iᵀ side by side, each from a multiple of 16 columns on, where they are kept for a GPU's dL/dx,
    or nothing; and with adapters in FP8 that read x room for the Â_jᵀ behind them. ``joined`` has
    the W_i of the sites with adapters one below the other, with room behind for the b_j, where they
    are kept so, or nothing: the room is written, of which a graph is told as it is lowered.

    What a calibration has made is part of an adapter (see `proxy_update`): Â_j and b_j may have
    more rows and columns than lora_a and lora_b, without gradients. Where b_j is wider than Â_j is
    high, its last columns W_S bring the cast error of x to O_i, (x - dq(q(x)))_S · W_Sᵀ, in the
    channels S: ``channels`` has them, int32 [c], of each such adapter in turn. INT8 has zeros in S,
    and O_A,j and dL/dA_j get x_S, too.

    Gradients reach x, adapter_x, lora_a, lora_b and bias. With D_j = dL/dO · scaling_j · B_j:

        dL/dB_j = scaling_j · (dL/dO)ᵀ · O_A,j      dL/dA_j = D_jᵀ · x̂_j
        dL/dx   = Σ_i q(dL/dO_i) · dq(W_i) + Σ_j D_j · dq(Â_j)

    FALQON (arXiv 2510.24061) has A frozen: without ``keep_x`` nothing of x is kept.
    """
    given = Merged(
        x,
        [lowering.as_read(w) for w in weight],
        [*scale],
        [*bias],
        [lowering.as_read(w) for w in a],
        [*a_scale],
        [*b],
        [*alpha],
        [*clamped],
        [*lora_a],
        [*lora_b],
        [*adapter_x],
        [*owner],
        [*scaling],
        keep_x,
        [*turned],
        [*joined],
        [*channels],
        out_dtype,
        spec_text,
    )
    return lower_merged_linear(given)


def lower_merged_linear(given: Merged) -> list[Tensor]:
    """`falqon_fx.ops.lowering.merged_linear`, or its like for GPUs or for adapters in FP8."""
    on_gpu = given.x.device.type == "cuda"
    if given.alpha:
        in_fp8 = fp8_gpu.merged_linear if on_gpu else fp8_adapter.merged_linear
        return in_fp8(given)
    run = gpu.merged_linear if on_gpu else lowering.merged_linear
    return run(given)


@merged_linear.register_fake
def _(*args: Any) -> list[Tensor]:
    given = Merged(*args)
    x, tokens, spec = given.x, given.x.shape[:-1], parse_spec(given.spec_text)
    n, dtype = math.prod(tokens), lowering.gemm_dtype(given.out_dtype, x.device)
    results = [x.new_empty((*tokens, w.shape[0]), dtype=given.out_dtype) for w in given.weight]
    results.append(x.new_empty((n, sum(given.ranks)), dtype=dtype))
    for _ in (given.adapter_x or [x]) if given.keep_x else []:
        results.append(x.new_empty((n, x.shape[-1]), dtype=spec.operand))
        results.append(x.new_empty((n, 1) if spec.per_row else (), dtype=torch.float32))
    corrected = given.corrected
    results += [x.new_empty((n, len(corrected[j])), dtype=dtype) for j in kept_errors(given)]
    return results


@torch.library.custom_op("falqon::grad_a", mutates_args=())
def grad_a(d: Tensor, code: Tensor, scale: Tensor, a_dtype: torch.dtype) -> Tensor:
    """dL/dA [r, in] = Dᵀ · x̂, for D [n, r] and x̂ = code · scale as `merged_linear` keeps it: E4M3
    or int8 [n, in], float32 [n, 1] or [].
    """
    run = gpu.grad_a if d.device.type == "cuda" else lowering.grad_a
    return run(d, code, scale, a_dtype)


@grad_a.register_fake
def _(d: Tensor, code: Tensor, scale: Tensor, a_dtype: torch.dtype) -> Tensor:
    return d.new_empty((d.shape[1], code.shape[1]), dtype=a_dtype)


class _Saved(NamedTuple):
    """The lists of tensors that backward needs."""

    weight: list[Tensor]
    scale: list[Tensor]
    a: list[Tensor]
    a_scale: list[Tensor]
    b: list[Tensor]
    alpha: list[Tensor]
    counted: list[Tensor]
    turned: list[Tensor]
    kept: list[Tensor]
    out_a: list[Tensor]
    errors: list[Tensor]
    channels: list[Tensor]

    @classmethod
    def of(cls, ctx: Any) -> _Saved:
        tensors = iter(ctx.saved_tensors)
        return cls(*([next(tensors) for _ in range(count)] for count in ctx.lengths))


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given = Merged(*inputs)
    sites = len(given.weight)
    out_a, *kept = output[sites:]
    of_errors = kept_errors(given)
    first_error = len(kept) - len(of_errors)
    ctx.mark_non_differentiable(*output[sites:])
    ctx.set_materialize_grads(False)
    # Without b, D needs B itself.
    of_b = given.b or (given.lora_b if given.keep_x else [])
    # By what elements that FP8 clamps are counted.
    counted = (given.clamped or given.lora_b) if given.alpha else []
    columns = _Saved(
        given.weight,
        given.scale,
        given.a,
        given.a_scale,
        of_b,
        given.alpha,
        counted,
        given.turned,
        kept[:first_error],
        [out_a],
        kept[first_error:],
        [given.corrected[j] for j in of_errors],
    )
    ctx.save_for_backward(*(tensor for column in columns for tensor in column))
    ctx.lengths = [len(column) for column in columns]
    ctx.error_of = {j: of_errors.index(k) for j, k in receivers(given).items() if of_errors}
    ctx.adds_b, ctx.keep_x = bool(given.b), given.keep_x
    uncounted = given.b, given.clamped, given.joined, given.channels
    ctx.of_b, ctx.clamped, ctx.joined, ctx.channels = map(len, uncounted)
    ctx.shapes = [(t.shape, t.dtype) for t in (given.x, *given.adapter_x)]
    ctx.ranks, ctx.trained_ranks = given.ranks, [len(t) for t in given.lora_a]
    ctx.dtypes = [[t.dtype for t in c] for c in (given.lora_a, given.lora_b, given.bias)]
    ctx.owner, ctx.scaling, ctx.spec_text = [*given.owner], [*given.scaling], given.spec_text
    ctx.trained = [p for p in (*given.lora_a, *given.lora_b) if p.requires_grad]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    results = _gradients(ctx, grads)
    if torch.is_grad_enabled():  # create_graph=True
        # dL/dB depends on x too, of which nothing may be left; where B is trained, B stands for it.
        inputs = [g for g in grads if g is not None] + ctx.trained
        given = [t for t in inputs if t.requires_grad]
        if given:
            return once(results, given)
    return results


@without_autocast
@torch.no_grad()
def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    saved = _Saved.of(ctx)
    of_a, of_b, of_bias = ctx.dtypes
    needs_bias, needs_a, needs_b, needs_own = (ctx.needs_input_grad[i] for i in (3, 9, 10, 11))
    flat = {
        i: g.reshape(-1, g.shape[-1])
        for i, g in enumerate(grads[: len(saved.weight)])
        if g is not None
    }
    own_x = len(ctx.shapes) > 1
    adapters = [j for j, i in enumerate(ctx.owner) if i in flat]
    if any(needs_a[j] for j in adapters) and not ctx.keep_x:
        raise FalqonError(
            "", "lora_A trains now, but did not when this graph was compiled", _RECOMPILE
        )
    to_x = needs_own if own_x else [ctx.needs_input_grad[0]] * len(ctx.owner)
    with_d = [j for j in adapters if needs_a[j] or (to_x[j] and ctx.adds_b)]
    backward = _through_fp8 if saved.alpha else _through
    grad_x, d = backward(ctx, saved, flat, with_d)

    grad_a: list[Tensor | None] = [None] * len(ctx.owner)
    grad_b: list[Tensor | None] = [None] * len(ctx.owner)
    grad_own: list[Tensor | None] = [None] * (len(ctx.shapes) - 1)
    grad_bias: list[Tensor | None] = [None] * len(of_bias)
    train_a, train_b = ([j for j in adapters if needs[j]] for needs in (needs_a, needs_b))
    together = bool(train_b) and not own_x and train_a in ([], train_b)
    for batch in [train_b] if together else [[j] for j in adapters if needs_a[j] or needs_b[j]]:
        place = 2 * batch[0] if own_x else 0
        of_x = [j for j in batch if j in train_a]
        x = saved.kept[place : place + 2] if of_x else []
        if batch[0] not in train_b:
            of_j = d.parts[batch[0]][:, : ctx.trained_ranks[batch[0]]]
            grad_a[batch[0]] = torch.ops.falqon.grad_a(of_j, *x, of_a[batch[0]])
            continue
        made_b, made_a = lower_adapter_grads(
            Batch(
                batch,
                [flat[ctx.owner[j]] for j in batch],
                saved.out_a[0],
                ctx.trained_ranks,
                ctx.ranks,
                [ctx.scaling[j] for j in batch],
                [of_b[j] for j in batch],
                x,
                d,
                [of_a[j] for j in of_x],
            ),
            ctx.spec_text,
        )
        for into, places, made in ((grad_b, batch, made_b), (grad_a, of_x, made_a)):
            for j, result in zip(places, made, strict=True):
                into[j] = result
    errors = KeptErrors(ctx.error_of, saved.errors, saved.channels)
    for j in train_a:
        if (lacking := grad_a[j]) is not None:
            grad_a[j] = errors.added(lacking, j, d.parts[j][:, : ctx.trained_ranks[j]])
    for j in adapters:
        if own_x and needs_own[j] and ctx.adds_b:
            shape, dtype = ctx.shapes[1 + j]
            of_j = d.parts[j]
            values = lowering.dequantize(lowering.as_read(saved.a[j]), saved.a_scale[j], of_j.dtype)
            grad_own[j] = (of_j @ values).to(dtype).reshape(shape)
    for i, g in flat.items():
        if grad_bias and needs_bias[i]:
            grad_bias[i] = g.sum(0, dtype=torch.float32).to(of_bias[i])
    counts = map(len, (saved.weight, saved.a, saved.alpha, saved.turned))
    more = ctx.of_b, ctx.clamped, ctx.joined, ctx.channels
    none_w, none_a, none_alpha, none_turned, none_b, none_clamped, none_joined, none_channels = (
        [None] * count for count in (*counts, *more)
    )
    results = (none_a, none_a, none_b, none_alpha, none_clamped, grad_a, grad_b, grad_own)
    numbers: list[None] | None = None if ctx.owner else []  # an empty list is one of tensors
    return (
        grad_x,
        none_w,
        none_w,
        grad_bias,
        *results,
        numbers,
        numbers,
        None,
        none_turned,
        none_joined,
        none_channels,
        None,
        None,
    )


def _through(
    ctx: Any, saved: _Saved, grad: dict[int, Tensor], with_d: list[int]
) -> tuple[Tensor | None, OutAGrads]:
    """dL/dx, and D_j = dL/dO · s · B_j of the adapters ``with_d``."""
    factors, of_adapters = {}, {}
    for j in with_d:
        b, of_adapters[j] = _without_columns(saved.b[j], ctx.ranks[j]), grad[ctx.owner[j]]
        factor = b if ctx.adds_b else b.to(torch.float32) * ctx.scaling[j]
        factors[j] = factor.to(saved.out_a[0].dtype)
    d = lower_grad_out_a(of_adapters, factors, ctx.spec_text)
    if not grad or not ctx.needs_input_grad[0]:
        return None, d
    shape, dtype = ctx.shapes[0]
    columns = [[*grad.values()], *([c[i] for i in grad] for c in (saved.weight, saved.scale))]
    through = with_d if ctx.adds_b and len(ctx.shapes) == 1 else []
    columns += [d.of(through), *([c[j] for j in through] for c in (saved.a, saved.a_scale))]
    of_x = merged_linear_grad_x(*columns, _turned(saved, grad), dtype, ctx.spec_text)
    return of_x.reshape(shape), d


def _without_columns(b: Tensor, rank: int) -> Tensor:
    """b without the columns of W behind it."""
    return b if b.shape[1] == rank else b.narrow(1, 0, rank)


def _turned(saved: _Saved, sites: Iterable[int]) -> list[Tensor]:
    """W_iᵀ of some sites, where they are kept."""
    if not saved.turned:
        return []
    (whole,), widths = saved.turned, [aligned(len(w)) for w in saved.weight]
    parts = whole.split(widths, dim=1)
    return [parts[i] for i in sites]


def _through_fp8(
    ctx: Any, saved: _Saved, grad: dict[int, Tensor], with_d: list[int]
) -> tuple[Tensor | None, OutAGrads]:
    """The same with adapters in FP8, where D comes from the cast of dL/dO."""
    (shape, dtype), needs_x = ctx.shapes[0], ctx.needs_input_grad[0]
    if not grad or not (needs_x or with_d):
        return None, OutAGrads({})
    places = {i: place for place, i in enumerate(grad)}
    columns = [[*grad.values()], *([c[i] for i in grad] for c in (saved.weight, saved.scale))]
    of_b = [_without_columns(b, rank) for b, rank in zip(saved.b, ctx.ranks, strict=True)]
    of_adapters = (saved.a, saved.a_scale, of_b, saved.alpha)
    columns += [[c[j] for j in with_d] for c in of_adapters]
    columns.append([saved.counted[i] for i in (grad if ctx.clamped else with_d)])
    owner, through_x = [places[ctx.owner[j]] for j in with_d], len(ctx.shapes) == 1
    whole = saved.turned if len(grad) == len(saved.weight) else []
    numbers = owner, through_x, needs_x
    grad_x, d = fp8_grad.merged_linear_grad(*columns, *numbers, whole, dtype, ctx.spec_text)
    parts = d.split([ctx.ranks[j] for j in with_d], dim=1)
    by_adapter = dict(zip(with_d, parts, strict=True))
    return grad_x.reshape(shape) if needs_x else None, OutAGrads(by_adapter, d if with_d else None)


_RECOMPILE = "Call torch._dynamo.reset() after changing requires_grad"


merged_linear.register_autograd(_backward, setup_context=_save)

OP = torch.ops.falqon.merged_linear.default
CASTS = adapter_casts.OP
