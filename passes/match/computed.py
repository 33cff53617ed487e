"""A product with a weight that the graph computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from falqon_fx.passes.scope import Scope, are_nodes, is_transpose, param_of
from falqon_fx.passes.terms import Param
from falqon_fx.passes.vocabulary import LINEAR, MATMUL, METHODS


@dataclass(frozen=True)
class ComputedLinear:
    """x · wᵀ + bias with a weight ``weight`` [out, in] that the graph computes."""

    x: fx.Node
    weight: fx.Node
    bias: Param | None
    views: tuple[fx.Node, ...]  # transposes of the weight


def computed_linear(node: fx.Node, scope: Scope) -> ComputedLinear | None:
    """``F.linear(x, w, b)`` or ``x @ w.T``, where w is no leaf of the graph."""
    target: Any = METHODS.get(str(node.target)) if node.op == "call_method" else node.target
    names = ("input", "weight", "bias") if target in LINEAR else ("input", "other", "")
    bound = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, weight, bias = (bound.get(name) for name in names)
    if target not in LINEAR | MATMUL or not are_nodes((x, weight)):
        return None
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    views: tuple[fx.Node, ...] = ()
    if target in MATMUL:
        if not is_transpose(weight):
            return None
        views, weight = (weight,), weight.args[0]
    b = None if bias is None else param_of(bias, scope)
    if not isinstance(weight, fx.Node) or param_of(weight, scope) or (bias is not None and not b):
        return None
    return ComputedLinear(x, weight, b, views)
