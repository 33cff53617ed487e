"""Pass 2: find base(x) + s · B(A(x)) by data flow, and say why a LoRA-like pair is not one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import fx

from falqon_fx._compat import is_dtensor, is_plain
from falqon_fx.passes.normalize import Scope, value_of, writes
from falqon_fx.passes.terms import (
    Add,
    AddLinear,
    BaseLinear,
    Cast,
    Dropout,
    Linear,
    Other,
    Param,
    Scale,
)


@dataclass(frozen=True)
class Match:
    """One site: ``anchor`` is the node whose value the fused op will replace."""

    scope: Scope
    anchor: fx.Node
    nodes: frozenset[fx.Node]  # computed inside the site; gone after the rewrite
    x: fx.Node
    base: Linear | BaseLinear
    lora_a: Param
    lora_b: Param
    lora_bias: Param | None
    bias_scaling: float  # of lora_bias: what is applied behind B
    scaling: float
    dropout: float


@dataclass(frozen=True)
class RejectedMatch:
    """A LoRA-like pair B(A(·)) that stays as it is."""

    scope: Scope
    lora_a: Param
    lora_b: Param
    reason: str
    remedy: str


@dataclass(frozen=True)
class _Chain:
    """What lies between two points of the data flow, with the nodes passed on the way."""

    end: fx.Node
    factor: float
    dropout: float
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Pair:
    """s · B(A(·)), found at the node of B's linear."""

    scope: Scope
    b_node: fx.Node
    a: Linear
    b: Linear
    inner: _Chain  # from B's input down to A's node

    @property
    def source(self) -> fx.Node:
        """What A's input is a cast, scaling or dropout of."""
        return _peel(self.scope, self.a.x).end

    @property
    def low_rank(self) -> bool:
        rank, features = _shape(self.a.weight)
        return rank < min(features, _shape(self.b.weight)[0])


