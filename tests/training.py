"""What tests of training loops share: the optimizer, and what a run changes."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx.site.record import STEP


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-2, **options)


def steps(model: nn.Module) -> list[int]:
    """How many steps of B each site has written, with update="rows"."""
    return [int(state.counters[STEP]) for state in falqon_fx.adapters(model).values()]


def weights(model: nn.Module) -> list[Tensor]:
    """What training may change: the adapters, all else that trains, and every site's FP8 state."""
    named = model.named_parameters()
    live: list[Tensor] = [p for name, p in named if p.requires_grad or "lora_" in name]
    for state in falqon_fx.adapters(model).values():
        live += getattr(state, "tensors", (state.weight, state.scale))
    return [(t.view(torch.uint8) if t.element_size() == 1 else t).detach().clone() for t in live]


def all_equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))
