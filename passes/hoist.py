"""Tensor parallelism: bring an adapter's products to its base layer's side of the communication.

As it is written, an adapter talks for itself: its small product is gathered, or summed up, between
A and B. By linearity that is the same as

    columns:  enter(A·x)  →  A·enter(x)                        the base layer enters x anyway
    rows:     leave(W·x) + s·B·leave(A·x)  →  leave(W·x + s·B·(A·x))

A of the first and B of the second lie whole on every process, which finds a part of their gradient:
these are summed up once, behind the backward pass. What is left of the communication is the base
layer's own, and the layer with its adapter is an ordinary site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from falqon_fx._compat import value_of
from falqon_fx.passes.match.dataflow import shape, strip_elementwise, trailing_cast
from falqon_fx.passes.normalize import normalize
from falqon_fx.passes.scope import Scope, erase_unread, param_of
from falqon_fx.passes.shards import (
    Crossing,
    body_calls,
    crossing,
    cut_of,
    mesh_node,
    placeholders,
    readers,
    set_value,
)
from falqon_fx.passes.terms import Add, Cast, Dropout, Linear, Scale


def hoist(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Edit the graph in place; its parameters of which every process finds a part of the gradient
    now, each with the mesh over which it is to be summed.
    """
    summed: dict[fx.Node, fx.Node] = {}
    while True:  # of several adapters of a layer, one at a time
        root = normalize(gm, ())
        for scope in root.walk():
            _share(scope)
        moves = _closed([move for scope in root.walk() for move in _moves(scope)], root)
        if not moves:
            return summed
        for move in moves:
            summed[move.param] = move.scope.outer(mesh_node(move.crossing.made))
            move.apply()


def _share(scope: Scope) -> None:
    """What is communicated twice, as x of q, k and v, is communicated once."""
    first: list[Crossing] = []
    for node in [*scope.gm.graph.nodes]:
        found = crossing(node)
        if found is None:
            continue
        same = next((f for f in first if f.local is found.local and f.same(found)), None)
        if same is None:
            first.append(found)
            continue
        found.end.replace_all_uses_with(same.end)
        erase_unread(found.nodes)


@dataclass(frozen=True)
class _Move:
    """An adapter's product that can change sides; ``param`` is its root input that lies whole on
    every process, ``reader`` the node that reads it now.
    """

    scope: Scope
    crossing: Crossing
    param: fx.Node
    reader: fx.Node

    def apply(self) -> None:
        raise NotImplementedError


def _moves(scope: Scope) -> Iterator[_Move]:
    ends = {c.end: c for node in scope.gm.graph.nodes if (c := crossing(node)) is not None}
    for found in ends.values():
        if (into := _into(scope, found, ends)) is not None:
            yield into
    for node in scope.gm.graph.nodes:
        if (out := _out_of(scope, node, ends)) is not None:
            yield out


def _closed(moves: list[_Move], root: Scope) -> list[_Move]:
    """The moves whose parameter has no other reader: its gradient is all parts or all whole."""
    aliases, calls = placeholders(root), body_calls(root)
    by = {(move.param, move.reader) for move in moves}
    return [
        move
        for move in moves
        if all((move.param, user) in by for user in readers(aliases[move.param], calls))
    ]


@dataclass(frozen=True)
class _Into(_Move):
    """enter(A·x) → A·enter(x): ``above`` are the casts and dropouts between A and what is entered
    already, ``below`` the casts of A's product.
    """

    base: Crossing
    above: tuple[fx.Node, ...]
    below: tuple[fx.Node, ...]

    def apply(self) -> None:
        graph, end = self.scope.gm.graph, self.crossing.end
        new = {self.base.local: self.base.end}
        tokens = value_of(end).shape[:-1]
        with graph.inserting_before(end):
            for node in (*reversed(self.above), self.reader, *reversed(self.below)):
                new[node] = graph.node_copy(node, lambda n: new.get(n, n))
                set_value(new[node], _like(value_of(node), tokens))
        last = self.below[0] if self.below else self.reader
        end.replace_all_uses_with(new[last])
        chain = (*reversed(self.above), self.reader, *reversed(self.below))
        erase_unread((*chain, *self.crossing.nodes))


def _into(scope: Scope, found: Crossing, ends: Mapping[fx.Node, Crossing]) -> _Into | None:
    if not found.enters or found.sums:
        return None
    below = strip_elementwise(scope, found.local)
    product = scope.term(below.end)
    if not isinstance(product, Linear) or product.bias is not None or float(below.dropout):
        return None
    param = _root_input(scope, product.weight.node)
    rank, features = shape(product.weight)
    if param is None or 2 * rank > features or not _alone((below.end, *below.nodes, *found.nodes)):
        return None
    above: list[fx.Node] = []
    node = product.x
    while True:
        for base in ends.values():
            earlier = base is not found and base.end < found.end
            if base.local is node and earlier and base.same(found):
                nodes = (tuple(above), below.nodes)
                return _Into(scope, found, param, below.end, base, *nodes)
        term = scope.term(node)
        if not isinstance(term, Scale | Dropout | Cast):
            return None
        above.append(node)
        node = term.x


