"""What a graph writes in place."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from falqon_fx._compat import OpOverload, unwrap_transforms, value_of
from falqon_fx.passes.scope import Scope


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes in place."""
    if not node.op.startswith("call"):
        return []
    targets: list[Any] = [node.kwargs.get("out")]
    if isinstance(node.target, OpOverload):
        schema = node.target._schema.arguments
        given = [*node.args, *(node.kwargs.get(a.name) for a in schema[len(node.args) :])]
        targets += [x for a, x in zip(schema, given) if a.alias_info and a.alias_info.is_write]
    elif node.args and _writes_first(node):
        targets.append(node.args[0])
    found: list[fx.Node] = []
    fx.map_arg(targets, found.append)
    return found


def _writes_first(node: fx.Node) -> bool:
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or node.target in _IN_PLACE or node.kwargs.get("inplace") is True


_IN_PLACE = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"),
}


def written_parameters(root: Scope) -> set[fx.Node]:
    """The root's leaf nodes whose memory some operation of the graph writes."""
    nodes = [node for scope in root.walk() for node in scope.gm.graph.nodes]
    memory = memory_of(target for node in nodes for target in written(node))
    leaves = [n for n in root.gm.graph.nodes if n.op in ("placeholder", "get_attr")]
    return {node for node in leaves if memory.intersection(memory_of([node]))}


def memory_of(nodes: Iterable[fx.Node]) -> set[int]:
    """What the values of nodes lie in: those that share it are views of one another."""
    values = (value_of(node) for node in nodes)
    plain = [unwrap_transforms(v) for v in values if isinstance(v, Tensor)]
    return {StorageWeakRef(v.untyped_storage()).cdata for v in plain if v.layout is torch.strided}
