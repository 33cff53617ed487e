"""Models of either update, compiled."""

from __future__ import annotations

import pytest
from torch import nn

# What a test says of training, for both ways in which steps reach W'.
UPDATES = {"adapter": {}, "rows": {"update": "rows", "rounding": "nearest"}}
each_update = pytest.mark.parametrize("update", UPDATES)


def of_update(model: nn.Module, update: str) -> nn.Module:
    """A model as ``update`` takes it: "rows" wants A frozen."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name and update == "rows":
            parameter.requires_grad_(False)
    return model
