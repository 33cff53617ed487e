"""A trained diffusion model as one file in ComfyUI's FP8 form: `float8_e4m3fn`, a scale a layer.

    from comfyui import write_comfyui
    base.load_lora_adapter("lora", prefix="unet")  # a UNet2DConditionModel as it was loaded
    base.fuse_lora()
    base.unload_lora()
    write_comfyui(base, "model_fp8.safetensors", original="v1-5-pruned-emaonly.safetensors")

The form is that of ComfyUI's QUANTIZATION.md (commit 7f75cc2bc2): float8 weights, a float32
`weight_scale` each, and the list of them in the file's metadata. ``original`` is the file that
ComfyUI has of the base model, or the checkpoint that holds it: its names are taken, as under
diffusers' names ComfyUI reads the weights, but not the scales.

The adapter is merged into the base as it was loaded. After `falqon_fx.prepare` the weights of a
model are FP8's own numbers, and what an adapter adds to them is mostly below half of a step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SAME_NAMES = {"QwenImageTransformer2DModel"}  # in diffusers as in ComfyUI
PREFIX = "model.diffusion_model."  # in a checkpoint, before the names of this part

Parts = dict[str, list[str]]  # the model's tensors that a tensor of the file is made of


def write_comfyui(
    model: nn.Module, file: str | Path, original: str | Path | None = None, least: int = 64
) -> list[str]:
    """Write a plain model; returns the layers that are in FP8: linear, with ``least`` features."""
    tensors: dict[str, Tensor] = model.state_dict()
    parts: Parts = {name: [name] for name in tensors}
    if original is not None:
        tensors, parts = as_in(model, original)
    elif type(model).__name__ in SINGLE_FILE_LOADABLE_CLASSES.keys() - SAME_NAMES:
        raise ValueError(
            f"{type(model).__name__}: ComfyUI reads no scales under diffusers' names. Name the "
            "file that ComfyUI has of the base model as original="
        )
    modules = model.named_modules()
    linear = {f"{path}.weight" for path, layer in modules if isinstance(layer, nn.Linear)}
    layers = []
    for name, tensor in list(tensors.items()):
        tensors[name] = tensor.contiguous()
        if linear.issuperset(parts[name]) and min(tensor.shape) >= least:
            weight = tensor.detach().float()
            scale = (weight.abs().amax() / LARGEST).clamp(min=1e-12)
            tensors[name] = (weight / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale
            layers.append(name.removesuffix(".weight"))
    kinds = {path: {"format": "float8_e4m3fn"} for path in layers}
    about = {"format_version": "1.0", "layers": kinds}
    save_file(tensors, file, metadata={"_quantization_metadata": json.dumps(about)})
    return layers


def as_in(model: Any, original: str | Path) -> tuple[dict[str, Tensor], Parts]:
    """The model's tensors under the names of ``original``, and of which each is made.

    diffusers has the way from there to its own names. It splits, joins and swaps rows, so the
    number of each row is sent that way, and the model's rows go back to where theirs came from.
    """
    with safe_open(original, "pt") as file:
        names = list(file.keys())
        shapes = [torch.Size(file.get_slice(name).get_shape()) for name in names]
    counts = torch.tensor([shape[0] if shape else 1 for shape in shapes])
    owners = torch.arange(len(names)).repeat_interleave(counts)  # a row's name, by its place
    numbers = torch.arange(len(owners)).split(counts.tolist())
    rows = {
        name: number.reshape(-1, *[1] * (len(shape) - 1))
        for name, number, shape in zip(names, numbers, shapes, strict=True)
    }
    convert = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"]
    sent = convert(checkpoint=rows, config=model.config)

    pieces: dict[int, list[tuple[str, Tensor, Tensor]]] = {}  # a source, its rows there, the rows
    for source, tensor in model.state_dict().items():
        came = sent[source].flatten()
        values = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
        if len(came) != len(values):
            raise ValueError(f"{original}: {len(came)} rows for the {len(values)} of {source}")
        for owner in owners[came].unique().tolist():
            here = owners[came] == owner
            pieces.setdefault(owner, []).append((source, came[here], values[here]))
    tensors, parts = {}, {}
    for owner, of in pieces.items():
        sources, places, parted = zip(*of, strict=True)
        name, shape = names[owner].removeprefix(PREFIX), shapes[owner]
        if sum(values.numel() for values in parted) != shape.numel():
            raise ValueError(f"{original}: {name} of {[*shape]} has another size than {sources}")
        order = torch.cat(places).argsort().to(parted[0].device)
        tensors[name] = torch.cat(parted)[order].reshape(shape)
        parts[name] = list(sources)
    return tensors, parts
