"""Models trained with update="rows"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from tests.models import freeze_a, lora_b, tiny_mlp
from tests.sites import snapshot

OPTIONS = {"update": "rows", "inner": "eager"}
PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["base", "prepared"])
SITES = ("base_model.model.0", "base_model.model.2")


def mlp(prepared: bool = False, **options: Any) -> tuple[nn.Module, nn.Module]:
    """PEFT on two layers, A frozen, and its compiled wrapper."""
    pytest.importorskip("peft")
    model = freeze_a(tiny_mlp())
    if prepared:
        falqon_fx.prepare(model, FalqonConfig(**{**OPTIONS, **options}), progress=False)
    return model, compiled(model, **options)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="falqon", options={**OPTIONS, **options})


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(lora_b(model), lr=0.5)


def states_of(model: nn.Module) -> dict[str, list[Tensor]]:
    return {path: snapshot(state) for path, state in falqon_fx.adapters(model).items()}
