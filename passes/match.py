"""Pass 2: find base(x) + s · B(A(x)) by data flow, and say why a LoRA-like pair is not one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from torch import fx

from falqon_fx.passes.dataflow import (
    LEAVE,
    Chain,
    Match,
    Refusal,
    RejectedMatch,
    casts,
    check_base,
    check_private,
    check_trained,
    check_unwritten,
    either,
    exclusive,
    peel,
    shape,
    trailing_cast,
)
from falqon_fx.passes.delta import match_delta
from falqon_fx.passes.normalize import Scope, param_of, value_of
from falqon_fx.passes.terms import Add, AddLinear, BaseLinear, Cast, Dropout, Linear, Other, Scale
from falqon_fx.passes.unmatched import named_as_lora, unmatched


@dataclass(frozen=True)
class _Pair:
    """s · B(A(·)), found at the node of B's linear."""

    scope: Scope
    b_node: fx.Node
    a: Linear
    b: Linear
    inner: Chain  # from B's input down to A's node

    @property
    def source(self) -> fx.Node:
        """What A's input is a cast, scaling or dropout of."""
        return peel(self.scope, self.a.x).end

    @property
    def low_rank(self) -> bool:
        rank, features = shape(self.a.weight)
        return rank < min(features, shape(self.b.weight)[0])


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
            except Refusal as no:
                if pair.low_rank:  # else it is any two linears in a row
                    rejected.append(
                        RejectedMatch(scope, pair.a.weight, pair.b.weight, no.reason, no.remedy)
                    )
                continue
            taken |= found.nodes
            matches.append(found)
        for node in scope.gm.graph.nodes:
            delta = match_delta(scope, node, taken)
            if isinstance(delta, Match):
                taken |= delta.nodes
                matches.append(delta)
            elif delta is not None:
                rejected.append(delta)
        rejected.extend(_on_others(scope))
        rejected.extend(unmatched(scope, matches, rejected))
    rejected.extend(named_as_lora(root, matches, rejected))
    return matches, rejected


def _pairs(scope: Scope) -> Iterator[_Pair]:
    for node in scope.gm.graph.nodes:
        b = scope.term(node)
        if isinstance(b, AddLinear):
            b = Linear(b.x, b.weight, None)
        if not isinstance(b, Linear) or _is_part(scope, node):
            continue
        inner = peel(scope, b.x)
        a = scope.term(inner.end)
        if isinstance(a, Linear) and shape(b.weight)[1] == shape(a.weight)[0]:
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
        a = scope.term(peel(scope, b.x).end)
        if not isinstance(a, Other):
            continue
        rank = a.weight.value.shape[-1 if a.kind == "an embedding" else 0]
        if a.weight.transposed:
            rank = a.weight.value.shape[0]
        out, inner = b.weight.value.shape[:2]
        with suppress(Refusal):
            _find_add(scope, node)
            if inner == rank < out:
                yield RejectedMatch(
                    scope, a.weight, b.weight, f"it adapts {a.kind}, not a linear", LEAVE
                )


def _several(pairs: list[_Pair]) -> set[fx.Node]:
    """The B's of adapters that are added to one another: a layer has more than one."""
    owner = {pair.b_node: pair for pair in pairs}  # of B's output, and of the sum with it
    added: list[tuple[_Pair, fx.Node]] = []
    for pair in pairs:
        with suppress(Refusal):
            total, base, _, _ = _find_add(pair.scope, pair.b_node)
            owner[total] = pair
            added.append((pair, peel(pair.scope, base).end))
    several: set[fx.Node] = set()
    for pair, base in added:
        other = owner.get(base)
        if other is not None and other.source is pair.source:
            several |= {pair.b_node, other.b_node}
    return several


