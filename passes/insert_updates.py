"""Pass 6: one ``falqon::proxy_update_`` at the head of the graph, for all its sites.

It compares fingerprints of B with the stored ones on the device, so it writes at most once per
optimizer step, however often the graph runs in between.
"""

from __future__ import annotations

import torch
from torch import fx

from falqon_fx.passes.normalize import value_of
from falqon_fx.passes.plan import Plan
from falqon_fx.passes.rewrite import SlotNodes


def insert_updates(plan: Plan, slots: tuple[SlotNodes, ...]) -> None:
    """Edit the root graph in place."""
    if not slots:
        return
    graph = plan.root.gm.graph
    with plan.root.after_inputs():
        anchor = graph.call_function(torch.ops.falqon.proxy_update_.default)
    with graph.inserting_before(anchor):
        base = [_base(graph, s) for s in slots]
        lora_a = [_at_head(graph, s.lora_a) for s in slots]
        lora_b = [_at_head(graph, s.lora_b) for s in slots]
    columns = [[s.state[i] for s in slots] for i in range(5)]
    scaling = [s.slot.scaling for s in slots]
    anchor.meta["val"] = None  # it returns nothing
    anchor.args = (*columns, lora_b, lora_a, base, scaling, str(plan.spec))
    if plan.spec.pending == "drop":
        with graph.inserting_after(anchor):
            for node in lora_b:
                _zero(graph, node)
    plan.root.gm.recompile()


def _base(graph: fx.Graph, nodes: SlotNodes) -> fx.Node | None:
    """The base weight as [out, in], or None where a prepared module holds it in FP8 alone."""
    if nodes.base is None or nodes.slot.base is None:
        return None
    node = _at_head(graph, nodes.base)
    if not nodes.slot.base.transposed:
        return node
    flipped = graph.call_method("t", (node,))
    flipped.meta["val"] = nodes.slot.base.value.t()
    return flipped


def _at_head(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A parameter read where the update reads it: a get_attr may stand further down."""
    if node.op != "get_attr":
        return node
    copy = graph.get_attr(str(node.target))
    copy.meta.update(node.meta)
    return copy


def _zero(graph: fx.Graph, lora_b: fx.Node) -> None:
    """B := 0 outside autograd, as the public code does after each of its writes."""
    detached = graph.call_method("detach", (lora_b,))
    with graph.inserting_after(detached):
        zero = graph.call_method("zero_", (detached,))
    detached.meta["val"] = zero.meta["val"] = value_of(lora_b).detach()