class _Refusal(Exception):
    def __init__(self, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy


_LEAVE = "The layer runs unmerged, as it was"


def match(root: Scope) -> tuple[list[Match], list[RejectedMatch]]:
    """All sites of a graph and its checkpoint bodies, in graph order."""
    matches: list[Match] = []
    rejected: list[RejectedMatch] = []
    for scope in root.walk():
        taken: set[fx.Node] = set()
        pairs = list(_pairs(scope))
        several = _several(pairs)
        for pair in pairs:
            try:
                found = _complete(pair, several, taken)
            except _Refusal as no:
                if pair.low_rank:  # else it is any two linears in a row
                    rejected.append(
                        RejectedMatch(scope, pair.a.weight, pair.b.weight, no.reason, no.remedy)
                    )
                continue
            taken |= found.nodes
            matches.append(found)
        rejected.extend(_on_others(scope))
    return matches, rejected


def _pairs(scope: Scope) -> Iterator[_Pair]:
    for node in scope.gm.graph.nodes:
        b = scope.term(node)
        if isinstance(b, AddLinear):
            b = Linear(b.x, b.weight, None)
        if not isinstance(b, Linear) or _is_part(scope, node):
            continue
        inner = _peel(scope, b.x)
        a = scope.term(inner.end)
        if isinstance(a, Linear) and _shape(b.weight)[1] == _shape(a.weight)[0]:
            yield _Pair(scope, node, a, b, inner)


def _is_part(scope: Scope, node: fx.Node) -> bool:
    """Whether a bias is still to come."""
    terms = [scope.term(user) for user in node.users]
    return any(isinstance(term, Linear) and node in term.parts for term in terms)


def _on_others(scope: Scope) -> Iterator[RejectedMatch]:
    """LoRA on embeddings and convolutions."""
    for node in scope.gm.graph.nodes:
        b = scope.term(node)
        if not isinstance(b, Linear | Other):
            continue
        a = scope.term(_peel(scope, b.x).end)
        if not isinstance(a, Other):
            continue
        rank = a.weight.value.shape[-1 if a.kind == "an embedding" else 0]
        if a.weight.transposed:
            rank = a.weight.value.shape[0]
        out, inner = b.weight.value.shape[:2]
        with suppress(_Refusal):
            _find_add(scope, node)
            if inner == rank < out:
                yield RejectedMatch(
                    scope, a.weight, b.weight, f"it adapts {a.kind}, not a linear", _LEAVE
                )


def _several(pairs: list[_Pair]) -> set[fx.Node]:
    """The B's of adapters that are added to one another: a layer has more than one."""
    owner = {pair.b_node: pair for pair in pairs}  # of B's output, and of the sum with it
    added: list[tuple[_Pair, fx.Node]] = []
    for pair in pairs:
        with suppress(_Refusal):
            total, base, _, _ = _find_add(pair.scope, pair.b_node)
            owner[total] = pair
            added.append((pair, _peel(pair.scope, base).end))
    several: set[fx.Node] = set()
    for pair, base in added:
        other = owner.get(base)
        if other is not None and other.source is pair.source:
            several |= {pair.b_node, other.b_node}
    return several


def _peel(scope: Scope, node: fx.Node, until: tuple[fx.Node, ...] = ()) -> _Chain:
    """Go down through casts, scalings and dropouts."""
    factor, dropout = 1.0, 0.0
    nodes: list[fx.Node] = []
    while True:
        term = scope.term(node)
        if node in until or not isinstance(term, Scale | Dropout | Cast):
            return _Chain(node, factor, dropout, tuple(nodes))
        if isinstance(term, Scale):
            factor *= term.factor
        elif isinstance(term, Dropout):
            dropout = _either(dropout, term.p)
        nodes.append(node)
        node = term.x


def _either(p: float, q: float) -> float:
    """The probability that one of two dropouts strikes."""
    return p + q - p * q


def _complete(pair: _Pair, several: set[fx.Node], taken: set[fx.Node]) -> Match:
    scope = pair.scope
    if pair.b_node in several:
        raise _Refusal("more than one adapter is active on it", "Activate one adapter at a time")
    if pair.a.bias is not None:
        raise _Refusal("lora_A has a bias, which a merged weight can't hold", _LEAVE)
    if pair.a.weight.transposed or pair.b.weight.transposed:
        raise _Refusal("lora_A or lora_B is stored transposed", "Store A as [r, in], B as [out, r]")
    add_node, base_operand, up, factor = _find_add(scope, pair.b_node)
    base_chain = _peel(scope, base_operand)
    base = scope.term(base_chain.end)
    if isinstance(base, Linear):
        _check_base(base)
    elif not isinstance(base, BaseLinear):
        raise _Refusal(
            f"the adapter is added to {base_chain.end.target!s}, not to a linear on a parameter "
            "(a quantized or wrapped base layer?)",
            "Use an unquantized nn.Linear as base",
        )
    if base_chain.factor != 1.0 or base_chain.dropout:
        raise _Refusal("the base output is scaled or dropped before the add", _LEAVE)
    reads = _casts(scope, base.x, taken)
    outer, x = _peel(scope, pair.a.x, until=reads), reads[-1]
    if outer.end not in reads:
        raise _Refusal("lora_A reads another input than the base layer", _LEAVE)
    factor = float(factor)  # pins a SymFloat: another value compiles anew
    scaling = float(factor * pair.inner.factor * outer.factor)
    anchor = _trailing_cast(scope, add_node)
    inside = {add_node, anchor, pair.b_node, pair.inner.end, base_chain.end}
    inside |= {*pair.inner.nodes, *base_chain.nodes, *up, *pair.b.parts}
    inside |= set() if isinstance(base, BaseLinear) else set(base.parts)
    inside |= _exclusive(outer.nodes, inside)
    _check_unwritten(x, outer.nodes, inside, anchor)
    _check_private(inside - {anchor}, inside, taken)
    if isinstance(base, BaseLinear) and base.scaling != scaling:
        raise _Refusal(
            f"prepare() merged it with scaling {base.scaling}, the graph has {scaling}",
            "Call falqon_fx.restore(model), then prepare() again",
        )
    _check_shapes(base, pair)
    return Match(
        scope,
        anchor,
        frozenset(inside),
        x,
        base,
        pair.a.weight,
        pair.b.weight,
        pair.b.bias,
        factor,
        scaling,
        _either(pair.inner.dropout, outer.dropout),
    )


def _find_add(scope: Scope, b_node: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node], float]:
    """Climb from B's output through scalings and casts to the add with the base output."""
    node, factor = b_node, 1.0
    whole = scope.term(node)
    if isinstance(whole, AddLinear):
        if whole.beta != 1.0:
            raise _Refusal("the base output is scaled before the add", _LEAVE)
        return node, whole.left, [], whole.factor
    up: list[fx.Node] = []
    while len(node.users) == 1:
        (user,) = node.users
        term = scope.term(user)
        if isinstance(term, Add):
            if term.right is node:
                return user, term.left, up, factor * term.factor
            if term.factor != 1.0:
                raise _Refusal("the base output is scaled before the add", _LEAVE)
            return user, term.right, up, factor
        if isinstance(term, Scale):
            factor *= term.factor
        elif isinstance(term, Dropout) and term.p > 0:
            raise _Refusal("a dropout follows lora_B", _LEAVE)
        elif not isinstance(term, Cast | Dropout):
            break
        up.append(user)
        node = user
    raise _Refusal("the output of B(A(x)) is not added to a linear's output in this graph", _LEAVE)