def _complete(pair: _Pair, several: set[fx.Node], taken: set[fx.Node]) -> Match:
    scope = pair.scope
    if pair.b_node in several:
        raise Refusal("more than one adapter is active on it", "Activate one adapter at a time")
    if pair.a.bias is not None:
        raise Refusal("lora_A has a bias, which a merged weight can't hold", LEAVE)
    if pair.a.weight.transposed or pair.b.weight.transposed:
        raise Refusal("lora_A or lora_B is stored transposed", "Store A as [r, in], B as [out, r]")
    check_trained(pair.a.weight, pair.b.weight)
    add_node, base_operand, up, factor = _find_add(scope, pair.b_node)
    base_chain = peel(scope, base_operand)
    base = scope.term(base_chain.end)
    if isinstance(base, Linear):
        check_base(base)
    elif base_chain.end.op == "placeholder" and param_of(base_chain.end, scope) is None:
        raise Refusal(
            "a graph break, or a variant of LoRA, stands between its base layer and its adapter",
            "Find the break with TORCH_LOGS=graph_breaks; the layer runs unmerged, as it was",
        )
    elif not isinstance(base, BaseLinear):
        raise Refusal(
            f"the adapter is added to {base_chain.end.target!s}, not to a linear on a parameter "
            "(a quantized or wrapped base layer?)",
            "Use an unquantized nn.Linear as base",
        )
    if base_chain.factor != 1.0 or float(base_chain.dropout):
        raise Refusal("the base output is scaled or dropped before the add", LEAVE)
    reads = casts(scope, base.x, taken)
    outer, x = peel(scope, pair.a.x, until=reads), reads[-1]
    if outer.end not in reads:
        raise Refusal("lora_A reads another input than the base layer", LEAVE)
    factor = float(factor)  # pins a SymFloat: another value compiles anew
    scaling = float(factor * pair.inner.factor * outer.factor)
    anchor = trailing_cast(scope, add_node)
    inside = {add_node, anchor, pair.b_node, pair.inner.end, base_chain.end}
    inside |= {*pair.inner.nodes, *base_chain.nodes, *up, *pair.b.parts}
    inside |= set() if isinstance(base, BaseLinear) else set(base.parts)
    inside |= exclusive(outer.nodes, inside)
    check_unwritten(x, outer.nodes, inside, anchor)
    check_private(inside - {anchor}, inside, taken)
    if isinstance(base, BaseLinear) and base.scaling != scaling:
        raise Refusal(
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
        float(either(pair.inner.dropout, outer.dropout)),
    )


def _find_add(scope: Scope, b_node: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node], float]:
    """Climb from B's output through scalings and casts to the add with the base output."""
    node, factor = b_node, 1.0
    whole = scope.term(node)
    if isinstance(whole, AddLinear):
        if whole.beta != 1.0:
            raise Refusal("the base output is scaled before the add", LEAVE)
        return node, whole.left, [], whole.factor
    up: list[fx.Node] = []
    while len(node.users) == 1:
        (user,) = node.users
        term = scope.term(user)
        if isinstance(term, Add):
            if term.right is node:
                return user, term.left, up, factor * term.factor
            if term.factor != 1.0:
                raise Refusal("the base output is scaled before the add", LEAVE)
            return user, term.right, up, factor
        if isinstance(term, Scale):
            factor *= term.factor
        elif isinstance(term, Dropout) and float(term.p) > 0:
            raise Refusal("a dropout follows lora_B", LEAVE)
        elif not isinstance(term, Cast | Dropout):
            break
        up.append(user)
        node = user
    raise Refusal(
        "the output of B(A(x)) is not added to a linear's output in this graph",
        "Only base(x) + s·B(A(x)) can be merged, no DoRA or other variant; it runs as it was",
    )


def _check_shapes(base: Linear | BaseLinear, pair: _Pair) -> None:
    if isinstance(base, Linear):
        out, features = shape(base.weight)
    else:
        rows, features = value_of(base.state[0]).shape
        out = rows - shape(pair.a.weight)[0]
    if isinstance(base, BaseLinear) and out != shape(pair.b.weight)[0]:
        raise Refusal(
            "prepare() merged an adapter of another rank",
            "Call falqon_fx.restore(model), activate the adapter, then prepare() again",
        )
    if (out, features) != (shape(pair.b.weight)[0], shape(pair.a.weight)[1]):
        raise Refusal("the shapes of W, A and B don't belong together", LEAVE)
