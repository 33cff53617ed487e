"""x · (W + s · B · A)ᵀ: an adapter that is added to the weight in each forward pass, as
`torch.nn.utils.parametrize` does it. The same algebra as base(x) + s · B(A(x)), so the same site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from falqon_fx._compat import value_of
from falqon_fx.passes.match.computed import computed_linear
from falqon_fx.passes.match.dataflow import (
    LEAVE,
    AdapterMatch,
    Chain,
    Match,
    MatchRejected,
    RejectedMatch,
    check_base,
    check_mode,
    check_private,
    check_unwritten,
    either,
    nodes_of,
    shape,
    strip_elementwise,
    trailing_cast,
)
from falqon_fx.passes.scope import Scope, param_of
from falqon_fx.passes.terms import Add, Linear, Param


@dataclass(frozen=True)
class _Sum:
    """W + factor · B · A, with the nodes that compute it."""

    weight: Param
    lora_a: Param
    lora_b: Param
    factor: Any
    dropout: float
    nodes: tuple[fx.Node, ...]


def match_delta(scope: Scope, node: fx.Node, taken: set[fx.Node]) -> Match | RejectedMatch | None:
    """The site at a linear whose weight is W + s · B · A, or why it is none."""
    linear = computed_linear(node, scope)
    if linear is None:
        return None
    total = _sum(scope, strip_elementwise(scope, linear.weight))
    if total is None:
        return None
    try:
        return _complete(scope, node, linear.x, linear.bias, linear.views, total, taken)
    except MatchRejected as no:
        return RejectedMatch(scope, total.lora_a, total.lora_b, no.reason, no.remedy)


def _sum(scope: Scope, above: Chain) -> _Sum | None:
    term = scope.term(above.end)
    if not isinstance(term, Add) or above.factor != 1.0 or float(above.dropout):
        return None
    for left, right, factor in ((term.left, term.right, term.factor), (term.right, term.left, 1.0)):
        weight = param_of(left, scope)
        if weight is None or (left is term.right and term.factor != 1.0):
            continue
        chain = strip_elementwise(scope, right)
        product = scope.term(chain.end)
        if not isinstance(product, Linear) or product.bias is not None:
            continue
        scaled = strip_elementwise(scope, product.x)
        lora_b = param_of(scaled.end, scope)
        if lora_b is None or lora_b.value.dim() != 2:
            continue
        # B @ A is a linear on B with the weight Aᵀ.
        a = product.weight
        lora_a = Param(a.value, a.node, a.name, not a.transposed)
        nodes = (*above.nodes, above.end, *chain.nodes, chain.end, *scaled.nodes)
        whole = factor * chain.factor * scaled.factor
        return _Sum(weight, lora_a, lora_b, whole, either(chain.dropout, scaled.dropout), nodes)
    return None


def _complete(
    scope: Scope,
    node: fx.Node,
    x: fx.Node,
    bias: Param | None,
    views: tuple[fx.Node, ...],
    total: _Sum,
    taken: set[fx.Node],
) -> Match:
    if total.lora_a.transposed or total.lora_b.transposed:
        raise MatchRejected(
            "lora_A or lora_B is stored transposed", "Store A as [r, in], B as [out, r]"
        )
    if float(total.dropout):
        raise MatchRejected("a dropout on B · A acts on weights, not on x", LEAVE)
    check_base(Linear(x, total.weight, bias))
    (out, features), (rank, a_in), (b_out, b_in) = map(
        shape, (total.weight, total.lora_a, total.lora_b)
    )
    if (out, features, rank) != (b_out, a_in, b_in):
        raise MatchRejected("the shapes of W, A and B don't belong together", LEAVE)
    anchor = trailing_cast(scope, node)
    inside = {node, anchor, *views, *total.nodes}
    check_mode(scope, inside)
    check_unwritten((x, *nodes_of(bias)), (), inside)
    check_private(inside - {anchor}, inside, taken)
    assert isinstance(value_of(anchor), Tensor)
    return Match(
        scope,
        anchor,
        frozenset(inside),
        x,
        Linear(x, total.weight, bias),
        (AdapterMatch(total.lora_a, total.lora_b, float(total.factor)),),
    )
