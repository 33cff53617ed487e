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
from falqon_fx.passes.match.frozen import part_of_adapter, why_left
from falqon_fx.site import nvfp4
from falqon_fx.site.paths import without_wrappers
from falqon_fx.site.quantized import SKIPPED, layer_quantized_as
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


def skipped_quantized(model: nn.Module, config: FalqonConfig) -> dict[str, str]:
    """The linear layers without an adapter whose weights others have quantized."""
    if config.frozen == "leave":
        return {}
    adapted = {id(lora.base) for lora in lora_layers(model)}
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None) if isinstance(module, nn.Linear) else None
        if id(module) in adapted:
            continue
        kind, path = layer_quantized_as(module, weight), without_wrappers(path)
        if kind is not None and config.selects(path) and not part_of_adapter(path):
            found[path] = SKIPPED.format(kind)
    return found


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
    if (kind := layer_quantized_as(base, weight)) is not None:
        return SKIPPED.format(kind)
    if not isinstance(weight, Tensor) or type(base) is not nn.Linear:
        return f"its base layer is a {type(base).__name__}, not an nn.Linear"
    if weight.requires_grad:
        return "its base weight is trained too"
    return f"its base weight is in {weight.dtype}"
