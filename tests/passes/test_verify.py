"""Every kind of fault that a pass could leave in a graph, made on purpose, from each frontend."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from falqon_fx import FalqonConfig, RewriteResult, prepare, rewrite
from falqon_fx.passes.insert_updates import insert_updates
from falqon_fx.passes.match import match
from falqon_fx.passes.normalize import Scope, normalize
from falqon_fx.passes.plan import Plan, plan
from falqon_fx.passes.rewrite import SlotNodes
from falqon_fx.passes.rewrite import rewrite as rewrite_sites
from falqon_fx.passes.verify import Wiring, verify, wiring
from tests.models import fill_b
from tests.sites import randn
from tests.spellings import HandWritten, Passes, Spelling, targets

FUSED = torch.ops.falqon.merged_linear.default
UPDATE = torch.ops.falqon.proxy_update_.default


class Model(nn.Module):
    """Two siblings, one with a bias of B, and behind them a site that reads their product."""

    def __init__(self) -> None:
        super().__init__()
        self.q = HandWritten(Spelling(out=24, base="functional", adapter="functional"))
        self.k = HandWritten(Spelling(out=24, lora_bias=True), seed=10)
        self.o = HandWritten(Spelling(out=20, bias=True), seed=20)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.o(self.q(x) * self.k(x)).sigmoid()


def traced(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def exported(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(model, (x,)).module()


def captured(model: nn.Module, x: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x)
    return graphs[0]


FRONTENDS = {"symbolic_trace": traced, "export": exported, "Dynamo": captured}


@dataclass
class Rewritten:
    """What the passes before `verify` make of a graph."""

    plan: Plan
    slots: tuple[SlotNodes, ...]
    before: Wiring

    @property
    def graph(self) -> fx.Graph:
        return self.plan.root.gm.graph

    def find(self, *names: object) -> fx.Node:
        """The last node in the root graph with one of these targets."""
        return [n for n in self.graph.nodes if n.target in names][-1]

    def sigmoid(self) -> fx.Node:
        return self.find("sigmoid", torch.ops.aten.sigmoid.default)

    def fused(self) -> fx.Node:
        return self.find(FUSED)

    def update(self) -> fx.Node:
        return self.find(UPDATE)

    def verify(self) -> None:
        verify(self.plan, self.slots, self.before)


def values(gm: fx.GraphModule, x: Tensor) -> list[Any]:
    """The flat inputs of a graph: Dynamo's takes the parameters too."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return [node.meta.get("example_value", x) for node in nodes]


def passes(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Rewritten:
    root: Scope = normalize(gm, inputs)
    before = wiring(root)
    matches, rejected = match(root)
    chosen = plan(root, matches, rejected, FalqonConfig(topk=1, **options))
    slots = rewrite_sites(chosen)
    insert_updates(chosen, slots)
    return Rewritten(chosen, slots, before)


@pytest.fixture(params=FRONTENDS)
def done(request) -> Rewritten:
    x = randn(5, 24)
    gm = FRONTENDS[request.param](Model(), x)
    return passes(gm, values(gm, x))


def test_a_rewritten_graph_passes(done):
    done.verify()
    assert (len(done.plan.groups), len(done.plan.sites), len(done.slots)) == (2, 3, 3)


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
    with pytest.raises(AssertionError, match=rf"o is half rewritten: \['{back.name}'\]"):
        done.verify()


def skip_site(done: Rewritten) -> None:
    """The site's result is not read: its users read its input."""
    result = done.sigmoid().args[0]
    result.replace_all_uses_with(done.fused().args[0])


def swap_siblings(done: Rewritten) -> None:
    first = done.graph.find_nodes(op="call_function", target=FUSED)[0]
    for item in list(first.users):
        item.args = (first, 1 - item.args[1])


def wrong_input(done: Rewritten) -> None:
    first = done.graph.find_nodes(op="call_function", target=FUSED)[0]
    relu = first.args[0]
    first.args = (relu.args[0], *first.args[1:])


def wrong_state(column: int) -> Callable[[Rewritten], None]:
    """One of the siblings' two states in the place of the other."""

    def damage(done: Rewritten) -> None:
        first = done.graph.find_nodes(op="call_function", target=FUSED)[0]
        args = list(first.args)
        args[column] = args[column][::-1]
        first.args = tuple(args)

    return damage


def wrong_scaling(done: Rewritten) -> None:
    fused = done.fused()
    fused.args = (*fused.args[:6], [1.0], *fused.args[7:])


def wrong_dtype(done: Rewritten) -> None:
    fused = done.fused()
    fused.args = (*fused.args[:7], torch.bfloat16, fused.args[8])


def lost_bias_of_b(done: Rewritten) -> None:
    cast = done.find("to")
    total = cast.args[0]
    total.replace_all_uses_with(total.args[0])
    done.graph.erase_node(total)


def wrong_bias(done: Rewritten) -> None:
    """B in the place of the bias."""
    fused = done.fused()
    fused.args = (*fused.args[:5], fused.args[4], *fused.args[6:])


def lost_bias(done: Rewritten) -> None:
    fused = done.fused()
    fused.args = (*fused.args[:5], [], *fused.args[6:])


HALF = {
    "its result is not read": (skip_site, "result is"),
    "siblings swapped": (swap_siblings, "its result comes from merged_linear"),
    "another input": (wrong_input, "not its input"),
    "another W'": (wrong_state(1), "is not its falqon_0_code"),
    "another scale": (wrong_state(2), "is not its falqon_0_scale"),
    "another applied": (wrong_state(3), "is not its falqon_0_applied"),
    "another B": (wrong_state(4), "is not its"),
    "another scaling": (wrong_scaling, "computes with"),
    "another dtype": (wrong_dtype, "computes with"),
    "another bias": (wrong_bias, "o: .* is not .*bias"),
    "no bias": (lost_bias, r"o: \[\] as bias"),
    "no bias of B": (lost_bias_of_b, "0 new operations .*add"),
}


@pytest.mark.parametrize(("damage", "said"), HALF.values(), ids=HALF)
def test_a_site_half_rewritten_is_seen(done, damage, said):
    damage(done)
    with pytest.raises(AssertionError, match=said):
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
    done.sigmoid().args = (done.graph.find_nodes(op="call_function", target=FUSED)[0].args[0],)


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
    "another operation": (retarget, "sigmoid.* outside the sites, was changed"),
    "one op too many": (second_fused, "3 new operations falqon.merged_linear.*, 2 are"),
}


