"""Where the results and the operands of an op come from, for the checks of rewritten graphs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

from torch import fx

from falqon_fx._compat import value_of
from falqon_fx.errors import PassError
from falqon_fx.ops import outliers
from falqon_fx.passes.plan import Plan, SitePlan
from falqon_fx.passes.rewrite import outlier_terms
from falqon_fx.passes.scope import Scope


def check_column(
    path: str, scope: Scope, column: Sequence[fx.Node], wanted: Sequence[fx.Node]
) -> None:
    """The nodes of a scope are what the root's ``wanted`` are there."""
    if len(column) != len(wanted):
        raise PassError(path, f"{len(column)} operands for {len(wanted)}")
    for node, of in zip(column, wanted, strict=True):
        if not is_same(scope, node, of):
            raise PassError(path, f"{node} is not its {of}")


def origin(site: SitePlan, result: Any) -> tuple[fx.Node, int]:
    """The op that a site's result comes from, and which of its outputs it is."""
    result = _unbiased(site, result)
    if outlier_terms(site):  # add(output, error)
        result = result.args[0]
    if result.target is not operator.getitem:
        raise PassError(site.report.path, f"its result is {result}")
    return cast(tuple[fx.Node, int], tuple(result.args))


def _unbiased(site: SitePlan, result: Any) -> Any:
    """A result without the biases of lora_B: what is under to(add(output, bias))."""
    biased = sum(a.lora_bias is not None for a in site.match.adapters)
    for _ in range(biased + bool(biased)):
        result = result.args[0]
    return result


def check_outliers(plan: Plan, site: SitePlan, result: Any, x: Any) -> None:
    """What is added to a site's output is the cast error of its x in its own channels."""
    terms = outlier_terms(site)
    if not terms:
        return
    path, total = site.report.path, _unbiased(site, result)
    _, error = total.args
    read, *given, dtype, spec = error.args
    if (total.target, error.target) != (operator.add, outliers.OP) or read is not x:
        raise PassError(path, f"{total} adds {error} of {read}")
    check_column(path, site.match.scope, given, terms)
    if (dtype, spec) != (value_of(site.match.anchor).dtype, str(plan.spec)):
        raise PassError(path, f"{error} computes with {dtype}, {spec}")


def is_same(scope: Scope, node: fx.Node, wanted: fx.Node) -> bool:
    """Whether a node in a scope is the root's ``wanted``, or reads the same attribute."""
    outer = scope.outer(node)
    return outer is wanted or (
        outer.op == wanted.op == "get_attr" and outer.target == wanted.target
    )
