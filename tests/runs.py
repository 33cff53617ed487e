"""A training run that is saved, loaded and compared with the one that went on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.files.trees import to_plain
from falqon_fx.model.prepare import Adapter
from tests.models import freeze_a, tiny_mlp
from tests.sites import randn, same, snapshot

STEPS = 6
ROWS = {"update": "rows", "topk": 5}
UPDATES = pytest.mark.parametrize("update", ["adapter", "rows"])
PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])


class Run:
    """A training run: model, optimizer, scheduler, and what has to be equal at its end.

    A and B are trained, with update="rows" B alone.
    """

    def __init__(self, prepared: bool, seed: int = 0, model: nn.Module | None = None, **options):
        torch.manual_seed(seed)
        self.model = tiny_mlp(lora_dropout=0.0) if model is None else model
        rows = options.get("update") == "rows"
        if rows:
            freeze_a(self.model)
        self.config = FalqonConfig(**{"inner": "eager", **(ROWS if rows else {}), **options})
        if prepared:
            falqon_fx.prepare(self.model, self.config, progress=False)
        self.compiled = torch.compile(
            self.model, backend="falqon", options=dict[str, Any](config=self.config)
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
        self.scheduler: torch.optim.lr_scheduler.LRScheduler = (
            torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        )

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            x = randn(4, 32, seed=100 + step)
            loss = (self.compiled(x) - torch.rand(4, 32) - random.random()).square().mean()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        falqon_fx.save_checkpoint(
            self.model, folder, optimizer=self.optimizer, scheduler=self.scheduler
        )

    def load(self, folder: Path) -> None:
        falqon_fx.load_checkpoint(
            self.model, folder, optimizer=self.optimizer, scheduler=self.scheduler
        )

    def states(self) -> dict[str, list[Tensor]]:
        return {path: tensors_of(s) for path, s in falqon_fx.adapters(self.model).items()}


def tensors_of(site: falqon_fx.MergedAdapter | Adapter) -> list[Tensor]:
    """The FP8 tensors of a site, copied."""
    if isinstance(site, falqon_fx.MergedAdapter):
        return snapshot(site)
    return [site.weight.view(torch.uint8).clone(), site.scale.clone()]


def assert_same_run(a: Run, b: Run) -> None:
    named = dict(b.model.named_parameters())
    assert named.keys() == dict(a.model.named_parameters()).keys()
    for name, parameter in a.model.named_parameters():
        assert torch.equal(parameter, named[name]), name
    assert a.states().keys() == b.states().keys()
    assert len(a.states()) == 2
    for path, tensors in a.states().items():
        assert same(tensors, b.states()[path]), path
    slots = [r.optimizer.state_dict()["state"].values() for r in (a, b)]
    for one, other in zip(*slots, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def base_in_half(model: nn.Module) -> nn.Module:
    for name in ("0", "2"):
        model.base_model.model.get_submodule(name).base_layer.half()
    return model


def snapshot_of(run: Run) -> dict[str, Tensor]:
    """Every tensor of a run, under a name."""
    tensors: dict[str, Tensor] = {}
    objects = {"model": dict(run.model.state_dict()), "optimizer": run.optimizer.state_dict()}
    to_plain({**objects, "states": run.states()}, "", tensors)
    return {name: tensor.clone() for name, tensor in tensors.items()}
