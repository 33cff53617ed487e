"""Tensor parallelism: make every linear layer on cut weights one on this process's parts.

A layer cut by columns (W by rows) reads all of x, and its dL/dx is the sum over the processes; one
cut by rows gives a part of the sum that O is. So

    to_local(linear(from_local(x), W))  becomes  linear(enter(x), W_local)
    to_local(redistribute(linear(from_local(x), W)))  becomes  leave(linear(x, W_local))

with `enter` and `leave` in torch's own words (from_local, redistribute, to_local), and parameters
that enter the graph as local tensors. What all other passes see are ordinary layers; how an
adapter's products get on the same side of the communication as its base layer: `passes.hoist`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from falqon_fx._compat import is_dtensor, same_sizes, value_of
from falqon_fx.passes.hoist import hoist
from falqon_fx.passes.normalize import normalize
from falqon_fx.passes.scope import Scope
from falqon_fx.passes.shards import (
    body_calls,
    cut_of,
    is_even,
    is_from_local,
    is_plain_to_local,
    is_redistribute,
    is_to_local,
    local_of,
    mesh_node,
    note_group,
    placeholders,
    readers,
    real_mesh,
    set_value,
    sums_gradients,
)
from falqon_fx.passes.vocabulary import LINEAR, linear_arguments
from falqon_fx.site.shards import LocalParameter


def localize(gm: fx.GraphModule) -> tuple[LocalParameter, ...]:
    """Edit the graph in place; the parameters that it reads as local tensors now.

    What isn't cut by whole rows or columns of even size, or serves something else, stays.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    if not any(is_dtensor(value_of(node)) for node in inputs):
        return ()
    root = normalize(gm, ())
    for scope in root.walk():
        _share_meshes(scope)
    aliases, calls = placeholders(root), body_calls(root)
    layers = _closed(_candidates(root), aliases, calls)
    local = {outer for outer in aliases if _is_local(outer, aliases, calls, layers)}
    for outer in local:
        value = local_of(value_of(outer))
        for node in aliases[outer]:
            set_value(node, value)
    # Parameters of which a process finds a part of the gradient, and the mesh to sum it over.
    summed: dict[fx.Node, fx.Node] = {}
    for layer in layers.values():
        summed |= _Edit(layer).run()
    for scope in root.walk():
        _simplify(scope, local)
    summed |= hoist(gm)
    for scope in root.walk():
        scope.gm.graph.lint()
        scope.gm.recompile()
    places = {node: i for i, node in enumerate(inputs)}
    meshes = {node: places[mesh] for node, mesh in summed.items()}
    return tuple(
        LocalParameter(places[node], meshes.get(node))
        for node in inputs
        if node in local or node in meshes
    )


def _share_meshes(scope: Scope) -> None:
    """Every layer may bring the mesh by an input of its own: the first of equal ones is read."""
    first: list[tuple[Any, fx.Node]] = []
    for node in scope.gm.graph.nodes:
        mesh = mesh_node(node) if is_from_local(node) else None
        if not isinstance(mesh, fx.Node):
            continue
        value = real_mesh(mesh)
        same = next((n for known, n in first if known == value), None)
        if same is None:
            first.append((value, mesh))
            if value.ndim == 1:
                group = value.get_group()
                note_group(scope.outer(mesh), (group.group_name, group.size()))
        elif same is not mesh:
            node.replace_input_with(mesh, same)


@dataclass(frozen=True)
class _Layer:
    """A linear on DTensors: ``way`` is how it is cut, "columns", "rows", "tokens" (an adapter's
    own small product under sequence parallelism) or "whole".
    """

    scope: Scope
    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    way: str
    mesh: fx.Node

    @property
    def x(self) -> fx.Node:
        """What it reads now: the edit of a layer before it may have put another node there."""
        x: fx.Node = linear_arguments(self.node.args, self.node.kwargs)[0]
        return x

    @property
    def params(self) -> list[fx.Node]:
        """The root's inputs that it reads."""
        nodes = [self.weight] if self.bias is None else [self.weight, self.bias]
        return [self.scope.outer(node) for node in nodes]


