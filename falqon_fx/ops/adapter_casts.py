"""``torch.ops.falqon.proxy_update``: the casts of a graph's adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from falqon_fx.ops import fp8_adapter, fp8_gpu, gpu, lowering
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import parse_spec


@torch.library.custom_op("falqon::proxy_update", mutates_args=())
def proxy_update(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    wide: bool,
    spec_text: str,
) -> list[Tensor]:
    """The casts of all adapters of a graph, from the parameters as they are now: Â_j [r, in] in
    E4M3 or int8, its scale (float32 [r, 1] or []), and b_j = scaling_j · B_j [out, r] in bfloat16,
    or float32 where ``wide``; three tensors an adapter.

    With adapter_dtype="fp8" four: b_j in E4M3, in the units of the ``base_scale`` of the base that
    it is added to, and α_j [r]; see `falqon_fx.ops.fp8_adapter`.

    Gradients don't pass: they reach A and B through `merged_linear`, straight through the casts.
    """
    on_gpu = lora_a[0].device.type == "cuda"
    if base_scale:
        in_fp8 = fp8_gpu.proxy_update if on_gpu else fp8_adapter.proxy_update
        return in_fp8(lora_a, lora_b, scaling, base_scale, spec_text)
    run = gpu.proxy_update if on_gpu else lowering.proxy_update
    return run(lora_a, lora_b, scaling, base_scale, wide, spec_text)


@proxy_update.register_fake
def _(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    wide: bool,
    spec_text: str,
) -> list[Tensor]:
    dtype, spec = torch.float32 if wide else torch.bfloat16, parse_spec(spec_text)
    casts = []
    for a, b in zip(lora_a, lora_b):
        scale = (a.shape[0], 1) if spec.per_row else ()
        casts += [a.new_empty(a.shape, dtype=spec.operand), a.new_empty(scale, dtype=torch.float32)]
        casts.append(b.new_empty(b.shape, dtype=E4M3 if base_scale else dtype))
        if base_scale:
            casts.append(a.new_empty(a.shape[:1], dtype=torch.float32))
    return casts


def _constants(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.mark_non_differentiable(*output)
    ctx.counts = len(inputs[0]), len(inputs[3])


def _no_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    of_adapters, of_bases = ctx.counts
    nothing: list[None] = [None] * of_adapters
    scales: list[None] = [None] * of_bases
    return nothing, nothing, None, scales, None, None


proxy_update.register_autograd(_no_gradients, setup_context=_constants)

OP = torch.ops.falqon.proxy_update.default
