"""Small folders of each kind, as attacks damage them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from falqon_fx.site.numerics import E4M3


def tiny() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def lora() -> Any:
    return peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def fp8_of_others(folder: Path) -> Path:
    """A compressed-tensors checkpoint, one scale per row."""
    model = tiny()
    model.save_pretrained(folder / "fp8")
    (file,) = (folder / "fp8").glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if "_proj" in name]:
        scale = tensors[name].float().abs().amax(1, keepdim=True) / 448
        tensors[f"{name}_scale"] = scale
        tensors[name] = (tensors[name].float() / scale).to(E4M3)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}}
    (folder / "fp8" / "config.json").write_text(json.dumps(config))
    return folder / "fp8"
