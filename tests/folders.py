"""Folders of models, dense and prequantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import (
    FalqonConfig,
)
from tests.models import fill_b

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


IDS = torch.arange(12).view(2, 6)
BF16 = torch.bfloat16


def dense_model(tied: bool = False, dtype: torch.dtype = BF16, **options) -> nn.Module:
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False, **options,
    }  # fmt: skip
    config = transformers.LlamaConfig(tie_word_embeddings=tied, **shape)
    return transformers.LlamaForCausalLM(config).to(dtype)


WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}  # enough to gain


def folder_of(model: nn.Module, folder: Path, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})


def prequantize(source: Path, out: Path, config=None, *, workers: int = 1, **options):
    return falqon_fx.prequantize(
        source, out, lora(**options), config, workers=workers, progress=False
    )


def exported(
    folder: Path,
    form: str = "compressed-tensors",
    dtype: torch.dtype = BF16,
    **options,
) -> nn.Module:
    """An FP8 checkpoint in ``folder``, as of others, and the model that it was written from."""
    if form == "fp8":
        options["granularity"] = "tensor"
    model = peft.get_peft_model(dense_model(dtype=dtype), lora())
    fill_b(model, 0.1)
    falqon_fx.prepare(model, FalqonConfig(**options), progress=False)
    falqon_fx.save_fp8(model, folder, form=form, progress=False)
    (folder / "falqon.json").unlink()
    return model