@pytest.mark.parametrize(("damage", "said"), OUTSIDE.values(), ids=OUTSIDE)
def test_a_change_outside_the_sites_is_seen(done, damage, said):
    damage(done)
    with pytest.raises(AssertionError, match=said):
        done.verify()


def test_a_node_used_before_it_is_made_is_seen(done):
    done.fused().args[0].prepend(done.fused())
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        done.verify()


# -- the update ------------------------------------------------------------------------------------


def no_update(done: Rewritten) -> None:
    done.graph.erase_node(done.update())


def two_updates(done: Rewritten) -> None:
    with done.graph.inserting_after(done.update()):
        done.graph.call_function(UPDATE, done.update().args).meta["val"] = None


def late_update(done: Rewritten) -> None:
    done.sigmoid().append(done.update())


def update_of_another(column: int) -> Callable[[Rewritten], None]:
    def damage(done: Rewritten) -> None:
        args = list(done.update().args)
        args[column] = args[column][::-1]
        done.update().args = tuple(args)

    return damage


def other_scaling(done: Rewritten) -> None:
    args = done.update().args
    done.update().args = (*args[:8], [1.0, 2.0, 2.0], args[9])


UPDATES = {
    "none": (no_update, "0 new operations falqon.proxy_update_"),
    "two": (two_updates, "2 new operations falqon.proxy_update_"),
    "late": (late_update, "stands before the update"),
    "another W'": (update_of_another(0), "the update has falqon_2_code, not falqon_0_code"),
    "other writes": (update_of_another(4), "the update has falqon_2_writes"),
    "another B": (update_of_another(5), "the update has"),
    "another A": (update_of_another(6), "the update has"),
    "another scaling": (other_scaling, "the update computes with"),
    "another W": (update_of_another(7), "as its base"),
}


@pytest.mark.parametrize(("damage", "said"), UPDATES.values(), ids=UPDATES)
def test_a_wrong_update_is_seen(done, damage, said):
    damage(done)
    with pytest.raises(AssertionError, match=said):
        done.verify()


# -- metadata --------------------------------------------------------------------------------------

NEW = {
    "op": lambda done: done.fused(),
    "result": lambda done: done.find(operator.getitem),
    "update": lambda done: done.update(),
    "sum with a bias of B": lambda done: done.find("to").args[0],
    "state": lambda done: done.find("falqon_1_scale"),
}


@pytest.mark.parametrize("node", NEW.values(), ids=NEW)
def test_a_new_node_without_a_value_is_seen(done, node):
    found = node(done)
    found.meta.clear()
    with pytest.raises(AssertionError, match=f"{found.name} has no metadata of its value"):
        done.verify()


def test_a_value_of_another_dtype_is_seen(done):
    result = done.sigmoid().args[0]
    key = "example_value" if "example_value" in result.meta else "val"
    result.meta[key] = result.meta[key].to(torch.bfloat16)
    with pytest.raises(AssertionError, match="has not the value of"):
        done.verify()


def test_a_lost_stack_trace_is_seen(done):
    traces = [n for n in done.graph.nodes if "nn_module_stack" in n.meta and n not in done.before]
    assert traces
    for node in traces:
        del node.meta["nn_module_stack"]
    with pytest.raises(AssertionError, match=r"has lost \['nn_module_stack'\]"):
        done.verify()


# -- a weight that is released ---------------------------------------------------------------------


@pytest.fixture
def prepared() -> Rewritten:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(24, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x).sigmoid()

    model = peft.get_peft_model(One(), peft.LoraConfig(target_modules="proj", r=4))
    fill_b(model, 0.1)
    prepare(model, FalqonConfig(topk=1), progress=False)
    gm = captured(model, randn(5, 24))
    return passes(gm, values(gm, randn(5, 24)))


