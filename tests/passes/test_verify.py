"""Every kind of fault that a pass could leave in a graph, made on purpose, from each frontend."""

from __future__ import annotations

import operator
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from tests.passes.rewritten import (
    A_SCALE,
    BIAS,
    DTYPE,
    FUSED,
    KEEP_X,
    LORA_A,
    LORA_B,
    OWN_X,
    OWNER,
    SCALE,
    SCALING,
    SPEC,
    WEIGHT,
    A,
    B,
    Rewritten,
    change,
    seen,
)


def test_a_rewritten_graph_passes(done):
    done.verify()
    assert [len(group) for group in done.plan.groups] == [3, 1]
    assert (len(done.operands.bases), len(done.operands.adapters)) == (4, 3)


OPTIMIZED = """
import torch
from torch import fx, nn
from falqon_fx import FalqonConfig
from falqon_fx.passes.insert_operands import insert_operands
from falqon_fx.passes.match.pair import match
from falqon_fx.passes.normalize import normalize
from falqon_fx.passes.plan import plan
from falqon_fx.passes.rewrite import rewrite
from falqon_fx.passes.verify import verify, wiring

assert False, "Python does not leave out assertions"
x = torch.randn(4, 64)
gm = fx.symbolic_trace(nn.Sequential(nn.Linear(64, 64).requires_grad_(False), nn.Sigmoid()))
root = normalize(gm, [x])
before = wiring(root)
chosen = plan(root, *match(root, keep_dropout=True), FalqonConfig())
operands = insert_operands(chosen)
rewrite(chosen, operands)
verify(chosen, operands, before)
(sigmoid,) = (n for n in gm.graph.nodes if n.op == "call_module" and n.target == "1")
sigmoid.replace_all_uses_with(sigmoid.args[0])
gm.graph.erase_node(sigmoid)
try:
    verify(chosen, operands, before)
except PassError as error:
    print(error)
"""


