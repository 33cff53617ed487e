"""What the matchers share: walking the data flow, and the checks that make a site safe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from falqon_fx._compat import is_dtensor, is_plain, value_of
from falqon_fx.passes.scope import Scope
from falqon_fx.passes.terms import (
    BaseLinear,
    Cast,
    Dropout,
    Experts,
    Linear,
    Param,
    Prepared,
    Scale,
)
from falqon_fx.passes.writes import memory_of, written


@dataclass(frozen=True)
class AdapterMatch:
    """s · B(A(·)) on a site. ``x`` is what A reads where that is not the site's own x (dropout)."""

    lora_a: Param
    lora_b: Param
    scaling: float
    lora_bias: Param | None = None
    bias_scaling: float = 1.0  # of lora_bias: what is applied behind B
    dropout: float = 0.0
    x: fx.Node | None = None
    fixed: bool = False  # no adapter of the user's: it stands for the cast error of W


@dataclass(frozen=True)
class Match:
    """One site: ``anchor`` is the node whose value the fused op will replace. A frozen linear layer
    or stack alone has no ``adapters``.
    """

    scope: Scope
    anchor: fx.Node
    nodes: frozenset[fx.Node]  # computed inside the site; gone after the rewrite
    x: fx.Node
    base: Linear | Prepared | Experts
    adapters: tuple[AdapterMatch, ...] = ()

    @property
    def added(self) -> tuple[AdapterMatch, ...]:
        """The adapters, and what stands for the cast error of a prepared W, which is one more."""
        base = self.base
        if not isinstance(base, BaseLinear) or base.error_a is None or base.error_b is None:
            return self.adapters
        a, b = (Param(value_of(self.scope.outer(n)), n) for n in (base.error_a, base.error_b))
        return (*self.adapters, AdapterMatch(a, b, 1.0, fixed=True))


@dataclass(frozen=True)
class RejectedMatch:
    """A LoRA-like pair B(A(·)) that stays as it is. ``torn``: a part of it is in another graph."""

    scope: Scope
    lora_a: Param
    lora_b: Param
    reason: str
    remedy: str
    torn: bool = False


@dataclass(frozen=True)
class Chain:
    """What lies between two points of the data flow, with the nodes passed on the way."""

    end: fx.Node
    factor: float
    dropout: float
    nodes: tuple[fx.Node, ...]


class MatchRejected(Exception):
    """Why something is not a site, and what the user can do about it."""

    def __init__(self, reason: str, remedy: str, torn: bool = False) -> None:
        self.reason, self.remedy, self.torn = reason, remedy, torn


LEAVE = "The layer runs unmerged, as it was"


def strip_elementwise(scope: Scope, node: fx.Node, until: tuple[fx.Node, ...] = ()) -> Chain:
    """Go down through casts, scalings and dropouts."""
    factor, dropout = 1.0, 0.0
    nodes: list[fx.Node] = []
    while True:
        term = scope.term(node)
        if node in until or not isinstance(term, Scale | Dropout | Cast):
            return Chain(node, factor, dropout, tuple(nodes))
        if isinstance(term, Scale):
            factor *= term.factor
        elif isinstance(term, Dropout):
            dropout = either(dropout, term.p)
        nodes.append(node)
        node = term.x


def either(p: float, q: float) -> float:
    """The probability that one of two dropouts strikes."""
    return p + q - p * q


def check_base(base: Linear) -> None:
    """Refuse base weights that can't be merged."""
    value = base.weight.value
    if not is_plain(value) and not is_dtensor(value):  # plan refuses sharded ones by name
        raise MatchRejected(
            f"the base weight is a {type(value).__name__}", "Use an unquantized nn.Linear as base"
        )
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise MatchRejected(
            f"the base weight is already quantized ({value.dtype})",
            "Use an unquantized nn.Linear as base",
        )
    if value.requires_grad:
        raise MatchRejected(
            "the base weight is trained too",
            "Freeze it (requires_grad_(False)): an FP8 base is constant",
        )


def casts(scope: Scope, reader: fx.Node, x: fx.Node, taken: set[fx.Node]) -> tuple[fx.Node, ...]:
    """What ``reader`` reads and what that is a cast of, down to the first that is none, is another
    site's or was made in another mode: a cast under ``no_grad`` cuts the gradient off.
    """
    nodes, mode = [x], scope.mode(reader)
    while isinstance(term := scope.term(nodes[-1]), Cast):
        if nodes[-1] in taken or scope.mode(nodes[-1]) != mode:
            break
        nodes.append(term.x)
    return tuple(nodes)


def check_mode(scope: Scope, nodes: Iterable[fx.Node]) -> None:
    """Refuse what is computed partly under ``no_grad``, partly not, or under autocast."""
    if len({scope.mode(node) for node in nodes}) > 1:
        raise MatchRejected(
            "torch.no_grad() or torch.autocast() covers a part of it alone; one op has one mode",
            "Compute the base layer and its adapter in the same mode",
        )


def trailing_cast(scope: Scope, add: fx.Node) -> fx.Node:
    """The cast of the sum, where it is the sum's only use: the fused op writes that dtype.

    Not a wider one, for which the original rounds first.
    """
    if len(add.users) == 1:
        (user,) = add.users
        same = scope.mode(user) == scope.mode(add)
        if same and isinstance(scope.term(user), Cast) and not _widens(add, user):
            return user
    return add


def _widens(node: fx.Node, cast: fx.Node) -> bool:
    before, after = value_of(node), value_of(cast)
    return before is not None and after.dtype.itemsize > before.dtype.itemsize


def exclusive(nodes: tuple[fx.Node, ...], inside: set[fx.Node]) -> set[fx.Node]:
    """The casts and dropouts above x that serve this site alone."""
    own: set[fx.Node] = set()
    for node in nodes:
        if not all(user in inside or user in own for user in node.users):
            break
        own.add(node)
    return own


def check_unwritten(
    read: Iterable[fx.Node], above: Iterable[fx.Node], inside: set[fx.Node]
) -> None:
    """The fused op reads x and biases where the site ends: they must still be what the site's nodes
    have ``read``, and those ``above`` it, from x on.
    """
    above, memory = set(above), memory_of(read)
    node, last = min(inside | above), max(inside)
    while node is not last:
        targets = written(node)
        if targets and (node in above or memory & memory_of(targets)):
            raise MatchRejected("its input is written in place meanwhile", LEAVE)
        node = node.next


def nodes_of(bias: Param | fx.Node | None) -> tuple[fx.Node, ...]:
    """The node that a bias is read from; a module's own has none."""
    node = bias.node if isinstance(bias, Param) else bias
    return () if node is None else (node,)


def check_private(nodes: set[fx.Node], inside: set[fx.Node], taken: set[fx.Node]) -> None:
    """Refuse a site whose inner values serve something else too."""
    for node in nodes:
        if node in taken:
            raise MatchRejected("the base layer already belongs to another adapter's site", LEAVE)
        for user in node.users:
            if user not in inside:
                raise MatchRejected(
                    f"its intermediate value {node.name} is also used by {user.name}", LEAVE
                )


def shape(param: Param) -> tuple[int, int]:
    """[out, in] of a weight as it is used."""
    first, second = param.value.shape
    return (second, first) if param.transposed else (first, second)