def base_layer_again(done: Rewritten) -> None:
    """The eager op of the base layer, on bytes that no longer hold what it takes them for."""
    state = [node for (node,) in done.update().args[:5]]
    spec = done.fused().args[-1]
    with done.graph.inserting_after(done.fused()):
        base = torch.ops.falqon.base_linear.default
        done.graph.call_function(base, (done.fused().args[0], *state, None, 2.0, spec))


def update_from_released(done: Rewritten) -> None:
    args = list(done.update().args)
    args[7] = args[6]
    done.update().args = tuple(args)


RELEASED = {
    "the base layer runs": (base_layer_again, "1 new operations falqon.base_linear.*, 0 are"),
    "the update reads it": (update_from_released, "a weight that is released"),
}


@pytest.mark.parametrize(("damage", "said"), RELEASED.values(), ids=RELEASED)
def test_a_use_of_a_released_weight_is_seen(prepared, damage, said):
    prepared.verify()
    damage(prepared)
    with pytest.raises(AssertionError, match=said):
        prepared.verify()


# -- bodies of checkpoints -------------------------------------------------------------------------


@pytest.fixture
def checkpointed() -> Rewritten:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=False)

    x = randn(5, 24).requires_grad_()
    gm = captured(Checkpointed(), x)
    return passes(gm, values(gm, x))


def test_a_lost_operand_of_a_checkpoint_is_seen(checkpointed):
    checkpointed.verify()
    (body,) = checkpointed.plan.root.children
    body.call.args = body.call.args[:-1]
    with pytest.raises(AssertionError, match=r"gives \d+ operands to \d+ inputs"):
        checkpointed.verify()


def test_swapped_operands_of_a_checkpoint_are_seen(checkpointed):
    (body,) = checkpointed.plan.root.children
    *rest, last, end = body.call.args
    body.call.args = (*rest, end, last)
    with pytest.raises(AssertionError, match="is not the operand it stands for"):
        checkpointed.verify()


def test_an_operation_lost_in_the_body_of_a_checkpoint_is_seen(checkpointed):
    (body,) = checkpointed.plan.root.children
    sigmoid = next(n for n in body.gm.graph.nodes if n.target == "sigmoid")
    sigmoid.replace_all_uses_with(sigmoid.args[0])
    body.gm.graph.erase_node(sigmoid)
    with pytest.raises(AssertionError, match=r"outside the sites disappeared: \['sigmoid"):
        checkpointed.verify()


# -- all frontends alike ---------------------------------------------------------------------------


@pytest.mark.parametrize("pending", ["hold", "apply", "drop"])
def test_every_frontend_is_rewritten_alike(pending):
    """The same sites in the same groups, the same ops for them, the same numbers."""
    found = [numbers(name, pending) for name in FRONTENDS]
    for sites, added, tensors in found:
        assert (sites, added) == found[0][:2]
        assert all(torch.equal(a, b) for a, b in zip(tensors, found[0][2], strict=True))


def numbers(frontend: str, pending: str) -> tuple[list[Any], dict[str, int], list[Tensor]]:
    """The sites, the ops that stand for them, and y, dL/dx and dL/dB, also after a step of B."""
    model, x = Model(), randn(5, 24).requires_grad_()
    backend = Passes(pending=pending)
    if frontend == "Dynamo":
        torch._dynamo.reset()
        call = torch.compile(model, backend=backend, fullgraph=True)
        call(x)
        (result,) = backend.results
    else:
        call = result = rewrite(FRONTENDS[frontend](model, x), [x], backend.config)
    tensors = []
    for _ in range(2):
        y = call(x)
        y.sum().backward()
        b = [layer.lora_b.weight for layer in (model.q, model.k, model.o)]
        tensors += [y.detach(), x.grad, *(weight.grad for weight in b)]
        model.zero_grad()
        x.grad = None
        with torch.no_grad():
            for i, weight in enumerate(b):
                weight.add_(randn(*weight.shape, seed=i) / 64)
    sites = [(s.path.split(".")[-1], s.group, s.scaling, s.rank) for s in result.report.sites]
    ops = ("merged_linear.default", "proxy_update_.default", "zero_", "linear", "linear.default")
    return sites, {name: targets(result.gm)[name] for name in ops}, tensors


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("pending", ["hold", "drop"])
def test_rewriting_twice_changes_nothing(frontend, pending):
    model, x = Model(), randn(5, 24)
    first = rewritten_by(frontend, model, x, FalqonConfig(topk=1, init="keep", pending=pending))
    inputs = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders(first.gm)]
    states = first.fake_inputs(inputs[: len(inputs) - 5 * len(first.slots)])
    second = rewrite(first.gm, states, first.config)
    assert len(first.report.sites) == 3
    assert not second.report.sites
    assert not second.report.rejected
    assert not second.slots
    assert str(second.gm.graph) == str(first.gm.graph)


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def rewritten_by(frontend: str, model: nn.Module, x: Tensor, config: FalqonConfig) -> RewriteResult:
    gm = FRONTENDS[frontend](model, x)
    return rewrite(gm, values(gm, x), config)
