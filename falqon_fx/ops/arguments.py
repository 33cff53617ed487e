"""The arguments of ``falqon::merged_linear`` and of its gradient by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Merged(NamedTuple):
    """The arguments of `falqon_fx.ops.merged_linear.merged_linear`, described there, in order."""

    x: Tensor
    weight: list[Tensor]
    scale: list[Tensor]
    bias: list[Tensor]
    a: list[Tensor]
    a_scale: list[Tensor]
    b: list[Tensor]
    alpha: list[Tensor]
    clamped: list[Tensor]
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    adapter_x: list[Tensor]
    owner: list[int]
    scaling: list[float]
    keep_x: bool
    turned: list[Tensor]
    joined: list[Tensor]
    channels: list[Tensor]
    out_dtype: torch.dtype
    spec_text: str

    def adapters_of(self, site: int) -> list[int]:
        """The numbers of the adapters of a site."""
        return [j for j, owner in enumerate(self.owner) if owner == site]

    @property
    def ranks(self) -> list[int]:
        """The rank of each adapter, with that of A_c."""
        return [code.shape[0] for code in self.a]

    @property
    def corrected(self) -> dict[int, Tensor]:
        """The channels of x whose cast error the last columns of b_j bring to O, by adapter."""
        wider = [j for j, (a, b) in enumerate(zip(self.a, self.b)) if b.shape[1] > len(a)]
        return dict(zip(wider, self.channels, strict=True))


class MergedGrad(NamedTuple):
    """The arguments of `falqon_fx.ops.fp8_grad.merged_linear_grad`, described there, in order."""

    grad: Sequence[Tensor]
    weight: Sequence[Tensor]
    scale: Sequence[Tensor]
    a: Sequence[Tensor]
    a_scale: Sequence[Tensor]
    b: Sequence[Tensor]
    alpha: Sequence[Tensor]
    counted: Sequence[Tensor]
    owner: Sequence[int]
    through_x: bool
    needs_x: bool
    turned: Sequence[Tensor]
    x_dtype: torch.dtype
    spec_text: str
