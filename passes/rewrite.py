"""Put ``falqon::merged_linear`` in the place of each planned group of siblings."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from falqon_fx._compat import value_of
from falqon_fx.ops import experts, merged_linear, outliers, wide_linear
from falqon_fx.passes.insert_operands import AdapterNodes, Operands, SiteNodes
from falqon_fx.passes.plan import Plan, SitePlan
from falqon_fx.passes.scope import Scope, erase_unread
from falqon_fx.passes.terms import Experts, Param
from falqon_fx.passes.vocabulary import LINEAR, linear_arguments


def rewrite(plan: Plan, operands: Operands) -> None:
    """Edit the graph of ``plan.root`` in place.

    What sites inside of checkpoint bodies read becomes trailing operands of these bodies.
    """
    replaced: dict[fx.Node, fx.Node] = {}  # a site may read the result of another
    for group in plan.groups:
        if isinstance(group[0].match.base, Experts):
            _replace_experts(group[0], operands, replaced)
        else:
            _replace(plan, group, operands, replaced)
    for node in plan.wide:
        node.target, node.args, node.kwargs = widened(node.target, node.args, node.kwargs)
    for scope in plan.root.walk():
        scope.gm.graph.lint()
        scope.gm.recompile()


def widened(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The call that computes the same in float32 (`falqon_fx.wide_linear`)."""
    if target in LINEAR:
        return wide_linear.OP, linear_arguments(args, kwargs), {}
    return wide_linear.wide_attention, args, dict(kwargs)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a group's op that don't depend on where in the graph it stands, as nodes of
    the root, in the op's order; x, biases and what the adapters read are the scope's own.
    """

    weight: list[fx.Node]
    scale: list[fx.Node]
    a: list[fx.Node]
    a_scale: list[fx.Node]
    b: list[fx.Node]
    alpha: list[fx.Node]
    clamped: list[fx.Node]
    lora_a: list[fx.Node]
    lora_b: list[fx.Node]
    owner: list[int]
    scaling: list[float]
    keep_x: bool
    turned: list[fx.Node]
    joined: list[fx.Node]
    channels: list[fx.Node]


def arguments(group: Sequence[SitePlan], operands: Operands) -> Arguments:
    """The arguments of a group of sites."""
    sites: list[SiteNodes] = [operands.of(site) for site in group]
    each: list[tuple[int, AdapterNodes]] = [
        (i, adapter) for i, site in enumerate(sites) for adapter in site.adapters
    ]
    adapters = [adapter for _, adapter in each]
    matches = [a for site in group for a in site.match.adapters]
    trained = any(a.lora_a.value.requires_grad for a in matches)
    return Arguments(
        [site.weight for site in sites],
        [site.scale for site in sites],
        [adapter.a for adapter in adapters],
        [adapter.a_scale for adapter in adapters],
        [adapter.b for adapter in adapters if adapter.b is not None],
        [adapter.alpha for adapter in adapters if adapter.alpha is not None],
        [site.clamped for site in sites if site.clamped is not None],
        [adapter.lora_a for adapter in adapters],
        [adapter.lora_b for adapter in adapters],
        [i for i, _ in each],
        [adapter.scaling for adapter in adapters],
        trained and torch.is_grad_enabled(),
        operands.turned_of(group),
        operands.joined_of(group),
        [adapter.channels for adapter in adapters if adapter.channels is not None],
    )


def _replace(
    plan: Plan, group: tuple[SitePlan, ...], operands: Operands, replaced: dict[fx.Node, fx.Node]
) -> None:
    first = group[0].match
    scope, graph = first.scope, first.scope.gm.graph
    given = arguments(group, operands)

    def here(nodes: Sequence[fx.Node]) -> list[fx.Node]:
        return [_bring(scope, node) for node in nodes]

    columns = [given.a, given.a_scale, given.b, given.alpha, given.clamped]
    columns += [given.lora_a, given.lora_b]
    weight, scale, *adapters = (here(column) for column in (given.weight, given.scale, *columns))
    turned, joined, channels = map(here, (given.turned, given.joined, given.channels))
    biases = [site.match.base.bias for site in group]
    bias = [_bias(scope, b) for b in biases if b is not None]
    with graph.inserting_before(first.anchor):
        own_x = [replaced.get(node, node) for node in adapter_inputs(group)]
        fused = graph.call_function(
            merged_linear.OP,
            (
                replaced.get(first.x, first.x),
                *([_at_hand(graph, node) for node in column] for column in (weight, scale, bias)),
                *([_at_hand(graph, node) for node in column] for column in adapters),
                own_x,
                given.owner,
                given.scaling,
                given.keep_x,
                turned,
                joined,
                [_at_hand(graph, node) for node in channels],
                value_of(first.anchor).dtype,
                str(group[0].spec),
            ),
        )
        outputs = [graph.call_function(operator.getitem, (fused, i)) for i in range(len(group))]
    _describe(fused, first.anchor, tuple(value_of(site.match.anchor) for site in group))
    for site, output in zip(group, outputs, strict=True):
        anchor = site.match.anchor
        _describe(output, anchor, value_of(anchor))
        output = _add_outliers(plan, site, output, replaced.get(first.x, first.x))
        result = _add_lora_bias(site, output)
        anchor.replace_all_uses_with(result)
        replaced[anchor] = result
    for site in group:
        erase_unread(site.match.nodes)


def experts_arguments(site: SitePlan, operands: Operands) -> tuple[list[list[fx.Node]], Arguments]:
    """The lists of operands of a stack's op that are nodes of the root, in its order, and all that
    a linear layer's op would get.
    """
    given = arguments((site,), operands)
    lists = [given.weight, given.scale, given.a, given.a_scale, given.b]
    return [*lists, given.lora_a, given.lora_b], given


def _replace_experts(site: SitePlan, operands: Operands, replaced: dict[fx.Node, fx.Node]) -> None:
    found, base = site.match, site.match.base
    assert isinstance(base, Experts)
    scope, graph, anchor = found.scope, found.scope.gm.graph, found.anchor
    lists, given = experts_arguments(site, operands)
    columns = [[_bring(scope, node) for node in column] for column in lists]
    with graph.inserting_before(anchor):
        weight, scale, *adapters = [[_at_hand(graph, node) for node in c] for c in columns]
        fused = graph.call_function(
            experts.OP,
            (
                replaced.get(found.x, found.x),
                [] if base.rows is None else [base.rows],
                base.groups,
                base.by_id,
                base.experts,
                *weight,
                *scale,
                *adapters,
                given.scaling,
                given.keep_x,
                value_of(anchor).dtype,
                str(site.spec),
            ),
        )
        output = graph.call_function(operator.getitem, (fused, 0))
    _describe(fused, anchor, (value_of(anchor),))
    _describe(output, anchor, value_of(anchor))
    anchor.replace_all_uses_with(output)
    replaced[anchor] = output
    erase_unread(found.nodes)


def adapter_inputs(group: Sequence[SitePlan]) -> list[fx.Node]:
    """What each adapter of a group reads; nothing where all read the sites' x."""
    adapters = [(site.match, a) for site in group for a in site.match.added]
    if all(a.x is None for _, a in adapters):
        return []
    return [found.x if a.x is None else a.x for found, a in adapters]


