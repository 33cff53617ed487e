"""A transformers folder: an empty model from its config, filled from its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.files import storage
from falqon_fx.files.model_state import Site, make_layer

INDEX = "model.safetensors.index.json"


def fill(
    model: Any,
    layers: Mapping[str, tuple[Site, Mapping[str, Tensor]]],
    tensors: Mapping[str, Tensor],
    where: str,
) -> nn.Module:
    """Give a model on the meta device its FP8 layers (`falqon_fx.files.model_state.make_layer`) and
    its other tensors, as they are. New adapters start as PEFT starts them.

    Raises:
        FalqonError: a tensor without a place, or a place without a tensor.
    """
    for path, (site, found) in layers.items():
        bias = model.get_submodule(path).bias
        model.set_submodule(path, make_layer(site, found, bias, path))
    named = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        inside = f"{path}.base_layer.{last}"  # PEFT wrapped the layer
        named[inside if _exists(model, inside) else name] = tensor
    unknown = model.load_state_dict(named, strict=False, assign=True).unexpected_keys
    model.get_base_model().tie_weights()
    if unknown:
        raise FalqonError(unknown[0], f"it is in {where} but not in the model", "Check config.json")
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            fresh = _new_parameter(name, parameter.shape, where)
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, nn.Parameter(fresh, parameter.requires_grad))
    loaded: nn.Module = model
    return loaded


def _new_parameter(name: str, shape: torch.Size, where: str) -> Tensor:
    """A parameter of a new adapter, as PEFT starts it."""
    starts: dict[str, Callable[[torch.Size], Tensor]] = {
        "lora_A": new_lora_a,
        "lora_B": torch.zeros,
        "lora_embedding_A": torch.zeros,
        "lora_embedding_B": torch.randn,
    }
    known = [start for part, start in starts.items() if part in name.split(".")]
    if known:
        return known[0](shape)
    if ".lora_" in name:  # such as DoRA's magnitude, the norm of each row of the weight
        raise FalqonError(
            name,
            "it starts from the dense weight, which is not loaded",
            "Load the model with transformers, and call falqon_fx.prepare(model)",
        )
    raise FalqonError(name, f"the model needs it, {where} lacks it", "Check config.json")


def _exists(model: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    try:
        return hasattr(model.get_submodule(path), last)
    except AttributeError:
        return False


def read_index(source: Path) -> dict[str, str]:
    """The file that holds each tensor of a checkpoint."""
    if not (source / "config.json").is_file():
        raise FalqonError(str(source), "there is no config.json in it", "Name a model's folder")
    if (source / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((source / INDEX).read_text())["weight_map"]
        return weight_map
    index: dict[str, str] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name in storage.read_header(file):
            if name in index:
                raise FalqonError(
                    name,
                    f"{index[name]} and {file.name} both hold it, and {source} has no {INDEX}",
                    "Remove the file that doesn't belong to the model",
                )
            index[name] = file.name
    if not index:
        raise FalqonError(
            str(source),
            "there are no safetensors in it",
            "Save the model with model.save_pretrained(folder) first",
        )
    return index


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file, read and not mapped, so that its memory is given back with it."""
    from safetensors import safe_open

    with (
        storage.file_errors_explained(file),
        safe_open(file, framework="pt", backend="pread") as opened,
    ):
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def lora_config(lora: Any) -> Any:
    """The given adapter config, or rank 16 on all linear layers."""
    peft = storage.require("peft", "export")
    return lora or peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def empty_model(source: Path, lora: Any) -> Any:
    """A PEFT model of a folder's config whose parameters are on the meta device."""
    peft = storage.require("peft", "export")
    transformers = storage.require("transformers", "export")
    accelerate = storage.require("accelerate", "export")
    config = transformers.AutoConfig.from_pretrained(source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.config._name_or_path = str(source)
    if transformers.GenerationConfig and (source / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(source)
    return peft.get_peft_model(model.eval(), lora, low_cpu_mem_usage=True)


def new_lora_a(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """A as PEFT starts it, float32 [r, in]."""
    return nn.init.kaiming_uniform_(torch.empty(*shape), a=5**0.5, generator=generator)
