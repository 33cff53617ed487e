"""A layer with LoRA written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests.passes.test_match import One


class Layer(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.base = nn.Linear(24, 20).requires_grad_(False)
        self.a, self.b = nn.Linear(24, 4, bias=False), nn.Linear(4, 20, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def base_model() -> One:
    torch.manual_seed(0)
    return One(nn.Linear(24, 20).requires_grad_(False))


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["proj"], **options)
