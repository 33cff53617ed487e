"""A small model with adapters and what a calibration of it reads."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from tests.sites import randn

EAGER = FalqonConfig(inner="eager")
IN, MIDDLE, OUT, RANK, CHANNELS = 64, 96, 80, 8, 5


class Model(nn.Module):
    """q and k read the same x; ``plain`` has no adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(IN, MIDDLE), nn.Linear(IN, OUT)
        self.plain, self.o = nn.Linear(MIDDLE, MIDDLE, bias=False), nn.Linear(MIDDLE, IN)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        y = self.o(torch.relu(self.plain(torch.relu(self.q(x)))))
        return y + self.k(x).mean(-1, keepdim=True)


def adapted(**lora: Any) -> nn.Module:
    torch.manual_seed(0)
    lora = {"r": 4, "target_modules": ["q", "k", "o"], **lora}
    model = peft.get_peft_model(Model(), peft.LoraConfig(**lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def inputs(count: int = 3, tokens: int = 40) -> list[Tensor]:
    """x whose channels differ in size, as those of language models do."""
    sizes = randn(IN, seed=9).exp()
    return [randn(tokens, IN, seed=i) * sizes for i in range(count)]


def calibrated(config: FalqonConfig = EAGER, **asked: Any) -> nn.Module:
    model = adapted()
    asked = {"compensate": RANK, "outliers": CHANNELS, **asked}
    falqon_fx.prepare(model, config, calibration=inputs(), progress=False, **asked)
    return model
