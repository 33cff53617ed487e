"""Models with frozen linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.models import LoraLinear, fill_b

FUSED = torch.ops.falqon.merged_linear.default
WIDTH = 64


class Attention(nn.Module):
    """Adapters on q and v alone, as PEFT's default for Llama."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q = LoraLinear(WIDTH, WIDTH, dtype=dtype)
        self.k = nn.Linear(WIDTH, 2 * WIDTH, bias=False, dtype=dtype).requires_grad_(False)
        self.v = LoraLinear(WIDTH, WIDTH, scaling=0.5, dtype=dtype)
        self.o = nn.Linear(WIDTH, WIDTH, bias=True, dtype=dtype).requires_grad_(False)
        fill_b(self, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.k(x).chunk(2, -1)
        return self.o(self.q(x) * first.tanh() + self.v(x) * second.tanh())


def fused(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=FUSED))


class Frozen(nn.Module):
    """One frozen linear; ``function(layer, x)`` computes with it."""

    def __init__(
        self, function: Any = None, out: int = 80, features: int = 72, **layer: Any
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(features, out, **layer).requires_grad_(False)
        self.function = function or (lambda m, x: m.proj(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Lm(nn.Module):
    """An embedding, two layers and a head, with its weight tied to the embedding's or not."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, WIDTH)
        self.proj, self.small = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 32)
        self.gate, self.head_norm = nn.Linear(WIDTH, 2), nn.LayerNorm(WIDTH)
        self.to_logits = nn.Linear(WIDTH, 96, bias=False)
        if tie:
            self.to_logits.weight = self.embed.weight
        self.lm_head = nn.Linear(WIDTH, 128)
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        x = self.head_norm(self.proj(self.embed(tokens)))
        routes = self.gate(x).softmax(-1)
        return self.small(x), routes, self.to_logits(x), self.lm_head(x)
