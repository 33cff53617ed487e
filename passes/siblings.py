"""Which matches read the same x and become one op: one cast, one GEMM (q/k/v, gate/up)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from falqon_fx._compat import value_of
from falqon_fx.passes.match.dataflow import Match
from falqon_fx.passes.terms import Experts, Prepared
from falqon_fx.passes.writes import written


def group_siblings(matches: Sequence[Match], rows: bool = False) -> list[list[Match]]:
    """Matches that can be computed where the first of them stands, group by group in graph order.

    Siblings share their scope, x, output dtype, modes and whether they have a bias; a site under
    ``no_grad`` takes no others with it. No operation between the first and the last of them writes
    in place: x is the same for all. With update="rows" (``rows``) a site whose A is trained has no
    pending part, so that it is none of those that have.
    """
    groups: dict[object, list[list[Match]]] = {}
    scopes = {id(found.scope): found.scope for found in matches}
    writing = {k: [n for n in s.gm.graph.nodes if written(n)] for k, s in scopes.items()}
    for found in matches:
        apart = rows and any(a.lora_a.value.requires_grad for a in found.adapters)
        of_key = groups.setdefault((_key(found), apart), [])
        if of_key and not _written_between(of_key[-1][0], found, writing[id(found.scope)]):
            of_key[-1].append(found)
        else:
            of_key.append([found])
    order = {id(found): i for i, found in enumerate(matches)}
    every = [group for of_key in groups.values() for group in of_key]
    return sorted(every, key=lambda group: order[id(group[0])])


def _key(found: Match) -> object:
    if any(adapter.x is not None for adapter in found.adapters):
        return id(found)  # its dropout comes after the first sibling
    if isinstance(found.base, Experts):
        return id(found)
    bias = found.base.bias
    if isinstance(found.base, Prepared) and bias is not None and not _is_leaf(bias):
        return id(found)  # a computed bias may not exist yet where the first sibling stands
    anchor, scope = found.anchor, found.scope
    return (id(scope), found.x, value_of(anchor).dtype, bias is None, scope.mode(anchor))


def _is_leaf(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _written_between(first: Match, last: Match, writing: list[fx.Node]) -> bool:
    return any(first.anchor < node < last.anchor for node in writing)
