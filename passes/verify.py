"""Pass 7: check the rewritten graph; a failure is a bug of the passes, never of the user.

Every node is accounted for: those of the sites are gone, those that the passes add are counted and
read what the plan says, and all others are as they were but for reading a site's new result.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from falqon_fx.passes.normalize import Scope, value_of
from falqon_fx.passes.plan import Plan, SitePlan
from falqon_fx.passes.rewrite import SlotNodes
from falqon_fx.passes.terms import Param

_FUSED = torch.ops.falqon.merged_linear.default
_UPDATE = torch.ops.falqon.proxy_update_.default

Wiring = Mapping[fx.Node, tuple[Any, tuple[Any, ...], Mapping[str, Any]]]


def wiring(root: Scope) -> Wiring:
    """Every node of the graph and its checkpoint bodies: its target, args and kwargs."""
    return {
        node: (node.target, node.args, node.kwargs)
        for scope in root.walk()
        for node in scope.gm.graph.nodes
    }


def operations(nodes: Wiring) -> list[fx.Node]:
    """Those that compute something."""
    return [node for node in nodes if node.op.startswith("call")]


def verify(plan: Plan, slots: Sequence[SlotNodes], before: Wiring) -> Wiring:
    """No site is half rewritten, and all else is as it was in ``before``; the graph as it is now.

    Raises:
        AssertionError: naming the first invariant that does not hold.
    """
    for scope in plan.root.walk():
        scope.gm.graph.lint()
        _check_operands(scope)
    after = wiring(plan.root)
    new = [node for node in after if node not in before]
    _check_gone(plan, before, after)
    _check_counts(plan, new)
    anchors = {site.match.anchor for site in plan.sites}
    results = _results(plan, anchors, before, after)
    for group in reversed(plan.groups):  # what reads a site's result comes before that site
        _check_group(plan, group, slots, anchors, results)
    _check_update(plan, slots, new)
    _check_metadata(plan, new, results)
    return after


def _check_operands(scope: Scope) -> None:
    """What a checkpoint body takes is what its call gives."""
    if scope.call is None:
        return
    inputs = scope.gm.graph.find_nodes(op="placeholder")
    given = scope.call.args[1:]
    assert len(inputs) == len(given), (
        f"{scope.call.name} gives {len(given)} operands to {len(inputs)} inputs"
    )
    for inner, outer in zip(inputs, given, strict=True):
        known = scope.operands.get(inner)
        assert known is outer, f"{inner.name} of {scope.call.name} is not the operand it stands for"


def _check_gone(plan: Plan, before: Wiring, after: Wiring) -> None:
    inside: set[fx.Node] = set()
    for site in plan.sites:
        left = sorted(node.name for node in site.match.nodes if node in after)
        assert not left, f"{site.report.path} is half rewritten: {left} are still there"
        inside |= site.match.nodes
    lost = [node.name for node in before if node not in inside and node not in after]
    assert not lost, f"operations outside the sites disappeared: {lost}"


def _check_counts(plan: Plan, new: list[fx.Node]) -> None:
    """The passes add nothing but their ops, a bias of B, and what "drop" and [in, out] ask for."""
    biases = [site.match for site in plan.sites if site.match.lora_bias is not None]
    flipped = [slot for slot in plan.slots if slot.base is not None and slot.base.transposed]
    zeroed = len(plan.slots) if plan.spec.pending == "drop" else 0
    expected: dict[Any, int] = {
        _FUSED: len(plan.groups),
        operator.getitem: len(plan.sites),
        _UPDATE: min(1, len(plan.slots)),
        operator.mul: sum(match.bias_scaling != 1.0 for match in biases),
        operator.add: len(biases),
        "to": len(biases),
        "t": len(flipped),
        "detach": zeroed,
        "zero_": zeroed,
    }
    found = Counter(node.target for node in new if node.op.startswith("call"))
    for target in {**expected, **found}:
        count, wanted = found[target], expected.get(target, 0)
        assert count == wanted, f"{count} new operations {target}, {wanted} are to be added"


def _results(
    plan: Plan, anchors: set[fx.Node], before: Wiring, after: Wiring
) -> dict[fx.Node, fx.Node]:
    """What is read now in the place of each anchor; everything else must be read as before."""
    calls = {scope.call for scope in plan.root.walk()}
    found: dict[fx.Node, fx.Node] = {}
    for node, now in after.items():
        if node not in before:
            continue
        target, args, kwargs = before[node]
        # State enters a checkpoint's body behind the operands that were there.
        now_args = now[1][: len(args)] if node in calls else now[1]
        pairs = zip(_inputs(args, kwargs), _inputs(now_args, now[2]), strict=False)
        found.update({old: current for old, current in pairs if old in anchors})
        read = fx.map_arg((args, dict(kwargs)), lambda n: found.get(n, n))
        same = (target, *cast(tuple[Any, Any], read)) == (now[0], now_args, dict(now[2]))
        assert same, f"{node.name}, outside the sites, was changed: {node.format_node()}"
    return found


def _inputs(args: Any, kwargs: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.map_arg((args, dict(kwargs)), nodes.append)
    return nodes


def _check_group(
    plan: Plan,
    group: tuple[SitePlan, ...],
    slots: Sequence[SlotNodes],
    anchors: set[fx.Node],
    results: dict[fx.Node, fx.Node],
) -> None:
    """The op that stands for a group reads x and the state that the plan gives to its sites."""
    first = group[0].match
    for i, site in enumerate(group):
        found, path = site.match, site.report.path
        if found.anchor not in results:
            continue  # nothing reads this site's result
        fused, index = _origin(site, results[found.anchor])
        assert (fused.target, index) == (_FUSED, i), f"{path}: its result comes from {fused.name}"
        x, *columns = fused.args
        if first.x in anchors and isinstance(x, fx.Node):
            results.setdefault(first.x, x)
        assert x is results.get(first.x, first.x), f"{path}: {fused.name} reads {x}, not its input"
        nodes = slots[site.slot.index]
        own = (*nodes.state[:3], nodes.lora_b)
        for column, wanted in zip(columns, own, strict=False):
            given = cast(Any, column)[i]
            assert _is_same(found.scope, given, wanted), f"{path}: {given} is not its {wanted}"
        bias, biases = found.base.bias, cast(list[fx.Node], columns[4])
        assert len(biases) == (len(group) if bias is not None else 0), f"{path}: {biases} as bias"
        if isinstance(bias, Param):
            name = bias.name if bias.node is None else found.scope.outer(bias.node).target
            assert found.scope.outer(biases[i]).target == name, f"{path}: {biases[i]} is not {name}"
        rest = tuple(columns[5:])
        said = ([s.match.scaling for s in group], value_of(first.anchor).dtype, plan.spec_of(group))
        assert rest == said, f"{path}: {fused.name} computes with {rest}, not {said}"


def _origin(site: SitePlan, result: Any) -> tuple[fx.Node, int]:
    """The op that a site's result comes from, and which of its outputs it is."""
    if site.match.lora_bias is not None:  # to(add(output, bias))
        result = result.args[0].args[0]
    assert result.target is operator.getitem, f"{site.report.path}: its result is {result}"
    return cast(tuple[fx.Node, int], tuple(result.args))


