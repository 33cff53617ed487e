"""Find base(x) + Σ s · B(A(x)) by data flow, and say why a LoRA-like pair is not one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from torch import fx

from falqon_fx._compat import value_of
from falqon_fx.passes.match.dataflow import (
    LEAVE,
    UNQUANTIZED,
    AdapterMatch,
    Chain,
    Match,
    MatchRejected,
    RejectedMatch,
    casts,
    check_base,
    check_mode,
    check_private,
    check_unwritten,
    either,
    exclusive,
    nodes_of,
    quantized_below,
    shape,
    strip_elementwise,
    trailing_cast,
)
from falqon_fx.passes.match.delta import match_delta
from falqon_fx.passes.match.experts import match_experts
from falqon_fx.passes.match.unmatched import named_as_lora, named_lora, unmatched
from falqon_fx.passes.scope import Scope, param_of
from falqon_fx.passes.terms import (
    Add,
    AddLinear,
    BaseLinear,
    Cast,
    Dropout,
    Linear,
    Prepared,
    RowsBaseLinear,
    Scale,
    UnsupportedAdapted,
)
from falqon_fx.site.nvfp4 import shape_of
from falqon_fx.site.quantized import ALREADY, REMEDY


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
        return strip_elementwise(self.scope, self.a.x).end

    @property
    def low_rank(self) -> bool:
        rank, features = shape(self.a.weight)
        return rank < min(features, shape(self.b.weight)[0])

    @property
    def small(self) -> bool:
        """Whether the rank alone says that this is an adapter and not a bottleneck of the model."""
        rank, features = shape(self.a.weight)
        return 2 * rank < min(features, shape(self.b.weight)[0])

    @property
    def trained(self) -> bool:
        return self.a.weight.value.requires_grad or self.b.weight.value.requires_grad

    @property
    def named(self) -> bool:
        """Whether both have names of LoRA's: a linear in front of a site's A has not."""
        return all(named_lora(self.scope, param) for param in (self.a.weight, self.b.weight))


def match(root: Scope, keep_dropout: bool = True) -> tuple[list[Match], list[RejectedMatch]]:
    """All sites with adapters of a graph and its checkpoint bodies, in graph order.

    With ``keep_dropout`` an adapter behind a dropout reads the dropped value; else x.
    """
    matches: list[Match] = []
    rejected: list[RejectedMatch] = []
    for scope in root.walk():
        taken: set[fx.Node] = set()
        found: dict[fx.Node, Match] = {}  # by anchor
        for pair in _pairs(scope):
            try:
                site = _complete(pair, found, taken, keep_dropout)
            except MatchRejected as no:
                if (pair.low_rank and pair.trained) or pair.named:  # else any two linears
                    params = pair.a.weight, pair.b.weight
                    rejected.append(RejectedMatch(scope, *params, no.reason, no.remedy, no.torn))
                continue
            taken |= site.nodes
            found = {anchor: old for anchor, old in found.items() if anchor not in site.nodes}
            found[site.anchor] = site
        for node in scope.gm.graph.nodes:
            delta = match_delta(scope, node, taken)
            if isinstance(delta, Match):
                taken |= delta.nodes
                found[delta.anchor] = delta
            elif delta is not None:
                rejected.append(delta)
        for stack in match_experts(scope, taken, adapted=True):
            if isinstance(stack, Match):
                taken |= stack.nodes
                found[stack.anchor] = stack
            else:
                rejected.append(stack)
        matches.extend(sorted(found.values(), key=lambda site: site.anchor))
        rejected.extend(_on_others(scope))
        rejected.extend(unmatched(scope, matches, rejected))
    rejected.extend(named_as_lora(root, matches, rejected))
    return matches, rejected


def _pairs(scope: Scope) -> Iterator[_Pair]:
    for node in scope.gm.graph.nodes:
        pair = _pair_at(scope, node)
        if pair is not None:
            yield pair


def _pair_at(scope: Scope, node: fx.Node) -> _Pair | None:
    b = scope.term(node)
    if isinstance(b, AddLinear):
        b = Linear(b.x, b.weight, None)
    if not isinstance(b, Linear) or scope.is_part(node):
        return None
    inner = strip_elementwise(scope, b.x)
    a = scope.term(inner.end)
    if not isinstance(a, Linear) or shape(b.weight)[1] != shape(a.weight)[0]:
        return None
    return _Pair(scope, node, a, b, inner)


def _on_others(scope: Scope) -> Iterator[RejectedMatch]:
    """LoRA on embeddings and convolutions."""
    for node in scope.gm.graph.nodes:
        b = scope.term(node)
        if not isinstance(b, Linear | UnsupportedAdapted):
            continue
        a = scope.term(strip_elementwise(scope, b.x).end)
        if not isinstance(a, UnsupportedAdapted):
            continue
        rank = a.weight.value.shape[-1 if a.kind == "an embedding" else 0]
        if a.weight.transposed:
            rank = a.weight.value.shape[0]
        out, inner = b.weight.value.shape[:2]
        with suppress(MatchRejected):
            _find_add(scope, node)
            if inner == rank < out:
                yield RejectedMatch(
                    scope, a.weight, b.weight, f"it adapts {a.kind}, not a linear", LEAVE
                )


def _complete(
    pair: _Pair, found: Mapping[fx.Node, Match], taken: set[fx.Node], keep_dropout: bool
) -> Match:
    scope = pair.scope
    if pair.a.bias is not None:
        raise MatchRejected("lora_A has a bias, which a merged weight can't hold", LEAVE)
    if pair.a.weight.transposed or pair.b.weight.transposed:
        raise MatchRejected(
            "lora_A or lora_B is stored transposed", "Store A as [r, in], B as [out, r]"
        )
    if not pair.small and not pair.named:
        raise MatchRejected(
            "its rank is not below half of its width, and nothing names it LoRA", LEAVE
        )
    add_node, base_operand, up, factor = _find_add(scope, pair.b_node)
    base_chain = strip_elementwise(scope, base_operand)
    before = next((found[n] for n in (base_operand, *_down(base_chain)) if n in found), None)
    base = scope.term(base_chain.end) if before is None else before.base
    if isinstance(base, Linear):
        other = _pair_at(scope, base_chain.end)
        if other is not None and other.small and other.source is pair.source:
            raise MatchRejected(
                "it is added to another adapter before the base layer's output",
                "Add one adapter after the other: (base(x) + s·B(A(x))) + t·D(C(x))",
            )
        check_base(base)
    elif base_chain.end.op == "placeholder" and param_of(base_chain.end, scope) is None:
        raise MatchRejected(
            "a graph break, or a variant of LoRA, stands between its base layer and its adapter",
            "Find the break with TORCH_LOGS=graph_breaks; the layer runs unmerged, as it was",
            torn=True,
        )
    elif not isinstance(base, BaseLinear | RowsBaseLinear):
        given = strip_elementwise(scope, pair.a.x)
        kind = quantized_below(scope, base_chain.end, _down(given))
        if kind is not None:
            raise MatchRejected(ALREADY.format(kind), REMEDY)
        raise MatchRejected(
            f"the adapter is added to {base_chain.end.target!s}, not to a linear on a parameter "
            "(a quantized or wrapped base layer?)",
            UNQUANTIZED,
        )
    inside = {pair.b_node, pair.inner.end, *pair.inner.nodes, *up, *pair.b.parts}
    if before is None:
        if base_chain.factor != 1.0 or float(base_chain.dropout):
            raise MatchRejected("the base output is scaled or dropped before the add", LEAVE)
        own = {base_chain.end, *base_chain.nodes}
        own |= set(base.parts) if isinstance(base, Linear) else set()
        reads = casts(scope, base_chain.end, base.x, taken)
    else:
        own = {*before.nodes, *_above_anchor(scope, base_operand, before.anchor)}
        reads = casts(scope, before.anchor, before.x, taken - before.nodes)
    inside |= own
    outer, x = strip_elementwise(scope, pair.a.x, until=reads), reads[-1]
    if outer.end not in reads:
        raise MatchRejected("lora_A reads another input than the base layer", LEAVE)
    factor = float(factor)  # pins a SymFloat: another value compiles anew
    dropout, dropped = float(outer.dropout), None
    if float(pair.inner.dropout):
        if keep_dropout:
            raise MatchRejected("a dropout stands between lora_A and lora_B", LEAVE)
        dropout = float(either(dropout, pair.inner.dropout))
    scaling = float(factor * pair.inner.factor)
    if dropout and keep_dropout:
        dropped = pair.a.x
    else:
        scaling *= float(outer.factor)
    anchor = trailing_cast(scope, add_node)
    inside |= {add_node, anchor}
    if dropped is None:
        inside |= exclusive(outer.nodes, inside)
    check_mode(scope, {*inside, *outer.nodes})
    read = (x, pair.a.x, *nodes_of(base.bias), *nodes_of(pair.b.bias))
    check_unwritten(read, (*outer.nodes, *reads[:-1]), inside)
    check_private(inside - {anchor}, inside, taken - own)
    adapter = AdapterMatch(
        pair.a.weight, pair.b.weight, scaling, pair.b.bias, factor, dropout, dropped
    )
    adapters = (adapter,) if before is None else (*before.adapters, adapter)
    _check_shapes(base, pair)
    return Match(scope, anchor, frozenset(inside), x, base, adapters)


def _down(chain: Chain) -> tuple[fx.Node, ...]:
    return (*chain.nodes, chain.end)


def _above_anchor(scope: Scope, node: fx.Node, anchor: fx.Node) -> set[fx.Node]:
    """The casts from ``node`` down to the result of the site so far, at ``anchor``."""
    nodes: set[fx.Node] = set()
    while node is not anchor:
        term = scope.term(node)
        if not isinstance(term, Cast):
            raise MatchRejected("the output is scaled between two adapters", LEAVE)
        nodes.add(node)
        node = term.x
    return nodes


def _find_add(scope: Scope, b_node: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node], float]:
    """Climb from B's output through scalings and casts to the add with the base output."""
    node, factor = b_node, 1.0
    whole = scope.term(node)
    if isinstance(whole, AddLinear):
        if whole.beta != 1.0:
            raise MatchRejected("the base output is scaled before the add", LEAVE)
        return node, whole.left, [], whole.factor
    up: list[fx.Node] = []
    while len(node.users) == 1:
        (user,) = node.users
        term = scope.term(user)
        if isinstance(term, Add):
            if term.right is node:
                return user, term.left, up, factor * term.factor
            if term.factor != 1.0:
                raise MatchRejected("the base output is scaled before the add", LEAVE)
            return user, term.right, up, factor
        if isinstance(term, Scale):
            factor *= term.factor
        elif isinstance(term, Dropout) and float(term.p) > 0:
            raise MatchRejected("a dropout follows lora_B", LEAVE)
        elif not isinstance(term, Cast | Dropout):
            break
        up.append(user)
        node = user
    raise MatchRejected(
        "the output of B(A(x)) is not added to a linear's output in this graph",
        "Only base(x) + s·B(A(x)) can be merged, no DoRA or other variant; it runs as it was",
    )


def _check_shapes(base: Linear | Prepared, pair: _Pair) -> None:
    rank, a_in = shape(pair.a.weight)
    b_out, _ = shape(pair.b.weight)
    if isinstance(base, Linear):
        out, features = shape(base.weight)
    elif isinstance(base, BaseLinear):
        out, features = shape_of(value_of(base.code))
    else:
        rows, features = value_of(base.state[0]).shape
        out = rows - rank
        if out != b_out:
            raise MatchRejected(
                "prepare() merged an adapter of another rank",
                "Call falqon_fx.restore(model), activate the adapter, then prepare() again",
            )
    if (out, features) != (b_out, a_in):
        raise MatchRejected("the shapes of W, A and B don't belong together", LEAVE)
