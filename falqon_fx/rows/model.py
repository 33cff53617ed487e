"""What update="rows" does with a whole model: `falqon_fx.prepare` and its like call it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.model.lora_layers import (
    LoraLayer,
    check_fit,
    check_untied,
    is_linear,
    lora_layers,
    tied_weights,
)
from falqon_fx.model.prepared_linear import PreparedLinear
from falqon_fx.rows import dropped
from falqon_fx.rows.prepared import MergedBaseLinear
from falqon_fx.rows.state import MergedAdapter, check_values, create, registry
from falqon_fx.site.paths import deepest_path
from falqon_fx.site.quantized import SKIPPED, layer_quantized_as

Track = Callable[[Sequence[LoraLayer]], Iterable[LoraLayer]]


def prepare(
    model: nn.Module, config: FalqonConfig, track: Track
) -> tuple[tuple[str, ...], dict[str, str], int, int]:
    """Merge every LoRA layer in place: paths, what was skipped and why, bytes before and after."""
    layers, skipped = [], {}
    for layer in lora_layers(model):
        reason = skip_reason(layer, config)
        if reason is None:
            layers.append(layer)
        else:
            skipped[layer.path] = reason
    _check_before(model, layers, config)
    before = after = 0
    for layer in track(layers):
        base = layer.base
        given = (layer.weight, layer.lora_a, layer.lora_b, layer.scaling)
        state = create(layer.path, *given, config, frees_base=True)
        registry.forget(layer.lora_b)
        before += base.weight.nbytes
        after += sum(tensor.nbytes for tensor in state.tensors)
        layer.module.base_layer = MergedBaseLinear(
            state, base.bias, base.weight.dtype, layer.transposed, layer.path
        )
    return tuple(layer.path for layer in layers), skipped, before, after


def restore(model: nn.Module) -> None:
    """Give prepared layers plain base weights again: dq(W) - scaling · applied · dq(A).

    Raises:
        FalqonError: with pending="drop" this would throw away what was trained. Nothing has been
            changed then.
    """
    _check_kept(model)
    for parameter in model.parameters():
        registry.forget(parameter)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MergedBaseLinear):
                setattr(parent, name, child.plain())


def _check_kept(model: nn.Module) -> None:
    """No layer may hold steps that its B doesn't."""
    found: dict[str, tuple[MergedAdapter, Tensor | None]] = {
        module.path or path: (module.merged(), None)  # without an adapter, but for those below
        for path, module in model.named_modules()
        if isinstance(module, MergedBaseLinear)
    }
    found |= {path: (state, state.lora_b()) for path, state in adapters(model).items()}
    for path, (state, lora_b) in found.items():
        if state.holds_what_b_lacks(lora_b):
            raise FalqonError(path, dropped.RESTORED, dropped.REMEDY)


def adapters(model: nn.Module) -> dict[str, MergedAdapter]:
    """The live state of each site by the path of its LoRA layer."""
    found: dict[str, MergedAdapter] = {}
    for layer in lora_layers(model):
        if isinstance(layer.base, MergedBaseLinear):
            found[layer.path] = state_of(layer)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for state, of_state in registry.within(model.parameters(), names):
        path = deepest_path(of_state)
        found[path if path not in found else of_state[-1][0]] = state
    return found


def state_of(layer: LoraLayer) -> MergedAdapter:
    """The live state of a prepared layer, with its B."""
    state: MergedAdapter = layer.base.merged()
    state.b_ref = weakref.ref(layer.lora_b)
    return state


def flush(model: nn.Module) -> None:
    """Write every pending row of every site into its FP8 weight now, however large it is."""
    for state in adapters(model).values():
        state.flush()


def skip_reason(layer: LoraLayer, config: FalqonConfig) -> str | None:
    """Why a LoRA layer can't be merged and written, None where it can."""
    if isinstance(layer.base, PreparedLinear):
        return "it is prepared already"
    weight = getattr(layer.base, "weight", None)
    if (kind := layer_quantized_as(layer.base, weight)) is not None:
        return SKIPPED.format(kind)
    if not is_linear(layer.base):
        return f"its base layer is a {type(layer.base).__name__}, not an nn.Linear"
    if layer.base.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its base weight is in {layer.base.weight.dtype}"
    if layer.base.weight.requires_grad:
        return "its base weight is trained too"
    if getattr(layer.module, "use_dora", {}).get(layer.adapter):
        return "DoRA scales the merged weight by its own norm"
    if getattr(layer.module, "merged", False):
        return "its adapter is merged into the base weight (call unmerge_adapter() first)"
    if len(layer.adapters) > 1:
        return "more than one adapter is active on it"
    if not config.selects(layer.path):
        return "include= or exclude= leaves it out"
    return None


def _check_before(model: nn.Module, layers: list[LoraLayer], config: FalqonConfig) -> None:
    """All that could fail is looked at before the first layer is changed."""
    holders = tied_weights(model)
    for layer in layers:
        check_untied(layer.path, layer.base.weight, holders)
        check_fit(layer)
        config.rows(layer.lora_b.shape[0], layer.path)
        if registry.holds_what_lacks(layer.lora_b):
            raise FalqonError(layer.path, dropped.PREPARED, dropped.REMEDY)
        check_values(layer.path, layer.weight, layer.lora_a, layer.lora_b)
