"""Models that are trained, then unloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig
from tests.models import freeze_a

IDS = torch.arange(12).view(2, 6)


def compiled(model: nn.Module, prepared: bool, **options: Any) -> Any:
    """The compiled wrapper of a model."""
    config = FalqonConfig(**{"inner": "eager", **options})
    if config.update == "rows":
        freeze_a(model)
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    return torch.compile(model, backend="falqon", options=dict[str, Any](config=config))


def train(forward: nn.Module, model: nn.Module, steps: int, rate: float = 0.02) -> list[float]:
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        loss = forward(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
