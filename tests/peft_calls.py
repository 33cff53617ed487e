"""What the tests of PEFT's calls share: a model and its twin, compiled anew after each call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from tests import tolerances as tol
from tests.models import fill_b, freeze_a, tiny_mlp

CONFIG = FalqonConfig(inner="eager")
ROWS = FalqonConfig(inner="eager", update="rows", rounding="nearest", topk=10)
SITES = ["base_model.model.0", "base_model.model.2"]
WHEN = pytest.mark.parametrize("when", ["before", "after"])


def made(prepared: bool = False, config: FalqonConfig = CONFIG, **lora: object) -> nn.Module:
    """An adapter that was trained before, always the same."""
    torch.manual_seed(0)
    model = tiny_mlp(**lora)
    fill_b(model, 0.1)
    if config is ROWS:
        freeze_a(model)
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    return model


def compiled(model: nn.Module, config: FalqonConfig = CONFIG) -> Any:
    return torch.compile(model, backend="falqon", options=dict[str, Any](config=config))


def inputs() -> Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(3))


def afresh(model: nn.Module) -> Tensor:
    """What a copy of a model gives that nothing was compiled of before."""
    torch._dynamo.reset()
    return compiled(copy.deepcopy(model))(inputs()).detach()


def after(
    act: Callable[[nn.Module], object], prepared: bool, when: str
) -> tuple[Tensor, nn.Module, Tensor]:
    """What a compiled model gives after a call of PEFT's, and what it gave before it."""
    model = made(prepared)
    first = compiled(copy.deepcopy(model))(inputs()).detach()
    call = compiled(model)
    if when == "after":
        assert torch.equal(call(inputs()), first)
    act(model)
    return call(inputs()).detach(), model, first


def other_config(rank: int = 4) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"])


def other(rank: int = 4) -> nn.Module:
    """The same base weights with another adapter."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    torch.manual_seed(9)
    model = peft.get_peft_model(base, other_config(rank))
    fill_b(model, 0.3, seed=9)
    return model


def load(path: Path, name: str) -> Callable[[nn.Module], None]:
    def act(model: nn.Module) -> None:
        model.load_adapter(path, name)
        model.set_adapter(name)

    return act


def trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def activate(model: nn.Module, rank: int = 4) -> None:
    """Add another adapter and switch to it, without a file."""
    model.add_adapter("other", other_config(rank))
    model.set_adapter("other")
    source = dict(other(rank).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.copy_(source[name.replace(".other.", ".default.")])


def replace(model: nn.Module) -> None:
    activate(model)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]


def cast(a: tol.Approx) -> tol.Approx:
    """A row at a time to E4M3; a scale of a power of two is below 2·amax/448."""
    e4m3 = torch.float8_e4m3fn
    scale = 2 * a.largest.amax(1, keepdim=True) / torch.finfo(e4m3).max
    return tol.Approx(a.value, a.bound + tol.fp8_cast_bound(a.largest, scale, e4m3))