def _bias(scope: Scope, bias: Param | fx.Node) -> fx.Node:
    return _node(scope, bias) if isinstance(bias, Param) else bias


def _node(scope: Scope, param: Param) -> fx.Node:
    """The node of a parameter; one is made for the parameter of a module called as such."""
    if param.node is not None:
        return param.node
    with scope.after_inputs():
        node = scope.gm.graph.get_attr(str(param.name))
    node.meta["val"] = param.value
    return node


def _at_hand(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A parameter where the graph is being edited: its own get_attr may stand further down."""
    if node.op != "get_attr":
        return node
    copy = graph.get_attr(str(node.target))
    copy.meta.update(node.meta)
    return copy


def outlier_terms(site: SitePlan) -> list[fx.Node]:
    """The nodes of the channels and columns of a site that no adapter takes; or nothing."""
    found = site.match
    nodes = [param.node for param in found.alone or ()]
    return [found.scope.outer(node) for node in nodes if node is not None]


def _add_outliers(plan: Plan, site: SitePlan, output: fx.Node, x: fx.Node) -> fx.Node:
    """The cast error of x in some channels is added behind the op."""
    terms = outlier_terms(site)
    if not terms:
        return output
    found = site.match
    scope, graph, anchor = found.scope, found.scope.gm.graph, found.anchor
    value = value_of(anchor)
    here = [_bring(scope, node) for node in terms]
    with graph.inserting_before(anchor):
        given = [_at_hand(graph, node) for node in here]
        added = (x, *given, value.dtype, str(plan.spec))
        error = graph.call_function(outliers.OP, added)
        total = graph.call_function(operator.add, (output, error))
    for node in (error, total):
        _describe(node, anchor, value)
    return total


def _add_lora_bias(site: SitePlan, output: fx.Node) -> fx.Node:
    """Biases of lora_B are outside W': they are added as the original does."""
    found = site.match
    biased = [a for a in found.adapters if a.lora_bias is not None]
    if not biased:
        return output
    graph, anchor = found.scope.gm.graph, found.anchor
    value, total, wide = value_of(anchor), output, value_of(anchor).dtype
    with graph.inserting_before(anchor):
        for adapter in biased:
            assert adapter.lora_bias is not None
            bias = adapter.lora_bias.value
            term = _node(found.scope, adapter.lora_bias)
            if adapter.bias_scaling != 1.0:
                term = graph.call_function(operator.mul, (term, adapter.bias_scaling))
                _describe(term, anchor, bias)
            total = graph.call_function(operator.add, (total, term))
            wide = torch.promote_types(wide, bias.dtype)
            _describe(total, anchor, value.to(wide))
        result = graph.call_method("to", (total, value.dtype))
    _describe(result, anchor, value)
    return result


def _describe(node: fx.Node, anchor: fx.Node, value: object) -> None:
    """A node that is ``value`` comes from the same place in the model as the anchor."""
    node.meta.update({k: v for k, v in anchor.meta.items() if k in _KEPT})
    node.meta["example_value" if "example_value" in anchor.meta else "val"] = value


_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack")


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
