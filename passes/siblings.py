"""Which matches read the same x and become one op: one cast, one GEMM (q/k/v, gate/up)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from falqon_fx.passes.dataflow import Match
from falqon_fx.passes.modes import Mode
from falqon_fx.passes.normalize import value_of, writes
from falqon_fx.passes.terms import BaseLinear


def group_siblings(matches: Sequence[Match], within: Mapping[fx.Node, Mode]) -> list[list[Match]]:
    """Matches that can be computed where the first of them stands, group by group in graph order;
    ``within`` says which modes each node runs in.

    Siblings share their scope, x, output dtype, modes and whether they have a bias; a site under
    ``no_grad`` takes no others with it. No operation between the first and the last of them writes
    in place: x is the same for all.
    """
    groups: dict[object, list[list[Match]]] = {}
    scopes = {id(found.scope): found.scope for found in matches}
    written = {k: [n for n in scope.gm.graph.nodes if writes(n)] for k, scope in scopes.items()}
    for found in matches:
        of_key = groups.setdefault((_key(found), within[found.anchor]), [])
        if of_key and not _written_between(of_key[-1][0], found, written[id(found.scope)]):
            of_key[-1].append(found)
        else:
            of_key.append([found])
    order = {id(found): i for i, found in enumerate(matches)}
    every = [group for of_key in groups.values() for group in of_key]
    return sorted(every, key=lambda group: order[id(group[0])])


def _key(found: Match) -> object:
    bias = found.base.bias
    if isinstance(found.base, BaseLinear) and bias is not None and not _is_leaf(bias):
        return id(found)  # a computed bias may not exist yet where the first sibling stands
    return (id(found.scope), found.x, value_of(found.anchor).dtype, bias is None)


def _is_leaf(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _written_between(first: Match, last: Match, written: list[fx.Node]) -> bool:
    return any(first.anchor < node < last.anchor for node in written)