def _candidates(root: Scope) -> dict[fx.Node, _Layer]:
    found: dict[fx.Node, _Layer] = {}
    for scope in root.walk():
        for node in scope.gm.graph.nodes:
            if node.op == "call_function" and node.target in LINEAR:
                layer = _layer(scope, node)
                if layer is not None:
                    found[node] = layer
    return found


def _layer(scope: Scope, node: fx.Node) -> _Layer | None:
    x, weight, bias = linear_arguments(node.args, node.kwargs)
    given = [weight] if bias is None else [weight, bias]
    if not all(isinstance(n, fx.Node) and _is_parameter(scope, n) for n in given):
        return None
    cuts = [cut_of(n) for n in (x, weight, node)]
    if None in cuts:
        return None
    of_x, of_w, _ = cuts
    last = value_of(x).dim() - 1
    way = ""
    if of_w.is_shard(0) and of_x.is_replicate():
        way = "columns"
    elif of_w.is_shard(1) and of_x.is_shard(last):
        way = "rows"
    elif of_w.is_replicate() and of_x.is_replicate():
        way = "whole"
    elif of_w.is_replicate() and of_x.is_shard() and not of_x.is_shard(last):
        way = "tokens"
    mesh = _mesh_of(x)
    if not way or mesh is None or (way == "rows" and not _leaves(node)):
        return None
    return _Layer(scope, node, weight, bias, way, mesh)


def _mesh_of(x: fx.Node) -> fx.Node | None:
    """The mesh that a DTensor was made on, in this graph."""
    seen, nodes = set(), [x]
    while nodes:
        node = nodes.pop()
        if is_from_local(node):
            mesh = mesh_node(node)
            return mesh if isinstance(mesh, fx.Node) else None
        if node not in seen:
            seen.add(node)
            nodes += [n for n in node.all_input_nodes if cut_of(n) is not None]
    return None


def _is_parameter(scope: Scope, node: fx.Node) -> bool:
    value = value_of(node)
    is_leaf = scope.outer(node).op == "placeholder" and isinstance(value, nn.Parameter)
    return is_leaf and cut_of(node) is not None


def _leaves(node: fx.Node) -> bool:
    """Whether a sum that is still to be added up goes into communication alone."""
    return all(is_redistribute(u) and _ends_local(u) for u in node.users)


def _ends_local(node: fx.Node) -> bool:
    if cut_of(node) is None or cut_of(node).is_partial():
        return False
    return all(is_plain_to_local(u) or (is_redistribute(u) and _ends_local(u)) for u in node.users)


def _closed(
    layers: dict[fx.Node, _Layer], aliases: Mapping[fx.Node, list[fx.Node]], calls: set[fx.Node]
) -> dict[fx.Node, _Layer]:
    """The layers whose parameters serve such layers alone."""
    while True:
        kept = {
            node: layer
            for node, layer in layers.items()
            if all(_is_local(p, aliases, calls, layers) for p in layer.params)
        }
        if len(kept) == len(layers):
            return kept
        layers = kept


def _is_local(
    outer: fx.Node,
    aliases: Mapping[fx.Node, list[fx.Node]],
    calls: set[fx.Node],
    layers: Mapping[fx.Node, _Layer],
) -> bool:
    """Whether a parameter is read by such layers or as a local tensor, and in no other way."""
    value = value_of(outer)
    if not isinstance(value, nn.Parameter) or cut_of(outer) is None or not is_even(value):
        return False
    users = [*readers(aliases[outer], calls)]
    return bool(users) and all(user in layers or is_plain_to_local(user) for user in users)


