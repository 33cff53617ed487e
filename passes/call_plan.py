"""Where a call of a rewritten graph finds the parameters that its bases are looked up by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from falqon_fx.passes.insert_operands import Operands
from falqon_fx.passes.scope import attribute
from falqon_fx.passes.slots import CopySlot
from falqon_fx.site.found import Parameters
from falqon_fx.site.transposed import Held


@dataclass(frozen=True)
class CallPlan:
    """Where the parameters of a graph lie among the values of a call: its arguments, and behind
    them the ``attributes`` of the graph module.
    """

    places: Mapping[fx.Node, int]
    attributes: tuple[str, ...]
    owners: tuple[int, ...]
    scales: tuple[int, ...]
    adapters: tuple[int, ...]
    copies: tuple[tuple[CopySlot, tuple[int, ...], Held], ...]  # with the numbers of their bases

    @classmethod
    def of(cls, gm: fx.GraphModule, operands: Operands, arguments: int) -> CallPlan:
        placeholders = gm.graph.find_nodes(op="placeholder")[:arguments]
        found = gm.graph.find_nodes(op="get_attr")
        attributes = [n for n in found if isinstance(attribute(gm, str(n.target)), Tensor)]
        places = {node: place for place, node in enumerate([*placeholders, *attributes])}
        given = [nodes.given for nodes in operands.bases]
        number = {id(nodes): i for i, nodes in enumerate(operands.bases)}
        pairs = [adapter for _, adapter in operands.pairs]
        return cls(
            places,
            tuple(str(node.target) for node in attributes),
            owners=tuple(places[nodes[0]] for nodes in given),
            scales=tuple(places[nodes[1]] for nodes in given if len(nodes) > 1),
            adapters=tuple(places[node] for p in pairs for node in (p.lora_a, p.lora_b)),
            copies=tuple(
                (c.slot, tuple(number[id(b)] for b in c.bases), Held()) for c in operands.copies
            ),
        )

    def values(self, gm: fx.GraphModule, args: Sequence[Any]) -> list[Any]:
        return [*args, *(attribute(gm, name) for name in self.attributes)]

    def value(self, node: fx.Node, values: Sequence[Any]) -> Tensor:
        value = values[self.places[node]]
        assert isinstance(value, Tensor)
        return value

    def parameters(self, values: Sequence[Any]) -> Parameters:
        """What a call's bases are found by."""
        groups = (self.owners, self.scales, self.adapters)
        return Parameters(*([values[i] for i in places] for places in groups))
