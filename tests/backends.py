"""Models compiled by the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models import (
    Relu,
    freeze_a,
)

ROWS = {"update": "rows"}


def compiled(model: nn.Module, inner: str = "eager", **options: Any) -> Any:
    return torch.compile(model, backend="falqon", options={"inner": inner, **options})


def made(kind: type[nn.Module] = Relu, update: str = "adapter", **options: Any) -> nn.Module:
    """A model, with A frozen where rows are written."""
    model = kind(**options)
    return freeze_a(model) if update == "rows" else model
