from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from falqon_fx import FalqonConfig
from falqon_fx.passes.insert_updates import insert_updates
from falqon_fx.passes.match import match
from falqon_fx.passes.normalize import normalize
from falqon_fx.passes.plan import Plan, plan
from falqon_fx.passes.rewrite import rewrite
from falqon_fx.passes.verify import operations, verify
from tests.sites import randn
from tests.spellings import HandWritten, Spelling

FUSED = torch.ops.falqon.merged_linear.default
UPDATE = torch.ops.falqon.proxy_update_.default


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = HandWritten(Spelling())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.relu()).sigmoid()


def rewritten() -> tuple[Plan, tuple[fx.Node, ...]]:
    """What the passes before `verify` make of a graph with one site."""
    gm = fx.symbolic_trace(Model())
    root = normalize(gm, [randn(5, 24)])
    before = operations(root)
    matches, rejected = match(root)
    chosen = plan(root, matches, rejected, FalqonConfig(topk=1))
    insert_updates(chosen, rewrite(chosen))
    return chosen, before


def node_of(chosen: Plan, target: Any) -> fx.Node:
    return next(n for n in chosen.root.gm.graph.nodes if n.target == target)


def test_a_rewritten_graph_passes():
    verify(*rewritten())


def test_a_lost_operation_outside_the_sites_is_seen():
    chosen, before = rewritten()
    sigmoid = node_of(chosen, "sigmoid")
    sigmoid.replace_all_uses_with(sigmoid.args[0])
    chosen.root.gm.graph.erase_node(sigmoid)
    with pytest.raises(AssertionError, match=r"outside the sites disappeared: \['sigmoid'\]"):
        verify(chosen, before)


def test_an_operation_that_no_pass_adds_is_seen():
    chosen, before = rewritten()
    graph = chosen.root.gm.graph
    with graph.inserting_after(node_of(chosen, "sigmoid")):
        graph.call_function(torch.sin, (node_of(chosen, "sigmoid"),))
    with pytest.raises(AssertionError, match=r"operations that no pass adds: \['sin"):
        verify(chosen, before)


def test_a_missing_site_is_seen():
    chosen, before = rewritten()
    item = node_of(chosen, operator.getitem)
    item.replace_all_uses_with(node_of(chosen, "relu"))
    chosen.root.gm.graph.erase_node(item)
    chosen.root.gm.graph.erase_node(node_of(chosen, FUSED))
    with pytest.raises(AssertionError, match="0 fused ops for 1 groups"):
        verify(chosen, before)


def test_lost_metadata_is_seen():
    chosen, before = rewritten()
    node_of(chosen, operator.getitem).meta.clear()
    with pytest.raises(AssertionError, match="has lost its metadata"):
        verify(chosen, before)


@pytest.mark.parametrize("damage", ["removed", "doubled", "late"])
def test_an_update_that_does_not_come_first_and_once_is_seen(damage):
    chosen, before = rewritten()
    graph, update = chosen.root.gm.graph, node_of(chosen, UPDATE)
    if damage == "late":
        node_of(chosen, "sigmoid").append(update)
    elif damage == "doubled":
        with graph.inserting_after(update):
            graph.call_function(UPDATE, update.args)
    else:
        graph.erase_node(update)
    said = {"removed": "0 updates", "doubled": "2 updates", "late": "not the graph's first"}[damage]
    with pytest.raises(AssertionError, match=said):
        verify(chosen, before)


def test_a_node_used_before_it_is_made_is_seen():
    chosen, before = rewritten()
    node_of(chosen, "relu").prepend(node_of(chosen, FUSED))
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        verify(chosen, before)
