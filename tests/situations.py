"""What the tests of situations share: models as they are compiled, and what of them is compared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from tests.models import (
    train,
)
from tests.training import adam

INNER = pytest.mark.parametrize("inner", ["eager", "aot_eager"])
PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
UPDATES = pytest.mark.parametrize("update", ["adapter", "rows"])


def options(inner: str = "eager", **others: Any) -> dict[str, Any]:
    """Rows of nearest rounding are the same whatever the site is called."""
    rows = {"rounding": "nearest"} if others.get("update") == "rows" else {}
    return {"inner": inner, **rows, **others}


def compiled(model: nn.Module, inner: str = "eager", **others: Any) -> Any:
    return torch.compile(model, backend="falqon", options=options(inner, **others))


def adapter(model: nn.Module) -> list[Tensor]:
    """A and B of every site."""
    return [p.detach() for name, p in model.named_parameters() if "lora_" in name]


def codes(model: nn.Module) -> list[Tensor]:
    """The FP8 bytes of every site."""
    return [state.weight.view(torch.uint8) for state in falqon_fx.adapters(model).values()]


def alone(model: nn.Module, x: Tensor, steps: int, **others: object) -> list[Tensor]:
    """A and B after training a copy of a model with nothing else around it."""
    torch._dynamo.reset()
    own = copy.deepcopy(model)
    train(compiled(own, **others), adam(own), x, steps)
    torch._dynamo.reset()
    return adapter(own)
