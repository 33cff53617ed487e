"""What training loops are compared by: parameters, values, and FP8 bases that stay in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx.model.prepare import Adapter
from tests.emulation import cast
from tests.training import all_equal

each_inner = pytest.mark.parametrize("inner", ["eager", "aot_eager"])


def parameters(model: nn.Module, kind: str = "") -> list[nn.Parameter]:
    """Those that are trained; ``kind``: "lora_A" or "lora_B" alone."""
    return [p for name, p in model.named_parameters() if p.requires_grad and kind in name]


def values(tensors: list[nn.Parameter]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def on_grid(model: nn.Module) -> nn.Module:
    """Round the weights of the base layers to FP8: casting them again changes nothing."""
    for name, weight in model.named_parameters():
        if "base_layer" in name and weight.dim() == 2:
            codes, scale = cast(weight.detach(), torch.float8_e4m3fn, per_row=True, pow2=True)
            weight.data.copy_(codes * scale)
    return model


@dataclass(frozen=True)
class Bases:
    """Where the FP8 bases of a model lie, and what they are."""

    places: dict[str, tuple[int, int]]
    bytes: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> Bases:
        states: dict[str, Any] = falqon_fx.adapters(model)
        assert all(isinstance(state, Adapter) for state in states.values())
        return cls(
            {path: (s.weight.data_ptr(), s.scale.data_ptr()) for path, s in states.items()},
            {
                path: (s.weight.view(torch.uint8).clone(), s.scale.clone())
                for path, s in states.items()
            },
        )

    def assert_still(self, model: nn.Module) -> None:
        """The same bases in the same memory."""
        now = Bases.of(model)
        assert len(now.places) > 0
        assert now.places == self.places
        for path, found in now.bytes.items():
            assert all_equal([*found], [*self.bytes[path]]), path