def _check_base(base: Linear) -> None:
    value = base.weight.value
    if not is_plain(value) and not is_dtensor(value):  # plan refuses sharded ones by name
        raise _Refusal(
            f"the base weight is a {type(value).__name__}", "Use an unquantized nn.Linear as base"
        )
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise _Refusal(
            f"the base weight is already quantized ({value.dtype})",
            "Use an unquantized nn.Linear as base",
        )
    if value.requires_grad:
        raise _Refusal(
            "the base weight is trained too", "Freeze it (requires_grad_(False)); only B is trained"
        )


def _check_shapes(base: Linear | BaseLinear, pair: _Pair) -> None:
    if isinstance(base, Linear):
        out, features = _shape(base.weight)
    else:
        rows, features = value_of(base.state[0]).shape
        out = rows - _shape(pair.a.weight)[0]
    if (out, features) != (_shape(pair.b.weight)[0], _shape(pair.a.weight)[1]):
        raise _Refusal("the shapes of W, A and B don't belong together", _LEAVE)


def _casts(scope: Scope, node: fx.Node, taken: set[fx.Node]) -> tuple[fx.Node, ...]:
    """A node and what it is a cast of, down to the first that is none or is another site's."""
    nodes = [node]
    while isinstance(term := scope.term(nodes[-1]), Cast) and nodes[-1] not in taken:
        nodes.append(term.x)
    return tuple(nodes)


def _trailing_cast(scope: Scope, add: fx.Node) -> fx.Node:
    """The cast of the sum, where it is the sum's only use: the fused op writes that dtype."""
    if len(add.users) == 1:
        (user,) = add.users
        if isinstance(scope.term(user), Cast):
            return user
    return add


def _exclusive(nodes: tuple[fx.Node, ...], inside: set[fx.Node]) -> set[fx.Node]:
    """Of the casts and dropouts above x, those that serve this site alone."""
    own: set[fx.Node] = set()
    for node in nodes:
        if not all(user in inside or user in own for user in node.users):
            break
        own.add(node)
    return own


def _check_unwritten(
    x: fx.Node, above: tuple[fx.Node, ...], inside: set[fx.Node], anchor: fx.Node
) -> None:
    """The fused op reads x where the sum stands: x must still be what base and A have read."""
    first = min(inside)
    late = [user for user in x.users if user.args[:1] == (x,) and first <= user < anchor]
    if any(writes(node) for node in (*late, *above)):
        raise _Refusal("its input is written in place meanwhile", _LEAVE)


def _check_private(nodes: set[fx.Node], inside: set[fx.Node], taken: set[fx.Node]) -> None:
    for node in nodes:
        if node in taken:
            raise _Refusal("the base layer already belongs to another adapter's site", _LEAVE)
        for user in node.users:
            if user not in inside:
                raise _Refusal(
                    f"its intermediate value {node.name} is also used by {user.name}", _LEAVE
                )


def _shape(param: Param) -> tuple[int, int]:
    first, second = param.value.shape
    return (second, first) if param.transposed else (first, second)