class _Edit:
    """The rewrite of one layer."""

    def __init__(self, layer: _Layer) -> None:
        self.layer, self.graph = layer, layer.scope.gm.graph

    def run(self) -> dict[fx.Node, fx.Node]:
        """Put the local layer in its place; what then gets a part of its gradient here."""
        layer, node = self.layer, self.layer.node
        whole, linear = value_of(node), cast(Callable[..., Any], node.target)
        rows = layer.way == "rows"
        with self.graph.inserting_before(node):
            x = self._enter() if layer.way == "columns" else self._local_x()
            bias = None if rows else layer.bias
            local = self.graph.call_function(linear, (x, layer.weight, bias))
            self._describe(local, whole.to_local())
            cut = self._cut(local, whole)
        node.replace_all_uses_with(cut)
        self.graph.erase_node(node)
        if rows and layer.bias is not None:
            self._add_bias(cut, layer.bias)
        sums = layer.params if layer.way == "tokens" else []
        if rows and layer.bias is not None and any(u.is_shard() for u in self._ends(cut)):
            sums = layer.params[1:]
        return {p: self._root_mesh() for p in sums if value_of(p).requires_grad}

    def _root_mesh(self) -> fx.Node:
        return self.layer.scope.outer(self.layer.mesh)

    def _enter(self) -> fx.Node:
        """All of x, whose gradient is the sum of what the processes find; one for all readers."""
        from torch.distributed.tensor import Partial

        x = self.layer.x
        for user in x.users:
            if sums_gradients(user):
                x.append(user)
                return user
        with self.graph.inserting_after(x):
            summed: Any = {"grad_placements": (Partial(),)}
            node = self.graph.call_method("to_local", (x,), summed)
        self._describe(node, value_of(x).to_local())
        return node

    def _local_x(self) -> fx.Node:
        node = self.graph.call_method("to_local", (self.layer.x,))
        self._describe(node, value_of(self.layer.x).to_local())
        return node

    def _cut(self, local: fx.Node, whole: Any) -> fx.Node:
        from torch.distributed.tensor import DTensor

        arguments = (local, self.layer.mesh, tuple(whole.placements))
        node = self.graph.call_function(DTensor.from_local, arguments, {"run_check": False})
        self._describe(node, whole)
        return node

    def _ends(self, node: fx.Node) -> list[Any]:
        """How the results are cut that communication makes of a sum."""
        found = []
        for user in node.users:
            found += [cut_of(node)] if is_to_local(user) else self._ends(user)
        return found

    def _add_bias(self, node: fx.Node, bias: fx.Node) -> None:
        """Add the bias behind the sum, or it would be added once per process."""
        for user in [*node.users]:
            if not is_to_local(user):
                self._add_bias(user, bias)
                continue
            readers_of, given = [*user.users], value_of(user)
            wide = torch.promote_types(given.dtype, value_of(bias).dtype)
            with self.graph.inserting_after(user):
                total = self.graph.call_function(operator.add, (user, bias))
            self._describe(total, given.to(wide))
            if wide != given.dtype:  # under autocast a layer's output has not its bias's dtype
                with self.graph.inserting_after(total):
                    total = self.graph.call_method("to", (total, given.dtype))
                self._describe(total, given)
            for reader in readers_of:
                reader.replace_input_with(user, total)

    def _describe(self, new: fx.Node, value: Any) -> None:
        for key in _KEPT & self.layer.node.meta.keys():
            new.meta[key] = self.layer.node.meta[key]
        new.meta["val" if "val" in self.layer.node.meta else "example_value"] = value


_KEPT = {"nn_module_stack", "stack_trace", "source_fn_stack"}


def _simplify(scope: Scope, local: set[fx.Node]) -> None:
    """Take out what moves nothing: parts that become a DTensor and parts again, and parameters that
    are local already.
    """
    graph = scope.gm.graph
    for node in [*graph.nodes]:
        cut = cut_of(node)
        if is_redistribute(node) and cut is not None and cut == cut_of(node.args[0]):
            _replace(graph, node, node.args[0])
        elif is_plain_to_local(node):
            source = node.args[0]
            if scope.outer(source) in local:
                _replace(graph, node, source)
            elif is_from_local(source) and _keeps(source):
                _replace(graph, node, source.args[0])
    for node in reversed([*graph.nodes]):
        if not node.users and (is_from_local(node) or is_redistribute(node) or is_to_local(node)):
            graph.erase_node(node)


def _replace(graph: fx.Graph, node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    graph.erase_node(node)


def _keeps(node: fx.Node) -> bool:
    """Whether a DTensor's part is the very value it was made of."""
    given, made = value_of(cast(fx.Node, node.args[0])), value_of(node)
    return cut_of(node) is not None and same_sizes(given.shape, made.to_local().shape)