@pytest.mark.slow
def test_faults_are_seen_where_assertions_are_left_out():
    done = subprocess.run(
        [sys.executable, "-O", "-W", "ignore", "-c", OPTIMIZED], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "outside the sites disappeared" in done.stdout
    assert "This is a bug of falqon-fx: report it" in done.stdout


# -- a site half rewritten -------------------------------------------------------------------------


def old_node(done: Rewritten) -> fx.Node:
    """A node of the last site, back in the graph where it was."""
    site = done.plan.groups[-1][0]
    node = next(n for n in site.match.nodes if n.op.startswith("call") and n.args)
    target, _, kwargs = done.before[node]
    with done.graph.inserting_before(done.sigmoid()):
        back = done.graph.create_node(node.op, target, (done.sigmoid().args[0],), dict(kwargs))
    done.before = {back if n is node else n: wires for n, wires in done.before.items()}
    object.__setattr__(site.match, "nodes", (site.match.nodes - {node}) | {back})
    return back


def test_a_node_of_a_site_that_is_still_there_is_seen(done):
    back = old_node(done)
    with seen(rf"^o: .*half rewritten, \['{back.name}'\]"):
        done.verify()


def skip_site(done: Rewritten) -> None:
    """The site's result is not read: its users read its input."""
    result = done.sigmoid().args[0]
    result.replace_all_uses_with(done.fused().args[0])


def swap_siblings(done: Rewritten) -> None:
    first = done.siblings()
    for item in list(first.users):
        item.args = (first, (item.args[1] + 1) % 3)


def wrong_input(done: Rewritten) -> None:
    first = done.siblings()
    relu = first.args[0]
    first.args = (relu.args[0], *first.args[1:])


def reversed_column(column: int) -> Callable[[Rewritten], None]:
    """What belongs to one sibling is in the place of what belongs to another."""

    def damage(done: Rewritten) -> None:
        first = done.siblings()
        change(first, column, first.args[column][::-1])

    return damage


def shorter(column: int) -> Callable[[Rewritten], None]:
    def damage(done: Rewritten) -> None:
        first = done.siblings()
        change(first, column, first.args[column][1:])

    return damage


def of_fused(column: int, value: Any) -> Callable[[Rewritten], None]:
    def damage(done: Rewritten) -> None:
        change(done.fused(), column, value)

    return damage


def no_adapter(done: Rewritten) -> None:
    """O would be the base layer's alone."""
    first = done.siblings()
    for column in (A, A_SCALE, B, LORA_A, LORA_B, OWNER, SCALING):
        change(first, column, [])


def lost_bias_of_b(done: Rewritten) -> None:
    cast = done.find("to")
    total = cast.args[0]
    total.replace_all_uses_with(total.args[0])
    done.graph.erase_node(total)


def wrong_bias(done: Rewritten) -> None:
    """B in the place of the bias."""
    change(done.fused(), BIAS, done.fused().args[LORA_B])


def own_x(done: Rewritten) -> None:
    """The adapters read what the base layers don't, as behind a dropout."""
    first = done.siblings()
    change(first, OWN_X, [first.args[0].args[0]] * 2)


HALF = {
    "its result is not read": (skip_site, "result is"),
    "siblings swapped": (swap_siblings, "its result comes from merged_linear"),
    "another input": (wrong_input, "not its input"),
    "another base": (
        reversed_column(WEIGHT),
        "falqon_base_2_weight is not its falqon_base_0_weight",
    ),
    "another scale": (reversed_column(SCALE), "falqon_base_2_scale is not its falqon_base_0_scale"),
    "another cast of A": (reversed_column(A), "is not its"),
    "another scale of A": (reversed_column(A_SCALE), "is not its"),
    "another s·B": (reversed_column(B), "is not its"),
    "another A": (reversed_column(LORA_A), "is not its"),
    "another B": (reversed_column(LORA_B), "is not its"),
    "one base too few": (shorter(WEIGHT), "2 operands for 3"),
    "one adapter too few": (shorter(A), "1 operands for 2"),
    "no adapter": (no_adapter, "0 operands for 2"),
    "an adapter at another site": (reversed_column(OWNER), "computes with"),
    "another scaling": (reversed_column(SCALING), "computes with"),
    "an input of the adapter's own": (own_x, "its adapters read"),
    "x is not kept": (of_fused(KEEP_X, False), "computes with"),
    "another dtype": (of_fused(DTYPE, torch.bfloat16), "computes with"),
    "another spec": (of_fused(SPEC, "row amax e5m2 bfloat16 auto fast auto #0"), "computes with"),
    "another bias": (wrong_bias, "o: .* is not .*bias"),
    "no bias": (of_fused(BIAS, []), r"^o: .*: \[\] as bias"),
    "no bias of B": (lost_bias_of_b, "0 new operations .*add"),
}


@pytest.mark.parametrize(("damage", "said"), HALF.values(), ids=HALF)
def test_a_site_half_rewritten_is_seen(done, damage, said):
    damage(done)
    with seen(said):
        done.verify()


# -- what lies outside of the sites ----------------------------------------------------------------


def lose(done: Rewritten) -> None:
    sigmoid = done.sigmoid()
    sigmoid.replace_all_uses_with(sigmoid.args[0])
    done.graph.erase_node(sigmoid)


def add(target: Any) -> Callable[[Rewritten], None]:
    def damage(done: Rewritten) -> None:
        sigmoid = done.sigmoid()
        with done.graph.inserting_after(sigmoid):
            done.graph.call_function(target, (sigmoid, sigmoid))

    return damage


def rewire(done: Rewritten) -> None:
    done.sigmoid().args = (done.siblings().args[0],)


def retarget(done: Rewritten) -> None:
    sigmoid = done.sigmoid()
    sigmoid.target = "tanh" if sigmoid.op == "call_method" else torch.tanh


def second_fused(done: Rewritten) -> None:
    with done.graph.inserting_after(done.fused()):
        done.graph.call_function(FUSED, done.fused().args)


OUTSIDE = {
    "an operation lost": (lose, r"outside the sites disappeared: \['sigmoid"),
    "one that no pass adds": (add(torch.sub), "1 new operations .*sub.*, 0 are to be added"),
    "one more of those that a pass adds": (add(operator.add), "2 new operations .*add.*, 1 are"),
    "another input": (rewire, "result is"),
    "another operation": (retarget, "^sigmoid.*: .*changed outside the sites"),
    "one op too many": (second_fused, "3 new operations falqon.merged_linear.*, 2 are"),
}


@pytest.mark.parametrize(("damage", "said"), OUTSIDE.values(), ids=OUTSIDE)
def test_a_change_outside_the_sites_is_seen(done, damage, said):
    damage(done)
    with seen(said):
        done.verify()


def test_a_node_used_before_it_is_made_is_seen(done):
    done.fused().args[0].prepend(done.fused())
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        done.verify()


# -- metadata --------------------------------------------------------------------------------------


NEW = {
    "op": lambda done: done.fused(),
    "result": lambda done: done.find(operator.getitem),
    "casts": lambda done: done.casts(),
    "a cast": lambda done: min(done.casts().users),
    "sum with a bias of B": lambda done: done.find("to").args[0],
    "base": lambda done: done.find("falqon_base_1_scale"),
}


@pytest.mark.parametrize("node", NEW.values(), ids=NEW)
def test_a_new_node_without_a_value_is_seen(done, node):
    found = node(done)
    found.meta.clear()
    with seen(f"^{found.name}: .*no metadata of its value"):
        done.verify()


def test_a_value_of_another_dtype_is_seen(done):
    result = done.sigmoid().args[0]
    key = "example_value" if "example_value" in result.meta else "val"
    result.meta[key] = result.meta[key].to(torch.bfloat16)
    with seen("has not the value of"):
        done.verify()


def test_a_lost_stack_trace_is_seen(done):
    traces = [n for n in done.graph.nodes if "nn_module_stack" in n.meta and n not in done.before]
    assert traces
    for node in traces:
        del node.meta["nn_module_stack"]
    with seen(r"has lost \['nn_module_stack'\]"):
        done.verify()
