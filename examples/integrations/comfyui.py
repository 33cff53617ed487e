"""A trained diffusion model as one file in ComfyUI's FP8 form: `float8_e4m3fn`, a scale a layer.

    from comfyui import write_comfyui
    write_comfyui(falqon_fx.merge_and_unload(model), "model_fp8.safetensors")

The form is that of ComfyUI's QUANTIZATION.md (commit 7f75cc2bc2): float8 weights, a float32
`weight_scale` each, and the list of them in the file's metadata. Names stay those of the model.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def write_comfyui(model: nn.Module, file: str | Path, least: int = 64) -> list[str]:
    """Write a plain model; returns the layers that are in FP8: linear, with ``least`` features."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    layers = []
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and min(layer.weight.shape) >= least:
            weight = layer.weight.detach().float()
            scale = (weight.abs().amax() / LARGEST).clamp(min=1e-12)
            codes = (weight / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            tensors |= {f"{path}.weight": codes, f"{path}.weight_scale": scale}
            layers.append(path)
    kinds = {path: {"format": "float8_e4m3fn"} for path in layers}
    about = {"format_version": "1.0", "layers": kinds}
    save_file(tensors, file, metadata={"_quantization_metadata": json.dumps(about)})
    return layers
