"""Pass 6: check the rewritten graph; a failure is a bug of the passes, never of the user."""

from __future__ import annotations

import operator

import torch
from torch import fx

from falqon_fx.passes.normalize import Scope, value_of
from falqon_fx.passes.plan import Plan

_FUSED = torch.ops.falqon.merged_linear.default
_UPDATE = torch.ops.falqon.proxy_update_.default
# What the passes may add: the ops, a lora_B bias, the zeroing of B that "drop" asks for, and the
# view as [out, in] of a base weight that is stored [in, out].
_ADDED = {_FUSED, _UPDATE, operator.getitem, operator.add, operator.mul, "to", "detach", "zero_"}
_ADDED |= {"t"}


def operations(root: Scope) -> tuple[fx.Node, ...]:
    """Every node that computes something, in the graph and its checkpoint bodies."""
    return tuple(
        node for scope in root.walk() for node in scope.gm.graph.nodes if node.op.startswith("call")
    )


def verify(plan: Plan, before: tuple[fx.Node, ...]) -> None:
    """No site is half rewritten, and all else is as it was in ``before``.

    Raises:
        AssertionError: naming the first invariant that does not hold.
    """
    for scope in plan.root.walk():
        scope.gm.graph.lint()
    after, old = operations(plan.root), set(before)
    fused = [node for node in after if node.target is _FUSED and node not in old]
    assert len(fused) == len(plan.groups), f"{len(fused)} fused ops for {len(plan.groups)} groups"
    outputs = [output for node in fused for output in node.users]
    assert len(outputs) == len(plan.sites), f"{len(outputs)} outputs for {len(plan.sites)} sites"
    for output in outputs:
        assert value_of(output) is not None, f"{output.name} has lost its metadata"
    _check_outside(plan, before, after)
    _check_update(plan, old)


def _check_outside(plan: Plan, before: tuple[fx.Node, ...], after: tuple[fx.Node, ...]) -> None:
    inside = {node for site in plan.sites for node in site.match.nodes}
    outside, present = [n for n in before if n not in inside], set(after)
    lost = [node.name for node in outside if node not in present]
    assert not lost, f"operations outside the sites disappeared: {lost}"
    new = present.difference(outside)
    strange = [node.name for node in new if node.target not in _ADDED]
    assert not strange, f"operations that no pass adds: {strange}"


def _check_update(plan: Plan, old: set[fx.Node]) -> None:
    calls = [n for n in plan.root.gm.graph.nodes if n.op.startswith("call")]
    updates = [node for node in calls if node.target is _UPDATE and node not in old]
    assert len(updates) == bool(plan.slots), f"{len(updates)} updates in one graph"
    calls = [node for node in calls if node.target != "t" or node in old]
    assert not updates or calls[0] is updates[0], "the update is not the graph's first operation"
