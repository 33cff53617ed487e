"""FP8 checkpoints of others as base weights: their bytes and scales, as they are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx import storage, update
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.loading import empty_model, fill, lora_config, new_lora_a, read_index
from falqon_fx.merged import MergedAdapter, allocate
from falqon_fx.numerics import E4M3, amax_to_scale, encode_fp8, round_to_fp8
from falqon_fx.prepare import lora_layers
from falqon_fx.spec import SiteSpec

_SCALES = (".weight_scale", ".weight_scale_inv")
# Of an FP8 cache of keys and values, by the names of AutoFP8, compressed-tensors and vLLM.
_OF_CACHE = (".k_scale", ".v_scale", ".kv_scale", "k_proj.output_scale", "v_proj.output_scale")


def load_fp8(directory: Path, lora: Any = None, config: FalqonConfig | None = None) -> nn.Module:
    """A prepared PEFT model on the FP8 weights of a compressed-tensors or fp8 checkpoint.

    Scales are a tensor's or a row's; they stay what they are, so W' has row scales, and with scales
    that aren't powers of two scale="amax". FP8 layers without an adapter stay FP8 too. Left out are
    static scales of activations, which are cast by their own largest value here, and with a warning
    those of a cache.

    Raises:
        FalqonError: no FP8 checkpoint, or scales a block of columns.
    """
    tensors = _read(directory)
    _check_format(directory)
    model = empty_model(directory, lora_config(lora))
    weights = {n.removesuffix(".weight"): t for n, t in tensors.items() if t.dtype == E4M3}
    if not weights:
        raise FalqonError(str(directory), "it holds no float8_e4m3fn weight", "Use transformers")
    scales = {path: _row_scale(path, w, tensors, directory) for path, w in weights.items()}
    config = replace(config or FalqonConfig(), granularity="row")
    if not all(_powers_of_two(scale) for scale in scales.values()):
        config = replace(config, scale="amax")
    plan = SiteSpec.from_config(config)

    dtype = model.get_base_model().config.dtype
    layers = {layer.path: layer for layer in lora_layers(model)}
    states: dict[str, tuple[MergedAdapter, torch.dtype]] = {}
    for name, weight in weights.items():
        path = f"base_model.model.{name}"
        layer = layers.get(path)
        rows = torch.empty(0, weight.shape[1])
        if layer is not None:
            rows = new_lora_a(layer.lora_a.shape)
            tensors[f"{name}.lora_A.default.weight"] = rows
            path += ".base_layer"
        scaling = 1.0 if layer is None else layer.scaling
        states[path] = (_merge(weight, scales[name], rows, scaling, plan, dtype), dtype)
    skip = {f"{name}{end}" for name in weights for end in (".weight", ".input_scale", *_SCALES)}
    of_cache = {name for name in tensors if name.endswith(_OF_CACHE)}
    if of_cache:
        warnings.warn(
            f"falqon: {directory} holds {len(of_cache)} scales of an FP8 cache of keys and values: "
            "training has none, and they are left out. A server that wants them needs them again.",
            stacklevel=3,
        )
    skip |= of_cache
    rest = {f"base_model.model.{n}": t for n, t in tensors.items() if n not in skip}
    return fill(model, states, rest, str(directory))


def _read(directory: Path) -> dict[str, Tensor]:
    index = read_index(directory)
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        with storage.named(directory / file):
            tensors |= load_file(directory / file)
    return tensors


def _check_format(directory: Path) -> None:
    settings = json.loads((directory / "config.json").read_text()).get("quantization_config")
    method = (settings or {}).get("quant_method")
    if method not in ("compressed-tensors", "fp8"):
        raise FalqonError(
            str(directory),
            "it is neither a folder of falqon_fx.prequantize nor an FP8 checkpoint "
            f"(quant_method={method!r})",
            "Call falqon_fx.prequantize on it, or load it with transformers",
        )
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if (weights.get("num_bits"), weights.get("type")) != (8, "float"):
            raise FalqonError(
                str(directory),
                f"its weights have {weights.get('num_bits')} bits of type {weights.get('type')!r}",
                "Only 8-bit floats can be trained on as they are",
            )


def _row_scale(path: str, weight: Tensor, tensors: Mapping[str, Tensor], directory: Path) -> Tensor:
    """The scale of each row, float32 [out, 1]."""
    found = [tensors[path + end] for end in _SCALES if path + end in tensors]
    if not found:
        raise FalqonError(path, f"{directory} holds no scale for it", "Check the checkpoint")
    scale, out = found[0].to(torch.float32), weight.shape[0]
    if scale.numel() == 1 or bool((scale == scale.flatten()[0]).all()):
        return scale.flatten()[0].expand(out, 1).clone()
    if scale.shape in ((out, 1), (out,)):
        return scale.reshape(out, 1)
    raise FalqonError(
        path,
        f"it has scales a block, {list(scale.shape)} of them, which W' can't hold as they are",
        "Dequantize it with transformers (dequantize=True), then call falqon_fx.prepare",
    )


def _powers_of_two(scale: Tensor) -> bool:
    return bool((torch.frexp(scale).mantissa == 0.5).all())


def _merge(
    weight: Tensor,
    scale: Tensor,
    lora_a: Tensor,
    scaling: float,
    plan: SiteSpec,
    dtype: torch.dtype,
) -> MergedAdapter:
    """W' = [W; q(A)] with B = 0; the bytes of W are ``weight``'s own."""
    (out, features), rank = weight.shape, lora_a.shape[0]
    state = allocate(out, features, rank, dtype, scaling, plan, weight.device)
    a_scale = amax_to_scale(lora_a.abs().amax(1, keepdim=True), E4M3, plan.scale)
    state.code[:out] = weight.view(torch.uint8)
    state.code[out:] = encode_fp8(round_to_fp8(lora_a * a_scale.reciprocal(), E4M3), E4M3)
    state.scale[:out], state.scale[out:] = scale, a_scale
    state.applied.zero_()
    counters = state.counters
    counters[update.FINGERPRINT_A] = update.fingerprint(lora_a[None])[0] if rank else 0
    mixed = update.fingerprint(update.sample(state.code)[None])[0]
    counters[update.SITE] = update.site_number(mixed)
    return state