@dataclass(frozen=True)
class _OutOf(_Move):
    """leave(u) + s·B·leave(v) → leave(u + s·B·v): ``add`` is that sum, ``base`` what u leaves by;
    ``bias`` the add of a bias between, ``nodes`` all that is computed from v on, in order.
    """

    base: Crossing
    bias: fx.Node | None
    nodes: tuple[fx.Node, ...]
    add: fx.Node
    anchor: fx.Node

    def apply(self) -> None:
        graph, base, anchor = self.scope.gm.graph, self.base, self.anchor
        new = {self.crossing.end: self.crossing.local, base.end: base.local}
        if self.bias is not None:
            new[self.bias] = base.local
        tokens = value_of(base.local).shape[:-1]
        with graph.inserting_before(anchor):
            for node in self.nodes:
                new[node] = graph.node_copy(node, lambda n: new.get(n, n))
                set_value(new[node], _like(value_of(node), tokens))
            result = base.copy(graph, new[anchor])
            if self.bias is not None:
                both = [value_of(node).dtype for node in (result, self.bias)]
                result = graph.node_copy(self.bias, lambda n: result if n is base.end else n)
                set_value(result, value_of(self.bias).to(torch.promote_types(*both)))
                if value_of(result).dtype != value_of(anchor).dtype:
                    result = graph.call_method("to", (result, value_of(anchor).dtype))
                    set_value(result, value_of(anchor))
            for key in _KEPT & anchor.meta.keys():
                result.meta[key] = anchor.meta[key]
        anchor.replace_all_uses_with(result)
        bias = () if self.bias is None else (self.bias,)
        erase_unread((*self.crossing.nodes, *base.nodes, *bias, *self.nodes))


_KEPT = {"nn_module_stack", "stack_trace", "source_fn_stack"}


def _out_of(scope: Scope, node: fx.Node, ends: Mapping[fx.Node, Crossing]) -> _OutOf | None:
    product = scope.term(node)
    if not isinstance(product, Linear) or product.bias is not None:
        return None
    inner = strip_elementwise(scope, product.x)
    found = ends.get(inner.end)
    param = _root_input(scope, product.weight.node)
    out, rank = shape(product.weight)
    if found is None or not found.sums or param is None or 2 * rank > out:
        return None
    if float(inner.dropout) or product.parts:
        return None
    path = [*reversed(inner.nodes), node]
    while len(path[-1].users) == 1:
        (user,) = path[-1].users
        term = scope.term(user)
        path.append(user)
        if isinstance(term, Add):
            break
        if not isinstance(term, Scale | Cast) and not (isinstance(term, Dropout) and term.p == 0):
            return None
    add = path[-1]
    total = scope.term(add)
    if not isinstance(total, Add) or not _alone((*found.nodes, *path[:-1])):
        return None
    on_right = total.right is path[-2]
    base_operand = total.left if on_right else total.right
    if not on_right and total.factor != 1.0:
        return None
    casts = strip_elementwise(scope, base_operand)
    base, bias = _leaving(scope, casts.end, ends)
    if base is None or not base.same(found) or casts.factor != 1.0 or float(casts.dropout):
        return None
    own = (*base.nodes, *(() if bias is None else (bias,)), *casts.nodes)
    if not _alone(own):
        return None
    anchor = trailing_cast(scope, add)
    nodes = (*path[:-1], *reversed(casts.nodes), add, *(() if anchor is add else (anchor,)))
    return _OutOf(scope, found, param, node, base, bias, nodes, add, anchor)


def _leaving(
    scope: Scope, node: fx.Node, ends: Mapping[fx.Node, Crossing]
) -> tuple[Crossing | None, fx.Node | None]:
    """The communication that a layer's result comes from, and the add of its bias behind it."""
    if node in ends:
        return (ends[node] if ends[node].sums else None), None
    term = scope.term(node)
    if isinstance(term, Add) and term.factor == 1.0:
        for product, bias in ((term.left, term.right), (term.right, term.left)):
            param = param_of(bias, scope)
            if product in ends and param is not None and param.value.dim() == 1:
                return (ends[product] if ends[product].sums else None), node
    return None, None


def _root_input(scope: Scope, node: fx.Node | None) -> fx.Node | None:
    if node is None or node.op != "placeholder":
        return None
    outer = scope.outer(node)
    return outer if outer.op == "placeholder" and cut_of(outer) is None else None


def _alone(nodes: tuple[fx.Node, ...]) -> bool:
    """Whether each has one reader."""
    return all(len(node.users) == 1 for node in nodes)


def _like(value: Any, tokens: Any) -> Any:
    """A value of as many features, for other tokens."""
    return value.new_empty((*tokens, value.shape[-1]))
