"""How much of an adapter adapter_dtype="fp8" has clamped in earlier calls.

A step only counts, on its device. Whoever compiles may wait for the count: a site some of whose
adapter was clamped gets it in bfloat16 from then on, alone of its graph. Processes that compute one
model together keep what they have, as each would count something else.

Blocks that are compiled one by one share a graph, which is made for the first of them: the adapters
of the others count with its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from falqon_fx._compat import is_fake
from falqon_fx.ops.fp8_adapter import clamped
from falqon_fx.passes.scope import Scope, attribute
from falqon_fx.passes.terms import Param
from falqon_fx.site.base import Place, place
from falqon_fx.site.names import model_of_call, tensors_of


class Saturation:
    """The counts of a graph's adapters, found by the B that is among its ``inputs``."""

    def __init__(self, root: Scope, inputs: Sequence[Any]) -> None:
        placeholders = root.gm.graph.find_nodes(op="placeholder")
        self._gm, self._inputs = root.gm, dict(zip(placeholders, inputs, strict=False))

    def __call__(self, scope: Scope, lora_b: Param) -> int:
        if distributed.is_available() and distributed.is_initialized():
            return 0
        value: Any = lora_b.value
        if lora_b.node is not None:
            outer = scope.outer(lora_b.node)
            reads = outer.op == "get_attr"
            value = attribute(self._gm, str(outer.target)) if reads else self._inputs.get(outer)
        if not isinstance(value, Tensor) or not _has_memory(value):
            return 0
        with torch.inference_mode(False):
            return clamped.of(value, *self._of_like_blocks(value))

    def _of_like_blocks(self, lora_b: Tensor) -> list[Tensor]:
        """The B of the same name but for numbers of blocks, of blocks that are not in the graph."""
        kinds = self._kinds.get((place(lora_b), lora_b.shape), ())
        return [t for kind in kinds for t in self._elsewhere.get(kind, ())]

    @functools.cached_property
    def _kinds(self) -> dict[tuple[Place, torch.Size], set[_Kind]]:
        """What the parameters of the model whose call runs are, by where they lie."""
        found: dict[tuple[Place, torch.Size], set[_Kind]] = {}
        for kind, tensor in self._named:
            found.setdefault((place(tensor), tensor.shape), set()).add(kind)
        return found

    @functools.cached_property
    def _elsewhere(self) -> dict[_Kind, list[Tensor]]:
        """Its parameters that are no input of the graph."""
        inputs = [t for t in self._inputs.values() if isinstance(t, nn.Parameter)]
        given = {(place(t), t.shape) for t in inputs if _has_memory(t)}
        found: dict[_Kind, list[Tensor]] = {}
        for kind, tensor in self._named:
            if (place(tensor), tensor.shape) not in given:
                found.setdefault(kind, []).append(tensor)
        return found

    @functools.cached_property
    def _named(self) -> list[tuple[_Kind, Tensor]]:
        found = tensors_of(model_of_call()).values()
        of_model = [(t, names[0]) for t, names in found if isinstance(t, nn.Parameter)]
        return [((_like(name), t.shape), t) for t, name in of_model if _has_memory(t)]


_Kind = tuple[str, torch.Size]  # a parameter's name without numbers of blocks, and its shape


def _has_memory(tensor: Tensor) -> bool:
    return not is_fake(tensor) and not tensor.is_meta


def _like(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
