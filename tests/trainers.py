"""What the tests of trainers share: tiny models, their data, and what of them is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer

from falqon_fx import FalqonConfig
from falqon_fx.model.fp8_linear import Fp8Linear

CONFIG = FalqonConfig(inner="eager")
ROWS = FalqonConfig(inner="eager", update="rows", topk=10)
STEPS, SAVED = 4, 2  # optimizer steps of a run, and the one after which it is saved


def tiny_base() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
SITES = 2


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", **LORA)


def as_trained(model: nn.Module, config: FalqonConfig) -> nn.Module:
    """With update="rows", A is frozen."""
    for name, parameter in model.named_parameters():
        if config.update == "rows" and "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """A and B: all that training changes with update="adapter"."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def moved(model: nn.Module, start: dict[str, Tensor]) -> bool:
    """Whether every A and every B is another one now."""
    found = adapter(model)
    return found.keys() == start.keys() and not any(torch.equal(found[n], start[n]) for n in start)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def arguments(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "eval_strategy": "steps",
        "eval_steps": SAVED,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **others,
    }


def losses(trained: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trained.state.log_history if key in entry]


def all_prepared(model: nn.Module) -> bool:
    sites = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    assert len(sites) == SITES
    return all(isinstance(base, Fp8Linear) for base in sites)
