"""Layers that `explain` can't run on fake tensors: their weights are of a class that keeps more in
Python than its elements, which their code reads and writes in ``forward``. bitsandbytes' are.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from falqon_fx.errors import FalqonError
from falqon_fx.site.names import join, modules_of
from falqon_fx.site.quantized import own_state, quantized_as


def opaque_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers, by path. One that is exactly an ``nn.Linear`` reads the elements alone.

    Raises:
        FalqonError: such a weight in a layer of another kind, whose output could be anything.
    """
    found: dict[str, nn.Linear] = {}
    for path, module in modules_of(model):
        own = [(n, p) for n, p in vars(module)["_parameters"].items() if p is not None]
        for name, parameter in own:
            if not own_state(parameter) or type(module) is nn.Linear:
                continue
            if isinstance(module, nn.Linear) and name == "weight":
                found[path] = module
            elif quantized_as(parameter) is not None:
                raise FalqonError(
                    join(path, name),
                    f"it is a {type(parameter).__name__}, as which explain's fake tensors can't "
                    f"stand, and what a {type(module).__name__} makes of it is not known",
                    "Compile the model: the backend warns of each layer that it leaves as it was",
                )
    return found


def codes_of(layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """What stands for the weights, by their names: integers, floating point by its bytes (codes may
    be kept in any dtype). Call it in a fake mode.
    """
    return {join(path, "weight"): _codes(layer.weight) for path, layer in layers.items()}


def _codes(weight: Tensor) -> Tensor:
    size, dtype = [*weight.shape], weight.dtype
    if dtype.is_floating_point:
        size[-1], dtype = size[-1] * dtype.itemsize, torch.uint8
    empty = torch.empty(size, dtype=dtype, device=weight.device)
    return nn.Parameter(empty, requires_grad=False)


@contextmanager
def standing_in(layers: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Within, the layers don't run code of their own: they are products with weights [out, in] that
    are made of their `codes_of`.
    """
    given = [(vars(layer), vars(layer).get("forward")) for layer in layers.values()]
    try:
        for layer in layers.values():
            vars(layer)["forward"] = types.MethodType(_forward, layer)
        yield
    finally:
        for attributes, forward in given:
            del attributes["forward"]
            if forward is not None:
                attributes["forward"] = forward


def _forward(self: nn.Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    decoded = self.weight.new_empty(self.out_features, self.in_features, dtype=x.dtype)
    return F.linear(x, decoded).to(x.dtype)  # under autocast, too


def told(layers: Mapping[str, nn.Linear]) -> Iterator[str]:
    """What a report is to say of it."""
    kinds = Counter((type(m).__name__, type(m.weight).__name__) for m in layers.values())
    for (layer, weight), count in kinds.items():
        yield (
            f"the code of {layer} did not run ({count}): fake tensors can't stand for its weight, "
            f"{weight}. Its output is taken to be [..., out_features] in the dtype of x"
        )
