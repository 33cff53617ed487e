"""Pass 5: put ``falqon::merged_linear`` in the place of each planned group of siblings."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from falqon_fx._compat import mark_static_input
from falqon_fx.merged import STATE, allocate
from falqon_fx.passes.normalize import Scope, value_of
from falqon_fx.passes.plan import Plan, SitePlan, Slot
from falqon_fx.passes.terms import Param


@dataclass(frozen=True)
class SlotNodes:
    """The root graph's nodes of a slot: its state, in the order of `STATE`, and its parameters."""

    slot: Slot
    state: tuple[fx.Node, ...]
    base: fx.Node | None
    lora_a: fx.Node
    lora_b: fx.Node


def rewrite(plan: Plan) -> tuple[SlotNodes, ...]:
    """Edit the graph of ``plan.root`` in place; returns where each slot's state enters it.

    State of unprepared sites becomes trailing placeholders of the root graph, and trailing operands
    of the checkpoint bodies that hold sites.
    """
    slots = tuple(_enter(plan, slot) for slot in plan.slots)
    replaced: dict[fx.Node, fx.Node] = {}  # a site may read the result of another
    for group in plan.groups:
        _replace(plan, group, slots, replaced)
    for scope in plan.root.walk():
        scope.gm.graph.lint()
        scope.gm.recompile()
    return slots


def _enter(plan: Plan, slot: Slot) -> SlotNodes:
    lora_a, lora_b = _node(plan.root, slot.lora_a), _node(plan.root, slot.lora_b)
    if slot.prepared is not None:
        return SlotNodes(slot, slot.prepared, None, lora_a, lora_b)
    assert slot.base is not None
    base = _node(plan.root, slot.base)
    state = []
    value = slot.base.value
    fake = allocate(  # shapes and dtypes; the values come at run time
        slot.out,
        slot.features,
        slot.rank,
        value.dtype,
        slot.scaling,
        plan.spec,
        torch.device("meta"),
    )
    for name, tensor in zip(STATE, fake.tensors, strict=True):
        node = plan.root.add_input(f"falqon_{slot.index}_{name}")
        node.meta["falqon_shape"] = (tuple(tensor.shape), tensor.dtype, value.device)
        mark_static_input(node)
        state.append(node)
    return SlotNodes(slot, tuple(state), base, lora_a, lora_b)


def _node(scope: Scope, param: Param) -> fx.Node:
    """The node of a parameter; one is made for the parameter of a module called as such."""
    if param.node is not None:
        return param.node
    with scope.after_inputs():
        node = scope.gm.graph.get_attr(str(param.name))
    node.meta["val"] = param.value
    return node


def _replace(
    plan: Plan,
    group: tuple[SitePlan, ...],
    slots: tuple[SlotNodes, ...],
    replaced: dict[fx.Node, fx.Node],
) -> None:
    first = group[0].match
    scope, graph = first.scope, first.scope.gm.graph
    own = [slots[site.slot.index] for site in group]
    biases = [site.match.base.bias for site in group]
    columns = [[_bring(scope, slot.state[i]) for slot in own] for i in range(3)]
    columns.append([_bring(scope, slot.lora_b) for slot in own])
    columns.append([_bias(scope, bias) for bias in biases if bias is not None])
    with graph.inserting_before(first.anchor):
        fused = graph.call_function(
            torch.ops.falqon.merged_linear.default,
            (
                replaced.get(first.x, first.x),
                *([_at_hand(graph, node) for node in column] for column in columns),
                [site.match.scaling for site in group],
                value_of(first.anchor).dtype,
                plan.spec_of(group),
            ),
        )
        outputs = [graph.call_function(operator.getitem, (fused, i)) for i in range(len(group))]
    _describe(fused, first.anchor, tuple(value_of(site.match.anchor) for site in group))
    for site, output in zip(group, outputs, strict=True):
        anchor = site.match.anchor
        _describe(output, anchor, value_of(anchor))
        result = _add_lora_bias(site, output)
        anchor.replace_all_uses_with(result)
        replaced[anchor] = result
    for site in group:
        _erase(graph, site.match.nodes)


def _bias(scope: Scope, bias: Param | fx.Node) -> fx.Node:
    return _node(scope, bias) if isinstance(bias, Param) else bias


def _at_hand(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A parameter where the graph is being edited: its own get_attr may stand further down."""
    if node.op != "get_attr":
        return node
    copy = graph.get_attr(str(node.target))
    copy.meta.update(node.meta)
    return copy


def _add_lora_bias(site: SitePlan, output: fx.Node) -> fx.Node:
    """A bias of lora_B is outside W': it is added as the original does."""
    found = site.match
    if found.lora_bias is None:
        return output
    graph, anchor = found.scope.gm.graph, found.anchor
    value, bias = value_of(anchor), found.lora_bias.value
    with graph.inserting_before(anchor):
        term = _node(found.scope, found.lora_bias)
        if found.bias_scaling != 1.0:
            term = graph.call_function(operator.mul, (term, found.bias_scaling))
            _describe(term, anchor, bias)
        total = graph.call_function(operator.add, (output, term))
        result = graph.call_method("to", (total, value.dtype))
    _describe(total, anchor, value.to(torch.promote_types(value.dtype, bias.dtype)))
    _describe(result, anchor, value)
    return result


def _describe(node: fx.Node, anchor: fx.Node, value: object) -> None:
    """A node that is ``value`` comes from the same place in the model as the anchor."""
    node.meta.update({k: v for k, v in anchor.meta.items() if k in _KEPT})
    node.meta["example_value" if "example_value" in anchor.meta else "val"] = value


_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack")


def _erase(graph: fx.Graph, nodes: frozenset[fx.Node]) -> None:
    remaining = set(nodes)
    while free := [node for node in remaining if not node.users]:
        for node in free:
            graph.erase_node(node)
        remaining.difference_update(free)


def _bring(scope: Scope, node: fx.Node) -> fx.Node:
    """A root node's value inside ``scope``: itself, or the operand that carries it there."""
    if scope.parent is None or scope.call is None:
        return node
    operand = _bring(scope.parent, node)
    for inner, outer in scope.operands.items():
        if outer is operand:
            return inner
    inner = scope.add_input(node.name)
    inner.meta.update(node.meta)
    scope.call.args = (*scope.call.args, operand)
    scope.operands[inner] = operand
    return inner
