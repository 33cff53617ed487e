"""Models of either update, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


def compiled(model: nn.Module, inner: str = "eager", **options: Any) -> Any:
    return torch.compile(model, backend="falqon", options={"inner": inner, **options})


# What a test says of training, for both ways in which steps reach W'.
UPDATES = {"adapter": {}, "rows": {"update": "rows", "rounding": "nearest"}}
each_update = pytest.mark.parametrize("update", UPDATES)


def of_update(model: nn.Module, update: str) -> nn.Module:
    """A model as ``update`` takes it: "rows" wants A frozen."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name and update == "rows":
            parameter.requires_grad_(False)
    return model
