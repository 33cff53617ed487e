"""A model that is watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import falqon_fx
from tests.models import Stack, freeze_a, lora_b, tiny_mlp

OPTIONS = {"update": "rows", "inner": "eager"}


def model_and_input(**lora: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return freeze_a(Stack(**lora)), torch.randn(6, 32)


def prepared_mlp(**options: Any) -> tuple[nn.Module, Any, dict[str, torch.Tensor]]:
    """A prepared model with two sites, compiled; and the base weights that it had."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = freeze_a(tiny_mlp())
    base = {
        f"base_model.model.{i}": model.base_model.model[i].base_layer.weight.detach().double()
        for i in (0, 2)
    }
    config = falqon_fx.FalqonConfig(**{**OPTIONS, **options})
    falqon_fx.prepare(model, config, progress=False)
    compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    return model, compiled, base


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(lora_b(model), lr=0.5)
