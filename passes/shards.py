"""What a graph of tensor parallelism says: which nodes are cut over processes, and how.

Dynamo traces a DTensor as it is: ``from_local`` makes one of this process's part, ``redistribute``
cuts it in another way, ``to_local`` gives this process's part back. What lies between the last two
is communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from falqon_fx._compat import is_dtensor, value_of
from falqon_fx.passes.scope import Scope

# Why a layer on DTensors is no site, and what would make it one.
CUT_OTHERWISE = (
    "its parameters are cut over processes, but not W and B by even columns, nor W and A by even "
    "rows",
    "Use ColwiseParallel on base_layer and lora_B, or RowwiseParallel on base_layer and lora_A, on "
    "a number of processes that divides the layer, with torch 2.13 or newer; it runs unmerged, as "
    "it was",
)


def cut_of(node: object) -> Any:
    """The placement of a DTensor on a mesh of one dimension; None for anything else."""
    value: Any = value_of(node) if isinstance(node, fx.Node) else None
    if not is_dtensor(value) or value.device_mesh.ndim != 1:
        return None
    return value.placements[0]


def is_even(value: Any) -> bool:
    """Whether a DTensor is cut into parts of one size."""
    placement, count = value.placements[0], value.device_mesh.size()
    return not placement.is_shard() or int(value.shape[placement.dim]) % int(count) == 0


def is_from_local(node: fx.Node) -> bool:
    """Whether a DTensor is made of local tensors."""
    from torch.distributed.tensor import DTensor

    return node.op == "call_function" and node.target == DTensor.from_local


def is_redistribute(node: fx.Node) -> bool:
    """Whether a DTensor is cut in another way."""
    return node.op == "call_method" and node.target == "redistribute"


def is_to_local(node: fx.Node) -> bool:
    """Whether a DTensor's part on this process is taken."""
    return node.op == "call_method" and node.target == "to_local"


def is_plain_to_local(node: fx.Node) -> bool:
    """Whether its gradient is cut as the value is."""
    return is_to_local(node) and len(node.args) == 1 and not node.kwargs


def sums_gradients(node: fx.Node) -> bool:
    """Whether it takes the part of a DTensor whose gradient is the sum of the processes' own."""
    from torch.distributed.tensor import Partial

    return is_to_local(node) and _gradient(node) == (Partial(),)


def _gradient(node: fx.Node) -> tuple[Any, ...]:
    given: Any = node.kwargs.get("grad_placements", node.args[1] if len(node.args) > 1 else None)
    return tuple(given or ())


def mesh_node(node: fx.Node) -> Any:
    """The mesh that a ``from_local`` is given."""
    return node.kwargs.get("device_mesh", node.args[1] if len(node.args) > 1 else None)


def real_mesh(mesh: fx.Node) -> Any:
    """The mesh that an input is; Dynamo has a stand-in for it."""
    value = value_of(mesh)
    return getattr(value, "real_obj", value)


@dataclass(frozen=True)
class Crossing:
    """``local`` → from_local → redistribute … → ``end``, a ``to_local``: communication."""

    local: fx.Node
    made: fx.Node
    steps: tuple[fx.Node, ...]
    end: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.made, *self.steps, self.end)

    @property
    def sums(self) -> bool:
        """Whether it adds up what the processes have."""
        return bool(cut_of(self.made).is_partial())

    @property
    def enters(self) -> bool:
        """Whether every process gets all of it, and its gradient is the sum of theirs."""
        return cut_of(self.end.args[0]).is_replicate() and sums_gradients(self.end)

    def same(self, other: Crossing) -> bool:
        """Whether the other one moves data in the same way."""
        ways = [(cut_of(c.made), cut_of(c.end.args[0]), _gradient(c.end)) for c in (self, other)]
        return mesh_node(self.made) is mesh_node(other.made) and ways[0] == ways[1]

    def copy(self, graph: fx.Graph, local: fx.Node) -> fx.Node:
        """The same for another local tensor of that shape, whatever its dtype."""
        new, dtype = {self.local: local}, value_of(local).dtype
        for node in self.nodes:
            new[node] = graph.node_copy(node, lambda n: new.get(n, n))
            set_value(new[node], value_of(node).to(dtype))
        return new[self.end]


def crossing(end: fx.Node) -> Crossing | None:
    """The communication that ends in a ``to_local``."""
    if not is_to_local(end) or cut_of(end.args[0]) is None:
        return None
    steps: list[fx.Node] = []
    node = end.args[0]
    while isinstance(node, fx.Node) and is_redistribute(node):
        steps.insert(0, node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or not is_from_local(node) or cut_of(node) is None:
        return None
    local = node.args[0]
    return Crossing(local, node, tuple(steps), end) if isinstance(local, fx.Node) else None


def note_group(mesh: fx.Node, group: tuple[str, int]) -> None:
    """Note the name and the size of the process group of a mesh that is an input of the root."""
    mesh.meta["falqon_group"] = group


def group_of(scope: Scope, found: Crossing) -> tuple[str, int] | None:
    """The name and the size of the process group that a crossing goes over, where it is noted."""
    group: tuple[str, int] | None = scope.outer(mesh_node(found.made)).meta.get("falqon_group")
    return group


def set_value(node: fx.Node, value: Any) -> None:
    """Give a node the value that it has in the traced call."""
    node.meta["val" if "val" in node.meta else "example_value"] = value


def local_of(value: Any) -> Tensor:
    """This process's part of a DTensor's value, as a parameter where that is one."""
    local: Tensor = value.to_local()
    if isinstance(value, nn.Parameter):
        return nn.Parameter(local.detach(), requires_grad=value.requires_grad)
    return local


def placeholders(root: Scope) -> dict[fx.Node, list[fx.Node]]:
    """The root's inputs, each with the nodes that stand for it: itself and inputs of checkpoints'
    bodies.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    for scope in root.walk():
        for node in scope.gm.graph.find_nodes(op="placeholder"):
            outer = scope.outer(node)
            if outer.op == "placeholder":
                found.setdefault(outer, []).append(node)
    return found


def body_calls(root: Scope) -> set[fx.Node]:
    """The calls of checkpoints' bodies."""
    return {scope.call for scope in root.walk() if scope.call is not None}


def readers(aliases: list[fx.Node], calls: set[fx.Node]) -> Iterator[fx.Node]:
    """What reads an input in any scope, the ``calls`` of checkpoints' bodies aside."""
    return (user for node in aliases for user in node.users if user not in calls)
