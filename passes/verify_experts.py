"""The check of the op that stands for a stack of experts (see `falqon_fx.passes.verify`)."""

from __future__ import annotations

from typing import cast

from torch import fx

from falqon_fx._compat import value_of
from falqon_fx.errors import PassError
from falqon_fx.ops import experts
from falqon_fx.passes.insert_operands import Operands
from falqon_fx.passes.plan import SitePlan
from falqon_fx.passes.rewrite import experts_arguments
from falqon_fx.passes.terms import Experts
from falqon_fx.passes.verify_nodes import check_column, origin


def check_experts(
    group: tuple[SitePlan, ...],
    operands: Operands,
    anchors: set[fx.Node],
    results: dict[fx.Node, fx.Node],
) -> None:
    """The op of a stack of experts, which stands for one site, reads x, the rows and the experts of
    its match and the operands that the plan gives to it.
    """
    (site,) = group
    found, base, path = site.match, cast(Experts, site.match.base), site.report.path
    if found.anchor not in results:
        return
    fused, index = origin(site, results[found.anchor])
    if (fused.target, index) != (experts.OP, 0):
        raise PassError(path, f"its result comes from {fused.name}")
    x, rows, *way = fused.args[:5]
    if found.x in anchors and isinstance(x, fx.Node):
        results.setdefault(found.x, x)
    read = (results.get(found.x, found.x), [] if base.rows is None else [base.rows])
    if (x, rows) != read or tuple(way) != (base.groups, base.by_id, base.experts):
        raise PassError(path, f"{fused.name} reads {fused.args[:5]}, not its rows")
    lists, given = experts_arguments(site, operands)
    columns = [[node] for node in fused.args[5:7]] + [*fused.args[7:12]]
    for column, wanted in zip(columns, lists, strict=True):
        check_column(path, found.scope, cast(list[fx.Node], column), wanted)
    dtype = value_of(found.anchor).dtype
    said = (given.scaling, given.keep_x, dtype, str(site.spec))
    if fused.args[12:] != said:
        raise PassError(path, f"{fused.name} computes with {fused.args[12:]}, not {said}")
