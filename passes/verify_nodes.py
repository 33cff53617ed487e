"""Where the results and the operands of an op come from, for the checks of rewritten graphs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

from torch import fx

from falqon_fx.errors import PassError
from falqon_fx.passes.plan import SitePlan
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
    biased = sum(a.lora_bias is not None for a in site.match.adapters)
    if biased:  # to(add(output, bias))
        result = result.args[0]
        for _ in range(biased):
            result = result.args[0]
    if result.target is not operator.getitem:
        raise PassError(site.report.path, f"its result is {result}")
    return cast(tuple[fx.Node, int], tuple(result.args))


def is_same(scope: Scope, node: fx.Node, wanted: fx.Node) -> bool:
    """Whether a node in a scope is the root's ``wanted``, or reads the same attribute."""
    outer = scope.outer(node)
    return outer is wanted or (
        outer.op == wanted.op == "get_attr" and outer.target == wanted.target
    )
