"""Check the rewritten graph; a failure (`PassError`) is a bug of the passes, never of the user.

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

from falqon_fx._compat import value_of
from falqon_fx.errors import PassError
from falqon_fx.ops import experts, merged_linear, outliers
from falqon_fx.passes.insert_operands import (
    AdapterNodes,
    Operands,
    cast_from,
    casts_per_adapter,
    detached,
    spec_of,
)
from falqon_fx.passes.match.dataflow import shape
from falqon_fx.passes.plan import Plan, SitePlan
from falqon_fx.passes.rewrite import adapter_inputs, arguments, outlier_terms, widened
from falqon_fx.passes.rows import RowsNodes
from falqon_fx.passes.scope import Scope, attribute
from falqon_fx.passes.slots import AdapterSlot
from falqon_fx.passes.terms import Experts, Linear, Param, in_fp8
from falqon_fx.passes.verify_experts import check_experts
from falqon_fx.passes.verify_nodes import check_column, check_outliers, is_same, origin
from falqon_fx.site.spec import RowsSpec

_WRITES = torch.ops.falqon.proxy_update_.default
_PENDING = torch.ops.falqon.pending.default

Wiring = Mapping[fx.Node, tuple[Any, tuple[Any, ...], Mapping[str, Any]]]


def wiring(root: Scope) -> Wiring:
    """Every node of the graph and its checkpoint bodies: its target, args and kwargs."""
    return {
        node: (node.target, node.args, node.kwargs)
        for scope in root.walk()
        for node in scope.gm.graph.nodes
    }


def operations(nodes: Wiring) -> list[fx.Node]:
    """The nodes that compute something."""
    return [node for node in nodes if node.op.startswith("call")]


def verify(plan: Plan, operands: Operands, before: Wiring) -> Wiring:
    """No site is half rewritten, and all else is as it was in ``before``; the graph as it is now.

    Raises:
        PassError: naming the first invariant that does not hold, and where.
    """
    for scope in plan.root.walk():
        scope.gm.graph.lint()
        _check_operands(scope)
    after = wiring(plan.root)
    new = [node for node in after if node not in before]
    _check_gone(plan, before, after)
    _check_counts(plan, operands, new)
    anchors = {site.match.anchor for site in plan.sites}
    results = _results(plan, anchors, before, after)
    for group in reversed(plan.groups):  # what reads a site's result comes before that site
        if isinstance(group[0].match.base, Experts):
            check_experts(group, operands, anchors, results)
        else:
            _check_group(plan, group, operands, anchors, results)
    _check_inputs(plan, operands, before)
    _check_bases(plan, operands)
    _check_casts(plan, operands, new)
    _check_write_back(plan, operands.rows, new)
    for nodes in operands.rows:
        _check_parts(plan, operands, nodes)
    _check_metadata(plan, new, results)
    return after


def _check_operands(scope: Scope) -> None:
    """What a checkpoint body takes is what its call gives."""
    if scope.call is None:
        return
    inputs = scope.gm.graph.find_nodes(op="placeholder")
    given = scope.call.args[1:]
    if len(inputs) != len(given):
        raise PassError(scope.call.name, f"it gives {len(given)} operands to {len(inputs)} inputs")
    for inner, outer in zip(inputs, given, strict=True):
        if scope.operands.get(inner) is not outer:
            raise PassError(scope.call.name, f"{inner.name} is not the operand it stands for")


def _check_gone(plan: Plan, before: Wiring, after: Wiring) -> None:
    inside: set[fx.Node] = set()
    for site in plan.sites:
        if left := sorted(node.name for node in site.match.nodes if node in after):
            raise PassError(site.report.path, f"half rewritten, {left} are still there")
        inside |= site.match.nodes
    if lost := [node.name for node in before if node not in inside and node not in after]:
        raise PassError(lost[0], f"operations outside the sites disappeared: {lost}")


def _check_counts(plan: Plan, operands: Operands, new: list[fx.Node]) -> None:
    """The passes add nothing but their ops, biases of B, and what update="rows" asks for."""
    biases = [a for s in plan.sites for a in s.match.adapters if a.lora_bias is not None]
    biased = sum(any(a.lora_bias is not None for a in s.match.adapters) for s in plan.sites)
    flipped = [s for s in plan.rows if s.base is not None and s.base.transposed]
    corrected = sum(bool(outlier_terms(site)) for site in plan.sites)
    zeroed = len(plan.rows) if plan.config.pending == "drop" else 0
    parts = len(plan.rows) * (4 if plan.spec.per_row else 2)
    stacks = sum(isinstance(site.match.base, Experts) for site in plan.sites)
    expected: dict[Any, int] = {
        merged_linear.OP: len(plan.groups) - stacks,
        experts.OP: stacks,
        operator.getitem: len(plan.sites) + sum(map(casts_per_adapter, plan.adapters)) + parts,
        merged_linear.CASTS: len({slot.kind for slot in plan.adapters}),
        _WRITES: min(1, len(plan.rows)),
        _PENDING: sum(own.b is not None for own in operands.written.values()),
        operator.mul: sum(a.bias_scaling != 1.0 for a in biases),
        outliers.OP: corrected,
        operator.add: len(biases) + corrected,
        "to": biased,
        "t": len(flipped),
        "detach": zeroed + sum(map(detached, plan.adapters)),
        "zero_": zeroed,
    }
    found = Counter(node.target for node in new if node.op.startswith("call"))
    for target in {**expected, **found}:
        count, wanted = found[target], expected.get(target, 0)
        if count != wanted:
            raise PassError(
                "the graph", f"{count} new operations {target}, {wanted} are to be added"
            )


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
        if node in plan.wide:
            target, args, kwargs = widened(target, args, kwargs)
        # State enters a checkpoint's body behind the operands that were there.
        now_args = now[1][: len(args)] if node in calls else now[1]
        pairs = zip(_inputs(args, kwargs), _inputs(now_args, now[2]), strict=False)
        found.update({old: current for old, current in pairs if old in anchors})
        read = fx.map_arg((args, dict(kwargs)), lambda n: found.get(n, n))
        if (target, *cast(tuple[Any, Any], read)) != (now[0], now_args, dict(now[2])):
            raise PassError(node.name, f"changed outside the sites: {node.format_node()}")
    return found


def _inputs(args: Any, kwargs: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.map_arg((args, dict(kwargs)), nodes.append)
    return nodes


def _check_group(
    plan: Plan,
    group: tuple[SitePlan, ...],
    operands: Operands,
    anchors: set[fx.Node],
    results: dict[fx.Node, fx.Node],
) -> None:
    """The op that stands for a group reads x and the operands that the plan gives to its sites."""
    first = group[0].match
    given = arguments(group, operands)
    columns = [given.weight, given.scale, None, given.a, given.a_scale, given.b, given.alpha]
    columns += [given.clamped, given.lora_a, given.lora_b]
    for i, site in enumerate(group):
        found, path = site.match, site.report.path
        if found.anchor not in results:
            continue  # nothing reads this site's result
        fused, index = origin(site, results[found.anchor])
        if (fused.target, index) != (merged_linear.OP, i):
            raise PassError(path, f"its result comes from {fused.name}")
        x, *rest = fused.args
        if first.x in anchors and isinstance(x, fx.Node):
            results.setdefault(first.x, x)
        if x is not results.get(first.x, first.x):
            raise PassError(path, f"{fused.name} reads {x}, not its input")
        check_outliers(plan, site, results[found.anchor], x)
        for column, wanted in zip(rest, columns, strict=False):
            if wanted is not None:
                check_column(path, found.scope, cast(list[fx.Node], column), wanted)
        bias, biases = found.base.bias, cast(list[fx.Node], rest[2])
        if len(biases) != (len(group) if bias is not None else 0):
            raise PassError(path, f"{biases} as bias")
        if isinstance(bias, Param):
            name = bias.name if bias.node is None else found.scope.outer(bias.node).target
            if found.scope.outer(biases[i]).target != name:
                raise PassError(path, f"{biases[i]} is not {name}")
        elif bias is not None:
            wanted_bias = results.get(bias, bias)
            if not is_same(found.scope, biases[i], found.scope.outer(wanted_bias)):
                raise PassError(path, f"{biases[i]} is not {wanted_bias}")
        own = [results.get(node, node) for node in adapter_inputs(group)]
        if rest[10] != own:
            raise PassError(path, f"its adapters read {rest[10]}, not {own}")
        dtype = value_of(first.anchor).dtype
        for column in (given.turned, given.joined, given.channels):
            check_column(path, found.scope, cast(list[fx.Node], rest.pop(14)), column)
        said = (given.owner, given.scaling, given.keep_x, dtype, str(group[0].spec))
        if tuple(rest[11:]) != said:
            raise PassError(path, f"{fused.name} computes with {rest[11:]}, not {said}")


def _check_inputs(plan: Plan, operands: Operands, before: Wiring) -> None:
    """A call gives its own arguments, then W and scale of each base, then copies of W, then the
    state of each slot.
    """
    inputs = plan.root.gm.graph.find_nodes(op="placeholder")
    given = [node for node in inputs if node in before]
    given += [node for base in operands.bases for node in base.entered]
    given += [copy.node for copy in operands.copies]
    unprepared = [nodes for nodes in operands.rows if nodes.slot.prepared is None]
    given += [node for nodes in unprepared for node in nodes.state]
    if list(inputs) != given:
        raise PassError("the graph", f"the inputs are {list(inputs)}, a call gives {given}")


def _check_bases(plan: Plan, operands: Operands) -> None:
    """A base is looked up by what its sites read as their weight."""
    nodes_of = {id(nodes.slot): nodes for nodes in operands.bases}
    for site in plan.sites:
        nodes, base, scope = nodes_of.get(id(site.base)), site.match.base, site.match.scope
        if nodes is None:
            continue  # written by update="rows"
        prepared = in_fp8(base)
        if prepared is not None:
            given = (prepared.code, prepared.scale, prepared.digest)
            read = [scope.outer(node) for node in given]
            same = list(nodes.given) == read
        else:
            weight = cast(Param, cast(Linear | Experts, base).weight)
            same = _is_of_weight(plan, scope, nodes.given, weight)
        if not same:
            made_of = [node.name for node in nodes.given]
            raise PassError(site.report.path, f"its base is made of {made_of}")
        size = (nodes.slot.out, nodes.slot.features)
        if isinstance(base, Linear) and size != shape(base.weight):
            raise PassError(site.report.path, f"its base is {size}")


def _is_of_weight(plan: Plan, scope: Scope, given: Sequence[fx.Node], weight: Param) -> bool:
    (node,) = given
    if weight.node is None:  # of a module called as such; tied weights have several names
        return attribute(plan.root.gm, str(node.target)) is weight.value
    return node.target == scope.outer(weight.node).target


def _check_casts(plan: Plan, operands: Operands, new: list[fx.Node]) -> None:
    """The adapters' casts are made of the plan's parameters, before everything else."""
    for slot in plan.adapters:
        path, nodes = slot.path, operands.adapters[id(slot)]
        size = casts_per_adapter(slot)
        for i, node in enumerate((nodes.a, nodes.a_scale, nodes.b, nodes.alpha)[:size]):
            casts, place = cast(tuple[fx.Node, int], tuple(cast(fx.Node, node).args))
            if casts.target is not merged_linear.CASTS:
                raise PassError(path, f"{node} is no cast of the adapter")
            if place % size != i:
                raise PassError(path, f"{node} is another part of the cast")
            given = cast(tuple[Any, ...], casts.args)
            lora_a, lora_b, scaling, scales, *fixed, wide, spec = given
            at = place // size
            if slot.base is not None:
                (base,) = (n for n in operands.bases if n.slot is slot.base)
                if scales[at] is not base.scale:
                    raise PassError(path, f"b is cast for {scales[at]}")
            _check_adapter(path, plan, nodes, lora_a[at], lora_b[at])
            read = [column[at] for column in fixed if column]
            check_column(path, plan.root, read, _fixed(slot))
            said = (slot.scaling, slot.wide, str(spec_of(slot, plan)))
            if (scaling[at], wide, spec) != said:
                raise PassError(path, f"cast with {scaling[at]}, {spec}")
    _check_first(plan, new, {merged_linear.CASTS, _WRITES})


def _fixed(slot: AdapterSlot) -> list[fx.Node]:
    """A_c, B_c and W_S of an adapter, as far as there are any."""
    _, _, *columns = cast_from([slot])
    nodes = [param.node for column in columns for param in column]
    return [node for node in nodes if node is not None]


def _check_adapter(
    path: str, plan: Plan, nodes: AdapterNodes, lora_a: fx.Node, lora_b: fx.Node
) -> None:
    for node, read in ((lora_a, nodes.lora_a), (lora_b, nodes.lora_b)):
        wanted = cast(fx.Node, read.args[0]) if read.target == "detach" else read
        if not is_same(plan.root, node, wanted):
            raise PassError(path, f"the cast reads {node}, not {wanted}")


def _check_first(plan: Plan, new: list[fx.Node], targets: set[Any]) -> None:
    calls = [n for n in plan.root.gm.graph.nodes if n.op.startswith("call")]
    made = [node for node in new if node.target in targets]
    for node in made:
        if early := [n for n in calls[: calls.index(node)] if n not in new]:
            raise PassError(early[0].name, "it stands before the update")


def _check_write_back(plan: Plan, slots: Sequence[RowsNodes], new: list[fx.Node]) -> None:
    """One write-back, of the state that the sites read."""
    updates = [node for node in new if node.target is _WRITES]
    if not updates:
        return
    (update,) = updates
    columns = cast(tuple[Any, ...], update.args)
    said = ([nodes.slot.scaling for nodes in slots], str(RowsSpec.from_config(plan.config)))
    if columns[8:] != said:
        raise PassError(update.name, f"the update computes with {columns[8:]}, not {said}")
    for i, nodes in enumerate(slots):
        path = nodes.slot.path
        given = [column[i] for column in columns[:7]]
        for node, wanted in zip(given, (*nodes.state, nodes.lora_b, nodes.lora_a), strict=True):
            if not is_same(plan.root, node, wanted):
                raise PassError(path, f"the update has {node}, not {wanted}")
        base = columns[7][i]
        if nodes.base is None:
            if base is not None:
                raise PassError(path, f"the update reads {base}, a weight that is released")
            continue
        flipped = nodes.slot.base is not None and nodes.slot.base.transposed
        base = base.args[0] if flipped else base
        if not is_same(plan.root, base, nodes.base):
            raise PassError(path, f"the update reads {base} as its base")


def _check_parts(plan: Plan, operands: Operands, nodes: RowsNodes) -> None:
    """What a site reads of a written W' = [W; A], and of what is pending."""
    path, own = nodes.slot.path, operands.written[id(nodes.slot)]
    code, scale, applied, *_ = nodes.state
    upper, lower = slice(None, nodes.slot.out), slice(nodes.slot.out, None)
    parts = [(own.weight, code, upper), (own.a, code, lower)]
    if plan.spec.per_row:
        parts += [(own.scale, scale, upper), (own.a_scale, scale, lower)]
    for node, state, rows in parts:
        if node.args != (state, rows):
            raise PassError(path, f"{node} is {node.args}, not {rows} of {state}")
    if own.b is not None:
        lora_b, held, scaling, _ = own.b.args
        same = (held, scaling) == (applied, nodes.slot.scaling)
        if not same or not is_same(plan.root, cast(fx.Node, lora_b), nodes.lora_b):
            raise PassError(path, f"its pending part is made of {own.b.args}")


def _check_metadata(plan: Plan, new: list[fx.Node], results: Mapping[fx.Node, fx.Node]) -> None:
    for node in new:
        if not {"val", "example_value", "falqon_shape"} & node.meta.keys():
            raise PassError(node.name, "it has no metadata of its value")
    for site in plan.sites:
        anchor = site.match.anchor
        result = results.get(anchor)
        if result is not None:
            if value_of(result) is not value_of(anchor):
                raise PassError(result.name, f"it has not the value of {anchor.name} as metadata")
            if lost := {"nn_module_stack", "stack_trace"} & anchor.meta.keys() - result.meta.keys():
                raise PassError(result.name, f"it has lost {sorted(lost)} of {anchor.name}")
