"""Tiny mixtures of experts in FP8 with a scale per block, written by transformers itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from tests import zoo
from tests.zoo_options import OPTIONS

SIZE = (8, 16)  # rows and columns of a block
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
# The layers that PEFT adapts beside the experts.
TARGETS = {
    "qwen3_moe": ["q_proj", "o_proj"],
    "minimax_m2": ["q_proj", "o_proj"],
    "minimax_m3_vl_text": ["q_proj"],
    "glm4_moe": ["q_proj", "o_proj"],
    "deepseek_v3": ["q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
    "deepseek_v4": ["q_a_proj", "kv_proj"],
    "qwen3": ["q_proj", "down_proj"],
}
# Layers that predict further tokens, which the models of transformers have no place for.
PREDICTORS = {
    "deepseek_v3": "model.layers.61.",
    "glm4_moe": "model.layers.46.",
    "deepseek_v4": "mtp.0.",
}


def lora(family: str) -> peft.LoraConfig:
    stacks = None if family == "qwen3" else STACKS
    return peft.LoraConfig(
        r=4, target_modules=TARGETS.get(family, ["q_proj"]), target_parameters=stacks
    )


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def saved_by_transformers(family: str, folder: Path, scales: str) -> Path:
    """As transformers writes a model that it has cast to FP8 itself: each expert's weights alone,
    their scales in one tensor for a stack.
    """
    cls: Any = transformers.CONFIG_MAPPING[family]
    own = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    known = {name: value for name, value in own.items() if zoo._takes(cls(), name)}
    config = cls(**{**zoo._options(cls, OPTIONS.get(family, {})), **known, "use_cache": False})
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "dense")
    settings = transformers.FineGrainedFP8Config(
        weight_block_size=SIZE, scale_fmt=scales, modules_to_not_convert=["lm_head", "mlp.gate"]
    )
    return _saved(folder / "dense", folder / "saved", settings)


def _saved(source: Path, out: Path, settings: Any = None) -> Path:
    """What transformers loads and saves in FP8, which it does where it sees a GPU alone."""
    given = {} if settings is None else {"quantization_config": settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, **given
        )
        model.save_pretrained(out, max_shard_size="30KB")
    assert (out / "model.safetensors.index.json").is_file()
    return out


def published(family: str, folder: Path, scales: str) -> Path:
    """As the family is published: scales beside each expert's weights, several files and an index;
    a layer that predicts further tokens, where the family has one.
    """
    source = saved_by_transformers(family, folder, scales)
    tensors = _scales_apart(tensors_in(source))
    (folder / "apart").mkdir()
    shutil.copy(source / "config.json", folder / "apart")
    save_file(tensors, folder / "apart/model.safetensors", metadata={"format": "pt"})
    out = _saved(folder / "apart", folder / "published")
    assert tensors_in(out).keys() == tensors.keys()
    if family in PREDICTORS:
        _add_predictor(out, PREDICTORS[family])
    return out


def _scales_apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        experts, _, stack = name.removesuffix("_scale_inv").rpartition(".")
        if name.endswith(".weight_scale_inv") or not name.endswith("_scale_inv"):
            found[name] = tensor
            continue
        mixtral = f"{experts}.0.w1.weight" in tensors
        both = ("w1", "w3") if mixtral else ("gate_proj", "up_proj")
        names = both if stack == "gate_up_proj" else ("w2",) if mixtral else ("down_proj",)
        for expert, scale in enumerate(tensor):
            rows = len(scale) // len(names)
            for i, part in enumerate(names):
                own = scale[i * rows : (i + 1) * rows].clone()
                found[f"{experts}.{expert}.{part}.weight_scale_inv"] = own
    return found


def _add_predictor(folder: Path, prefix: str) -> None:
    code = torch.ones(16, 16).to(torch.float8_e4m3fn)
    layer = {f"{prefix}eh_proj.weight": code, f"{prefix}eh_proj.weight_scale_inv": torch.ones(2, 1)}
    layer |= {f"{prefix}enorm.weight": torch.ones(16), f"{prefix}mlp.up.weight": code.clone()}
    save_file(layer, folder / "predictor.safetensors", metadata={"format": "pt"})
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= dict.fromkeys(layer, "predictor.safetensors")
    file.write_text(json.dumps(index))


OF_V4 = {
    "model.embed_tokens.": "embed.",
    "model.hc_head.hc_": "hc_head_",
    "model.": "",
    ".weight_scale_inv": ".scale",
}


def as_deepseek_publishes_v4(source: Path, out: Path) -> Path:
    """Under its own names, which transformers does not write, the experts in MXFP4: two codes a
    byte and a power of two for 32 in a row.
    """
    given = tensors_in(source)
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in given.items():
        rows, columns = (
            given[name.removesuffix("_scale_inv")].shape if ".experts." in name else (0, 0)
        )
        if rows and name.endswith(".weight"):
            size = (rows, columns // 2)
            tensor = torch.randint(-128, 128, size, dtype=torch.int8, generator=generator)
        elif rows:
            exponents = torch.randint(-9, -3, (rows, columns // 32), generator=generator)
            tensor = exponents.float().exp2().to(torch.float8_e8m0fnu)
        for theirs, ours in OF_V4.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"].pop("expert_dtype", None)
    config["expert_dtype"] = "fp4"
    (out / "config.json").write_text(json.dumps(config))
    return out


def dense(folder: Path, names: Collection[str], **how: Any) -> dict[str, Tensor]:
    """Weights as transformers decodes them, float32, by their own names."""
    cls: Any = transformers.AutoModelForCausalLM
    model: Any = cls.from_pretrained(folder, dtype=torch.float32, **how)
    return {name: model.get_parameter(name).detach() for name in names}
