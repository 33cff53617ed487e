"""update="rows" as a plain model of the contract: loops over rows, and torch's own casts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from falqon_fx import FalqonConfig, MergedAdapter
from falqon_fx.site.record import STEP
from tests.emulation import E4M3, cast
from tests.models import LoraLinear


@dataclass(frozen=True)
class Known:
    """What `emulate` reads of a state."""

    weight: Tensor
    scale: Tensor


OUT, IN, RANK = 12, 16, 3


class Expected:
    """What the state of one site should be, row by row."""

    def __init__(self, layer: LoraLinear, config: FalqonConfig) -> None:
        self.layer, self.config = layer, config
        self.b = layer.lora_B.weight
        self.fresh = True
        self.seen: Any = None

    def forward(self) -> None:
        """A forward pass has begun."""
        drop = self.config.pending == "drop"
        bits = self.bits()
        if self.fresh:
            self.applied = self.b.detach().clone()
            self.writes, self.steps, self.fresh = [0] * OUT, 0, False
            self.rows = self.merged()
        elif bits != self.seen:
            self.steps += 1
            target = self.applied + self.b.detach() if drop else self.b.detach().clone()
            score = (target - self.applied).abs().sum(1).tolist()
            order = sorted(range(OUT), key=lambda i: (-score[i], i))
            for i in order[: self.config.rows(OUT)]:
                if score[i] > 0:
                    self.write(i, target[i])
        self.seen = [0] * (OUT * RANK) if drop else bits  # "drop" zeroes B

    def bits(self) -> list[int]:
        return self.b.detach().view(torch.int32).flatten().tolist()

    def merged(self) -> list[tuple[Tensor, Tensor]]:
        """(codes, scale) of each row of [W + s·B·Â; A]."""
        a_codes, a_scale = cast(self.layer.lora_A.weight.detach(), E4M3, True, True)
        self.a = a_codes * a_scale
        w = self.layer.base_layer.weight.detach()
        merged = w + (self.applied * self.layer.scaling) @ self.a
        codes, scale = cast(merged, E4M3, True, True)
        return [*zip(codes, scale), *zip(a_codes, a_scale)]

    def write(self, i: int, target: Tensor) -> None:
        """From the base weight: one cast, however often a row is written."""
        whole = target * self.layer.scaling
        base = self.layer.base_layer.weight.detach()[i]
        value = base + torch.bmm(whole[None, None], self.a[None])[0, 0]
        row, row_scale = cast(value[None], E4M3, True, True)
        self.rows[i] = (row[0], row_scale[0])
        self.applied[i] = target
        self.writes[i] += 1

    def check(self, state: MergedAdapter) -> None:
        assert torch.equal(state.applied, self.applied)
        assert state.writes.tolist() == self.writes
        assert int(state.counters[STEP]) == self.steps
        for i, (codes, scale) in enumerate(self.rows):
            assert torch.equal(state.weight[i].float(), codes), f"row {i}"
            assert torch.equal(state.scale[i], scale)
        rest = self.b.detach()
        rest = rest if self.config.pending == "drop" else rest - self.applied
        assert torch.equal(state.pending(), rest)