def _is_same(scope: Scope, node: fx.Node, wanted: fx.Node) -> bool:
    """Whether a node in a scope is the root's ``wanted``, or reads the same attribute."""
    outer = scope.outer(node)
    return outer is wanted or (outer.op, outer.target) == ("get_attr", wanted.target)


def _check_update(plan: Plan, slots: Sequence[SlotNodes], new: list[fx.Node]) -> None:
    """One update, before everything else, of the state that the sites read."""
    updates = [node for node in new if node.target is _UPDATE]
    if not updates:
        return
    (update,) = updates
    calls = [n for n in plan.root.gm.graph.nodes if n.op.startswith("call")]
    early = [node for node in calls[: calls.index(update)] if node not in new or node.target != "t"]
    assert not early, f"{early[0].name} stands before the update"
    columns = cast(tuple[Any, ...], update.args)
    said = ([nodes.slot.scaling for nodes in slots], str(plan.spec))
    assert columns[8:] == said, f"the update computes with {columns[8:]}, not {said}"
    for i, nodes in enumerate(slots):
        path = nodes.slot.path
        given = [column[i] for column in columns[:7]]
        for node, wanted in zip(given, (*nodes.state, nodes.lora_b, nodes.lora_a), strict=True):
            assert _is_same(plan.root, node, wanted), f"{path}: the update has {node}, not {wanted}"
        base = columns[7][i]
        if nodes.base is None:
            assert base is None, f"{path}: the update reads {base}, a weight that is released"
            continue
        flipped = nodes.slot.base is not None and nodes.slot.base.transposed
        base = base.args[0] if flipped else base
        assert _is_same(plan.root, base, nodes.base), f"{path}: the update reads {base} as its base"


def _check_metadata(plan: Plan, new: list[fx.Node], results: Mapping[fx.Node, fx.Node]) -> None:
    for node in new:
        known = {"val", "example_value", "falqon_shape"} & node.meta.keys()
        assert known, f"{node.name} has no metadata of its value"
    for site in plan.sites:
        anchor = site.match.anchor
        result = results.get(anchor)
        if result is not None:
            kept = value_of(result) is value_of(anchor)
            assert kept, f"{result.name} has not the value of {anchor.name} in its metadata"
            lost = {"nn_module_stack", "stack_trace"} & anchor.meta.keys() - result.meta.keys()
            assert not lost, f"{result.name} has lost {sorted(lost)} of {anchor.name}"
