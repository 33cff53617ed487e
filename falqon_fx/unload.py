"""`merge_and_unload`: a plain model whose weights are the FP8 weights of training, dequantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.merged import MergedAdapter, registry
from falqon_fx.prepare import LoraLayer, MergedBaseLinear, lora_layers, plain_layer, unwrap


def merge_and_unload(model: nn.Module) -> nn.Module:
    """The base model with adapters merged, for PEFT models trained under falqon.

    An FP8 layer becomes a plain one with weight dq(W) + scaling · (B - applied) · dq(A) = base +
    scaling · B · Â in the dtype of its base weight: with nothing pending exactly dq(W), where
    scales are powers of two and the dtype has 4 bits or more in its significand. PEFT merges every
    other adapter itself. Changes ``model`` in place, as PEFT's own does.

    Raises:
        FalqonError: no PEFT model, or a bias of lora_B that has no place in the base layer. Nothing
            has been changed then.
    """
    model = unwrap(model)
    if not (hasattr(model, "get_base_model") and hasattr(model, "merge_and_unload")):
        raise FalqonError(
            type(model).__name__, "it is not a PEFT model", "Merge what get_peft_model returned"
        )
    base: Any = model.get_base_model()  # type: ignore[operator]
    layers = fp8_layers(base)
    for layer, _ in layers.values():
        merged_bias(layer)  # refused before anything is changed
    for path, (layer, state) in layers.items():  # one dense weight at a time
        base.set_submodule(path, merged_layer(layer, state))
        registry.forget(layer.lora_b)
    merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
    return merged


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
        return [layer.state()]
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


def merged_bias(layer: LoraLayer) -> Tensor | None:
    """The base layer's bias, plus scaling times that of lora_B where it has one.

    Raises:
        FalqonError: lora_B has a bias, the base layer has none.
    """
    bias: Tensor | None = layer.base.bias
    extra: Tensor | None = layer.module.lora_B[layer.adapter].bias
    if extra is None:
        return None if bias is None else bias.detach()
    if bias is None:
        raise FalqonError(
            layer.path,
            "its lora_B has a bias and its base layer none, so there is no place for it",
            "Train without lora_bias, or give the base layer a bias of zeros",
        )
    wide = bias.detach().to(torch.float32) + extra.detach().to(torch.float32) * layer.scaling
    return wide.to(bias.dtype)


def merged_layer(layer: LoraLayer, state: MergedAdapter) -> nn.Module:
    """A plain layer of the base layer's kind and dtype, with the adapter merged."""
    bias = merged_bias(layer)
    parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
    plain = plain_layer(merged_weight(state).to(layer.dtype), parameter, layer.transposed)
    return plain.train(layer.module.training)
