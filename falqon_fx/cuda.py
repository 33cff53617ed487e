"""What the ``falqon::`` ops compute on a GPU: ATen casts, and products by `falqon_fx.kernels`.

The functions take what those of `falqon_fx.lowering` take and compute the same; here products get
FP8 operands and their scales, and add up in float32 up to the store. The casts are ATen, so that
Inductor fuses them into whatever made x or dL/dO; the products are opaque ops.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from falqon_fx import audit, update
from falqon_fx.lowering import gemm_dtype, pending_part, scale_of
from falqon_fx.numerics import E4M3, as_e4m3
from falqon_fx.products import cast_fp8
from falqon_fx.spec import parse_spec

if TYPE_CHECKING:
    from falqon_fx.kernels.update import Launch


def quantize(x: Tensor, dtype: torch.dtype, spec: str) -> tuple[Tensor, Tensor]:
    """``x`` [n, k] ≈ q · scale: FP8 q [n, k], scale float32 [n, 1] or [].

    Below sm_89 the compiler of generated kernels has no FP8: there the cast is an op by itself.
    """
    known = x.device.type == "cuda" and torch.cuda.is_available()
    if known and torch.cuda.get_device_capability(x.device) < (8, 9):
        narrow = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        x = x if narrow else x.to(torch.float32)
        q, scale = torch.ops.falqon.cast_fp8(x, dtype, spec)
        return q, scale
    return cast_fp8(x.to(torch.float32), dtype, spec)


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
    """See `falqon_fx.lowering.merged_linear`."""
    plan, dtype = parse_spec(spec), gemm_dtype(out_dtype)
    outs = [a.shape[0] for a in applied]
    q, q_scale = quantize(x.reshape(-1, x.shape[-1]), E4M3, spec)
    codes = [as_e4m3(w) for w in weight]
    pending: list[Tensor] = []
    if plan.pending == "apply":
        pending = [pending_part(b, a, s, dtype) for b, a, s in zip(lora_b, applied, scaling)]
    *ys, out_a = torch.ops.falqon.merged_product(
        q, q_scale, codes, scale, outs, pending, bias, out_dtype, spec
    )
    # Not `reshape`: below autograd that makes a view, which may not be written in place later.
    shaped = [torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in ys]
    return [*shaped, out_a]


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
    """See `falqon_fx.lowering.merged_linear_grad_x`."""
    plan = parse_spec(spec)
    casts = []
    for g, s, a in zip(grad, scale, applied):
        folded = g.to(torch.float32) * s[: a.shape[0]].t() if plan.per_row else g
        casts.append(quantize(folded, plan.grad_dtype, spec))
    return _grad_x(casts, grad, weight, scale, applied, lora_b, scaling, x_dtype, spec)


def casts_with_grad_b(device: torch.device, spec: str) -> bool:
    """Whether dL/dO is to be cast by the kernel that computes dL/dB, see
    `falqon_fx.kernels.dispatch`: there is one, and one scale for all of dL/dO.
    """
    plan = parse_spec(spec)
    generated = plan.kernel not in ("dequantize", "scaled_mm", "inductor")
    on_nvidia = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    if plan.per_row or not generated or not on_nvidia:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def merged_linear_grads(
    out_a: Sequence[Tensor],
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    applied: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    x_dtype: torch.dtype,
    spec: str,
) -> tuple[Tensor, list[Tensor]]:
    """`merged_linear_grad_x` and the dL/dB_i, for sites with one scale each: dL/dO_i is read twice,
    for its amax, which Inductor finds where it makes dL/dO_i, and for all the rest.
    """
    plan = parse_spec(spec)
    casts, grad_b = [], []
    for g, b, a, factor in zip(grad, lora_b, out_a, scaling):
        of_all = scale_of(g.to(torch.float32), plan.grad_dtype, plan)
        q, product = torch.ops.falqon.cast_grad_b_product(
            g, of_all, a, factor, b.dtype, plan.grad_dtype, spec
        )
        casts.append((q, of_all))
        grad_b.append(product)
    grad_x = _grad_x(casts, grad, weight, scale, applied, lora_b, scaling, x_dtype, spec)
    return grad_x, grad_b


def _grad_x(
    casts: Sequence[tuple[Tensor, Tensor]],
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    applied: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    x_dtype: torch.dtype,
    spec: str,
) -> Tensor:
    plan, dtype = parse_spec(spec), gemm_dtype(grad[0].dtype)
    tails = []
    if plan.pending == "apply":
        for g, s, a, b, factor in zip(grad, scale, applied, lora_b, scaling):
            tail = g.to(dtype) @ pending_part(b, a, factor, dtype)
            of_a = s[a.shape[0] :].t() if plan.per_row else s
            tails.append((tail.to(torch.float32) * of_a).to(dtype))
    q_scales = [q_scale if plan.per_row else q_scale * s for (_, q_scale), s in zip(casts, scale)]
    left = [torch.cat(tails, dim=1)] if tails else []
    # Products for bfloat16 may round to it on their way, which those of a float32 dL/dO must not.
    stored = torch.float32 if x_dtype == torch.bfloat16 != dtype else x_dtype
    product: Tensor = torch.ops.falqon.grad_x_product(
        [q for q, _ in casts],
        q_scales,
        [as_e4m3(w) for w in weight],
        [a.shape[0] for a in applied],
        left,
        stored,
        spec,
    )
    return product.to(x_dtype)


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
    """See `falqon_fx.update.proxy_update_`: four launches for all sites whose tensors have the same
    dtypes, whatever their shapes. Sites that the kernels don't take are updated by ATen.
    """
    plan = parse_spec(spec)
    columns: list[Sequence[Any]] = [weight, scale, applied, counters, writes]
    columns += [lora_b, lora_a, base, scaling]
    # The kernels say nothing of what they write: whoever watches gets ATen's update; and on AMD's
    # GPUs none has been tried.
    if audit.audience or plan.kernel == "dequantize" or torch.version.hip is not None:
        arguments: list[Any] = [*columns, spec]
        update.proxy_update_(*arguments)
    else:
        launches = _launches_of(columns, spec)
        for launch in launches.kernels:
            launch.run()
        if launches.rest:
            arguments = [*([column[i] for i in launches.rest] for column in columns), spec]
            update.proxy_update_(*arguments)
    if plan.transpose == "store":
        from falqon_fx.kernels import stored

        stored.refresh(weight, writes, counters)


@dataclass(frozen=True)
class _Launches:
    """How the sites of a call are updated: by kernels, and by ATen those at the places ``rest``."""

    kernels: tuple[Launch, ...]
    rest: tuple[int, ...]


_known: dict[tuple[Any, ...], _Launches] = {}


def _launches_of(columns: Sequence[Sequence[Any]], spec: str) -> _Launches:
    """The launches for sites whose tensors lie where they do; remembered, since a step of a large
    model asks for hundreds of sites what has not changed.
    """
    weight, scale, applied, counters, writes, lora_b, lora_a, base, scaling = columns
    key: tuple[Any, ...] = (spec, *scaling)
    for column in (weight, scale, applied, counters, writes, lora_b, lora_a):
        key += tuple([t.data_ptr() for t in column])
    key += tuple([(w.shape, a.dtype) for w, a in zip(weight, applied)])
    key += tuple([(b.dtype, b.stride()) for b in lora_b])
    key += tuple([(a.dtype, a.stride()) for a in lora_a])
    key += tuple([None if w is None else (w.data_ptr(), w.dtype, w.stride()) for w in base])
    if key not in _known:
        if len(_known) >= 64:
            _known.clear()
        _known[key] = _plan_launches(columns, spec)
    return _known[key]


def _plan_launches(columns: Sequence[Sequence[Any]], spec: str) -> _Launches:
    # Triton is there where a GPU is, and need not be elsewhere.
    from falqon_fx.kernels.update import UpdateSite, dtypes, launch, refusal, spec_for

    plan = parse_spec(spec)
    groups: dict[object, list[UpdateSite]] = defaultdict(list)
    rest: list[int] = []
    for i in range(len(columns[0])):
        fields: list[Any] = [*(column[i] for column in columns), plan.rows(len(columns[2][i]))]
        site = UpdateSite(*fields)
        if refusal(site):
            rest.append(i)
        else:
            groups[dtypes(site)].append(site)
    drop = plan.pending == "drop"
    made = [
        launch(sites, plan.seed, spec_for(sites, plan.scale, plan.rounding, drop))
        for sites in groups.values()
    ]
    return _Launches(tuple(made), tuple(rest))
