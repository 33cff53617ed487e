"""The FP8 weights of update="rows", dequantized with their adapters merged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.model.lora_layers import LoraLayer, lora_layers
from falqon_fx.model.prepared_linear import plain_layer
from falqon_fx.rows.fingerprint import fingerprint
from falqon_fx.rows.model import state_of
from falqon_fx.rows.prepared import MergedBaseLinear
from falqon_fx.rows.state import MergedAdapter, registry
from falqon_fx.site.record import FINGERPRINT_A


def merge(base: nn.Module) -> None:
    """Put plain layers with their adapters merged in the place of those whose FP8 weight is that of
    the active adapter; `falqon_fx.restore` takes the adapter out of the others.

    Raises:
        FalqonError: with pending="drop", an FP8 weight that is not that of the active adapter.
            Nothing has been changed then.
    """
    layers = {}
    for path, (layer, state) in fp8_layers(base).items():
        problem = not_written(layer, state)
        if problem is None:
            layers[path] = (layer, state)
        elif state.holds_what_b_lacks(state.lora_b()):
            raise FalqonError(path, problem, ACTIVATE)
    for path, (layer, state) in layers.items():  # one dense weight at a time
        base.set_submodule(path, merged_layer(layer, state))
    for parameter in base.parameters():
        registry.forget(parameter)


ACTIVATE = "Activate the adapter that was trained, with its scaling"


def not_written(layer: LoraLayer, state: MergedAdapter) -> str | None:
    """Why the FP8 weight, which holds one adapter with the A and scaling of its time, is not that
    of the active one; None where it is.
    """
    if len(layer.adapters) > 1:
        return f"{len(layer.adapters)} adapters are active, and its FP8 weight holds one"
    if layer.scaling != state.scaling:
        return f"its scaling is {layer.scaling:g}, and its FP8 weight has {state.scaling:g}"
    if fingerprint(layer.lora_a[None])[0] != state.counters[FINGERPRINT_A]:
        return "its FP8 weight was written with another lora_A than the active one"
    return None


def fp8_layers(base: nn.Module) -> dict[str, tuple[LoraLayer, MergedAdapter]]:
    """The LoRA layers of a model that have an FP8 weight, and its state, by module path.

    Raises:
        FalqonError: a layer with the states of several configs.
    """
    found = {}
    for layer in lora_layers(base):
        states = _states(layer)
        if len(states) > 1:
            raise FalqonError(
                layer.path,
                f"it was trained under {len(states)} different configs, each with its FP8 weight",
                "Call falqon_fx.restore(model), compile with one config, and run a step",
            )
        if states:
            found[layer.path] = (layer, states[0])
    return found


def _states(layer: LoraLayer) -> list[MergedAdapter]:
    if isinstance(layer.base, MergedBaseLinear):
        return [state_of(layer)]
    return [
        state
        for state in registry.of(layer.lora_b)
        if state.base_ref is not None and state.base_ref() is layer.base.weight
    ]


def merged_weight(state: MergedAdapter) -> Tensor:
    """dq(W) + scaling · (B - applied) · dq(A), float32 [out, in]."""
    out, _ = state.applied.shape
    merged = state.dequantize()
    pending = state.pending() * state.scaling
    if pending.any():
        return merged[:out] + pending @ merged[out:]
    return merged[:out]


def check_pending(path: str, state: MergedAdapter) -> None:
    """Refuse to write pending rows into the only copy of W where that would round W away.

    Raises:
        FalqonError: names the site and says how many rows.
    """
    limit = state.limit
    if limit is None or not state.pending().any():
        return
    out, _ = state.applied.shape
    scale = state.scale[:out] if state.scale.dim() else state.scale
    fits = merged_weight(state).abs().amax(1, keepdim=True) <= limit * scale
    if not fits.all():
        raise FalqonError(
            path,
            f"{int((~fits).sum())} of its {out} rows are pending because FP8 would round away what "
            "its weight was, which prepare() freed",
            "Repair lora_B or train on until it is small again; falqon_fx.merge_and_unload(model) "
            "merges it as it is, and falqon_fx.flush(model) writes these rows all the same",
        )


def merged_bias(layer: LoraLayer) -> Tensor | None:
    """The base layer's bias, plus scaling times that of lora_B where it has one."""
    bias: Tensor | None = layer.base.bias
    extra: Tensor | None = layer.module.lora_B[layer.adapter].bias
    if bias is None or extra is None:
        return None if bias is None else bias.detach()
    wide = bias.detach().to(torch.float32) + extra.detach().to(torch.float32) * layer.scaling
    return wide.to(bias.dtype)


def merged_layer(layer: LoraLayer, state: MergedAdapter) -> nn.Module:
    """A plain layer of the base layer's kind and dtype, with the adapter merged."""
    bias = merged_bias(layer)
    parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
    plain = plain_layer(merged_weight(state).to(layer.dtype), parameter, layer.transposed)
    return plain.train(layer.module.training)
