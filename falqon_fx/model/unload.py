"""`merge_and_unload`: a plain model with the adapters merged into its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx import _compat
from falqon_fx.errors import FalqonError
from falqon_fx.model.fp8_linear import IN_ONE_PROCESS
from falqon_fx.model.lora_layers import LoraLayer, check_adapters, lora_layers, unwrap
from falqon_fx.model.prepare import restore
from falqon_fx.rows import unload as rows_unload
from falqon_fx.site.sharded import refuse_sharded


def merge_and_unload(model: nn.Module) -> nn.Module:
    """The base model with its active adapters merged, for PEFT models trained under falqon, and for
    models that `add_adapter` of transformers or diffusers was called on: compiled no more, then.

    PEFT merges W + Σ scaling · B · A itself; where `prepare` freed W, dq(W) in the dtype that W had
    takes its place. With update="rows" a layer's weight is dq(W') + scaling · (B - applied) ·
    dq(A), where the active adapter is the one that W' holds. Changes ``model`` in place, as PEFT's
    own does.

    Raises:
        FalqonError: no PEFT model, or one of which other processes hold parts; NaN or Inf in an
            active adapter or in what it makes of a weight, or a bias of lora_B that has no place in
            the base layer; with pending="drop", another adapter than the one that was trained.
            Nothing has been changed then.
    """
    model = unwrap(model)
    wrapped = hasattr(model, "get_base_model")
    if not hasattr(model, "merge_and_unload" if wrapped else "peft_config"):
        raise FalqonError(
            type(model).__name__,
            "it is not a PEFT model",
            "Merge what get_peft_model returned, or the model that add_adapter was called on",
        )
    refuse_sharded(model, "merge_and_unload", IN_ONE_PROCESS)
    base: Any = model.get_base_model() if wrapped else model  # type: ignore[operator]
    check_adapters(base)
    _check_biases(base)
    for layer in lora_layers(base):
        _check_sum(layer)
    rows_unload.merge(base)
    restore(model)
    if wrapped:
        merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
        return merged
    _unload(base)
    _compat.uncompile(model)  # else its weights, adapters and all, would be cast to FP8 again
    return model


def _unload(model: Any) -> None:
    """What PEFT's merge_and_unload does, on a model without PEFT's wrapper."""
    done = "\0"  # a layer that was replaced: what it had inside is gone
    for path, module in list(model.named_modules()):
        if path.startswith(f"{done}."):
            continue
        if hasattr(module, "unload_and_optionally_merge_module"):
            plain = module.unload_and_optionally_merge_module(True, False, None)
        elif hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            plain = module.get_base_layer()
        else:
            continue
        model.set_submodule(path, plain)
        done = path
    del model.peft_config
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False  # else save_pretrained would look for an adapter


def _check_biases(base: nn.Module) -> None:
    for layer in lora_layers(base):
        biased = [n for n in layer.adapters if layer.module.lora_B[n].bias is not None]
        if biased and getattr(layer.base, "bias", None) is None:
            raise FalqonError(
                layer.path,
                "its lora_B has a bias and its base layer none, so there is no place for it",
                "Train without lora_bias, or give the base layer a bias of zeros",
            )


@torch.no_grad()
def _check_sum(layer: LoraLayer) -> None:
    """W + Σ scaling · B · A has to be finite in W's dtype. It is computed only where it might not
    be: beyond max|W| + Σ scaling · max|A| · max_k Σ_r|B_kr|, which no element exceeds.
    """
    if hasattr(layer.module, "parameter_name"):
        return  # PEFT adapts a parameter, which it merges in its own way
    weight = layer.base.weight
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dim() != 2:
        return  # quantized by others: PEFT merges it in its own way
    most = torch.finfo(weight.dtype).max
    parts = [(a.float(), b.float(), s) for a, b, s in layer.each()]
    bounds = [abs(s) * a.abs().amax() * b.abs().sum(1).amax() for a, b, s in parts]
    if weight.abs().amax().float() + sum(bounds) < most:
        return
    merged: Tensor = layer.weight.float()
    for a, b, scaling in parts:
        merged = merged + scaling * (b @ a)
    count = int((~(merged.abs() <= most)).sum())
    if count:
        raise FalqonError(
            layer.path,
            f"with its adapters {count} of {merged.numel()} elements of its weight would be NaN or "
            f"Inf in {weight.dtype}",
            "Repair the adapter, or give the model a dtype with a wider range",
        )
