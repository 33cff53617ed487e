"""A graph as the passes see it: what its nodes mean, through the bodies of activation checkpoints,
and the questions that they ask of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from falqon_fx._compat import value_of
from falqon_fx.passes.modes import Mode, modes
from falqon_fx.passes.terms import Linear, Param, Term
from falqon_fx.passes.vocabulary import METHODS, TRANSPOSE, TRANSPOSE_DIMS, VIEW_METHODS, VIEWS

Reader = Callable[[fx.Node, "Scope"], Term]  # what a node computes; see `passes/normalize.py`


@dataclass
class Scope:
    """One graph: the root, or the body of a checkpoint called by ``call`` in ``parent``."""

    gm: fx.GraphModule
    read: Reader
    parent: Scope | None = None
    call: fx.Node | None = None
    children: list[Scope] = field(default_factory=list)
    operands: dict[fx.Node, fx.Node] = field(default_factory=dict)  # placeholder -> parent's node
    last_input: fx.Node | None = None  # new placeholders go behind it
    _terms: dict[fx.Node, Term] = field(default_factory=dict)
    _modes: dict[fx.Node, Mode] = field(default_factory=dict)

    @property
    def root(self) -> Scope:
        return self if self.parent is None else self.parent.root

    def walk(self) -> Iterator[Scope]:
        """This scope and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()

    def term(self, node: fx.Node) -> Term:
        """What a node computes, or None where no pass needs to know."""
        if node not in self._terms:
            self._terms[node] = self.read(node, self)
        return self._terms[node]

    def mode(self, node: fx.Node) -> Mode:
        """What torch switches on where a node stands; a checkpoint's body runs in those of its
        call. As the graph was when this was first asked.
        """
        if not self._modes:
            around = () if self.parent is None or self.call is None else self.parent.mode(self.call)
            self._modes = {n: (*around, *mode) for n, mode in modes(self.gm.graph).items()}
        return self._modes[node]

    def is_part(self, node: fx.Node) -> bool:
        """Whether a product is a part of another node's: a bias or a view is still to come."""
        terms = [self.term(user) for user in node.users]
        return any(isinstance(term, Linear) and node in term.parts for term in terms)

    def add_input(self, name: str) -> fx.Node:
        """A new placeholder behind all others."""
        graph = self.gm.graph
        with self.after_inputs():
            self.last_input = graph.placeholder(name)
        # The generated code assigns names to other targets one after the other, which may overlap.
        self.last_input.target = self.last_input.name
        return self.last_input

    def after_inputs(self) -> AbstractContextManager[None]:
        """Insert behind the last placeholder, before everything that is computed."""
        graph = self.gm.graph
        if self.last_input is None:
            return graph.inserting_before(next(iter(graph.nodes)))
        return graph.inserting_after(self.last_input)

    def outer(self, node: fx.Node) -> fx.Node:
        """The root graph's node that a body's placeholder stands for; other nodes as they are."""
        scope: Scope | None = self
        while scope is not None and node in scope.operands:
            node, scope = scope.operands[node], scope.parent
        return node


def is_view(node: fx.Node) -> bool:
    """Whether a node gives a tensor another shape and nothing else."""
    if node.op == "call_method":
        return node.target in VIEW_METHODS and len(node.args) > 0
    return node.op == "call_function" and node.target in VIEWS and len(node.args) > 0


def param_of(node: Any, scope: Scope) -> Param | None:
    """The leaf tensor that a node is, or is the 2-D transpose of; None for computed values."""
    if not isinstance(node, fx.Node):
        return None
    if node.op in ("placeholder", "get_attr"):
        outer = scope.outer(node)
        value = value_of(outer)
        if outer.op == "get_attr":
            value = attribute(scope.root.gm, str(outer.target))
        elif outer.op != "placeholder" or not isinstance(value, nn.Parameter):
            return None
        return Param(value, node) if isinstance(value, Tensor) else None
    if is_transpose(node):
        inner = param_of(node.args[0], scope)
        return inner and Param(inner.value, inner.node, inner.name, not inner.transposed)
    return None


def erase_unread(nodes: Iterable[fx.Node]) -> None:
    """Erase nodes, but for those that others than these read."""
    for node in sorted({*nodes}, reverse=True):  # what reads others stands behind them
        if not node.users:
            node.graph.erase_node(node)


def attribute(gm: fx.GraphModule, name: str) -> Any:
    """What a get_attr node with this target reads."""
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value


def is_transpose(node: fx.Node) -> bool:
    """Whether a node is the transpose of a matrix."""
    target: Any = METHODS.get(str(node.target)) if node.op == "call_method" else node.target
    if target in TRANSPOSE:
        return True
    if target is getattr and node.args[1:] in (("T",), ("mT",)):
        return True
    if target in TRANSPOSE_DIMS and len(node.args) == 3:
        return {d % 2 for d in node.args[1:] if isinstance(d, int)} == {0, 1}
    return False


def as_number(value: object) -> Any:
    """A number as a float; one that varies between calls as a SymFloat, which `float` pins."""
    if isinstance(value, fx.Node) and isinstance(value_of(value), torch.SymFloat):
        return value_of(value)
    return float(value) if is_number(value) else None


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number that the graph holds as it is."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def are_nodes(values: Sequence[object]) -> bool:
    """Whether all are nodes, of one at least."""
    return len(values) > 0 and all(isinstance(v, fx.Node) for v in values)
