"""Which linear layers `prepare` casts, and why it leaves others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from falqon_fx.config import FalqonConfig
from falqon_fx.model.lora_layers import (
    LinearLayer,
    LoraLayer,
    linear_layers,
    lora_layers,
    tied_weights,
)
from falqon_fx.model.prepared_linear import PreparedLinear
from falqon_fx.model.stacks import stacked_weights
from falqon_fx.passes.match.frozen import why_left
from falqon_fx.site import nvfp4
from falqon_fx.site.sharded import local


def sort_layers(model: nn.Module, config: FalqonConfig) -> tuple[list[LinearLayer], dict[str, str]]:
    """The layers that `prepare` casts, and why it leaves others."""
    layers, skipped = [], {}
    tied = tied_weights(model)
    for layer in linear_layers(model):
        shared = tied[local(layer.module.weight).data_ptr()]
        reason = skip_reason(layer, config, len(shared) > 1)
        if reason is None:
            layers.append(layer)
        elif reason:
            skipped[layer.site] = reason
    return layers, skipped


def skipped_adapters(
    model: nn.Module, layers: Sequence[LinearLayer], skipped: Mapping[str, str]
) -> dict[str, str]:
    """Why the base layers of the other LoRA layers can't be cast."""
    found = {id(layer.lora.base) for layer in layers if layer.lora is not None}
    others = [lora for lora in lora_layers(model) if id(lora.base) not in found]
    stacked = {id(stack.wrapper) for stack in stacked_weights(model)}
    others = [lora for lora in others if id(lora.module) not in stacked]
    return {lora.path: _why_not(lora) for lora in others if lora.path not in skipped}


def skip_reason(layer: LinearLayer, config: FalqonConfig, tied: bool) -> str | None:
    """Why a frozen layer is left; "" where that is nothing to report."""
    if not (config.selects(layer.site) and config.selects(layer.path)):
        return "include= or exclude= leaves it out"
    out, features = layer.weight.shape
    if layer.lora is not None:
        if getattr(layer.lora.module, "merged", False):
            return "its adapter is merged into the base weight (call unmerge_adapter() first)"
        return nvfp4.why_not(features) if config.base_dtype == "nvfp4" else None
    if config.frozen == "leave":
        return ""
    left = why_left(layer.path, out, features, tied)
    return left or (nvfp4.why_not(features) if config.base_dtype == "nvfp4" else None)


def _why_not(layer: LoraLayer) -> str:
    base: Any = layer.base
    if isinstance(base, PreparedLinear):
        return "it is prepared already"
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or type(base) is not nn.Linear:
        return f"its base layer is a {type(base).__name__}, not an nn.Linear"
    if weight.requires_grad:
        return "its base weight is trained too"
    return f"its base weight is already quantized ({weight.dtype})"
