"""``torch.ops.falqon.proxy_update``: the casts of a graph's adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from falqon_fx.kernels.fixed import Fixed
from falqon_fx.ops import fp8_adapter, fp8_gpu, gpu, lowering
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import parse_spec


@torch.library.custom_op("falqon::proxy_update", mutates_args=())
def proxy_update(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    error_a: Sequence[Tensor],
    error_b: Sequence[Tensor],
    columns: Sequence[Tensor],
    wide: bool,
    spec_text: str,
) -> list[Tensor]:
    """The casts of all adapters of a graph, from the parameters as they are now: Â_j [r, in] in
    E4M3 or int8, its scale (float32 [r, 1] or []), and b_j = scaling_j · B_j [out, r] in bfloat16,
    or float32 where ``wide``; three tensors an adapter.

    With adapter_dtype="fp8" four: b_j in E4M3, in the units of the ``base_scale`` of the base that
    it is added to, and α_j [r]; see `falqon_fx.ops.fp8_adapter`.

    What a calibration has made stands behind: with ``error_a`` A_c,j [r_c, in] and ``error_b``
    B_c,j [out, r_c], one of each adapter or none, the rows of Â_j and the columns of b_j are those
    of A_j and B_j and then theirs, with zeros up to a multiple of 16, and with ``columns`` W_S,j
    [out, c] the last columns of b_j are W's own.

    Gradients don't pass: they reach A and B through `merged_linear`, straight through the casts.
    """
    on_gpu = lora_a[0].device.type == "cuda"
    given, fixed = (lora_a, lora_b, scaling, base_scale), Fixed(error_a, error_b, columns)
    if base_scale:
        in_fp8 = fp8_gpu.proxy_update if on_gpu else fp8_adapter.proxy_update
        return in_fp8(*given, spec_text, fixed)
    run = gpu.proxy_update if on_gpu else lowering.proxy_update
    return run(*given, wide, spec_text, fixed)


@proxy_update.register_fake
def _(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    error_a: Sequence[Tensor],
    error_b: Sequence[Tensor],
    columns: Sequence[Tensor],
    wide: bool,
    spec_text: str,
) -> list[Tensor]:
    dtype, spec = torch.float32 if wide else torch.bfloat16, parse_spec(spec_text)
    casts = []
    fixed = Fixed(error_a, error_b, columns)
    for j, (a, b) in enumerate(zip(lora_a, lora_b)):
        rank = fixed.of([j]).rank(len(a))
        width = rank + (columns[j].shape[1] if columns else 0)
        code, scale = (rank, a.shape[1]), (rank, 1) if spec.per_row else ()
        casts += [a.new_empty(code, dtype=spec.operand), a.new_empty(scale, dtype=torch.float32)]
        casts.append(b.new_empty((len(b), width), dtype=E4M3 if base_scale else dtype))
        if base_scale:
            casts.append(a.new_empty(rank, dtype=torch.float32))
    return casts


def _constants(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.mark_non_differentiable(*output)
    ctx.counts = [len(column) for column in (*inputs[:2], *inputs[3:7])]


def _no_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    of_a, of_b, *others = ([None] * count for count in ctx.counts)
    return of_a, of_b, None, *others, None, None


proxy_update.register_autograd(_no_gradients, setup_context=_constants)

OP = torch.ops.falqon.proxy_update.default
