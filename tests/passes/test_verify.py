"""Every kind of fault that a pass could leave in a graph, made on purpose, from each frontend."""

from __future__ import annotations

import operator
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from falqon_fx import FalqonConfig, RewriteResult, prepare, rewrite
from falqon_fx.errors import PassError
from falqon_fx.passes.insert_operands import Operands
from falqon_fx.passes.pipeline import PASSES
from falqon_fx.passes.plan import Plan
from falqon_fx.passes.verify import Wiring, verify
from falqon_fx.passes.work import Work
from tests.models import fill_b
from tests.sites import randn
from tests.spellings import HandWritten, Passes, Spelling, targets

FUSED = torch.ops.falqon.merged_linear.default
CASTS = torch.ops.falqon.proxy_update.default
WRITES = torch.ops.falqon.proxy_update_.default
# Where merged_linear takes what.
WEIGHT, SCALE, BIAS, A, A_SCALE, B, ALPHA, LORA_A, LORA_B = range(1, 10)
OWN_X, OWNER, SCALING, KEEP_X, DTYPE, SPEC = range(10, 16)


class Model(nn.Module):
    """Two adapted siblings, one with a bias of B, and a frozen one; behind them a site with a bias
    that reads their product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q = HandWritten(Spelling(out=64, features=64, base="functional", adapter="functional"))
        self.k = HandWritten(Spelling(out=64, features=64, lora_bias=True, scaling=0.5), seed=10)
        self.v = nn.Linear(64, 64, bias=False).requires_grad_(False)
        self.o = HandWritten(Spelling(out=20, features=64, bias=True), seed=20)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.o(self.q(x) * self.k(x) + self.v(x)).sigmoid()


def frozen_a(model: nn.Module) -> nn.Module:
    """As update="rows" asks for it."""
    for name, parameter in model.named_parameters():
        if "lora_a" in name.lower():
            parameter.requires_grad_(False)
    return model


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
    operands: Operands
    before: Wiring

    @property
    def graph(self) -> fx.Graph:
        return self.plan.root.gm.graph

    def find(self, *names: object) -> fx.Node:
        """The last node in the root graph with one of these targets."""
        return [n for n in self.graph.nodes if n.target in names][-1]

    def sigmoid(self) -> fx.Node:
        return self.find("sigmoid", torch.ops.aten.sigmoid.default)

    def siblings(self) -> fx.Node:
        """The op of q, k and v."""
        return self.graph.find_nodes(op="call_function", target=FUSED)[0]

    def fused(self) -> fx.Node:
        """The op of o."""
        return self.find(FUSED)

    def casts(self) -> fx.Node:
        return self.find(CASTS)

    def writes(self) -> fx.Node:
        return self.find(WRITES)

    def verify(self) -> None:
        verify(self.plan, self.operands, self.before)


def values(gm: fx.GraphModule, x: Tensor) -> list[Any]:
    """The flat inputs of a graph: Dynamo's takes the parameters too."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return [node.meta.get("example_value", x) for node in nodes]


def passes(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Rewritten:
    work = Work(gm, inputs, FalqonConfig(**options))
    for step in takewhile(lambda step: step is not PASSES["verify"], PASSES.values()):
        step(work)
    return Rewritten(work.plan, work.operands, work.before)


@pytest.fixture(params=FRONTENDS)
def done(request) -> Rewritten:
    x = randn(5, 64)
    gm = FRONTENDS[request.param](Model(), x)
    return passes(gm, values(gm, x))


def test_a_rewritten_graph_passes(done):
    done.verify()
    assert [len(group) for group in done.plan.groups] == [3, 1]
    assert (len(done.operands.bases), len(done.operands.adapters)) == (4, 3)


OPTIMIZED = """
import torch
from torch import fx, nn
from falqon_fx import FalqonConfig
from falqon_fx.errors import PassError
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
    with pytest.raises(PassError, match=rf"^o: .*half rewritten, \['{back.name}'\]"):
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


def change(node: fx.Node, place: int, value: Any) -> None:
    node.args = (*node.args[:place], value, *node.args[place + 1 :])


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
    with pytest.raises(PassError, match=said):
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
    with pytest.raises(PassError, match=said):
        done.verify()


def test_a_node_used_before_it_is_made_is_seen(done):
    done.fused().args[0].prepend(done.fused())
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        done.verify()


# -- the bases -------------------------------------------------------------------------------------


def another_weight(done: Rewritten) -> None:
    """The op reads the place that it should, but a call would fill it with another W."""
    first, second, *rest = done.operands.bases
    swapped = (replace(first, given=second.given), replace(second, given=first.given), *rest)
    done.operands = replace(done.operands, bases=swapped)


def an_adapter_as_weight(done: Rewritten) -> None:
    first, *rest = done.operands.bases
    (adapter, *_) = done.operands.adapters.values()
    changed = replace(first, given=(adapter.lora_b,))
    done.operands = replace(done.operands, bases=(changed, *rest))


def swapped_inputs(done: Rewritten) -> None:
    """A call gives W where its scale is expected."""
    weight = done.find("falqon_base_0_weight")
    done.find("falqon_base_0_scale").append(weight)


def an_input_of_nobody(done: Rewritten) -> None:
    node = done.plan.root.add_input("more")
    node.meta["val"] = None


def another_size(done: Rewritten) -> None:
    slot = done.plan.groups[1][0].base
    object.__setattr__(slot, "out", 24)


BASES = {
    "made of another W": (another_weight, "its base is made of"),
    "made of an adapter": (an_adapter_as_weight, "its base is made of"),
    "given in another order": (swapped_inputs, "the inputs are"),
    "an input that no call gives": (an_input_of_nobody, "the inputs are"),
    "of another size": (another_size, r"^o.*: its base is \(24, 64\)"),
}


@pytest.mark.parametrize(("damage", "said"), BASES.values(), ids=BASES)
def test_a_wrong_base_is_seen(done, damage, said):
    damage(done)
    with pytest.raises(PassError, match=said):
        done.verify()


# -- the adapters' casts ---------------------------------------------------------------------------


def no_casts(done: Rewritten) -> None:
    """What reads them reads the parameters, which have no FP8 form."""
    casts = done.casts()
    for item in list(casts.users):
        item.replace_all_uses_with(casts.args[0][0])
        done.graph.erase_node(item)
    done.graph.erase_node(casts)


def two_casts(done: Rewritten) -> None:
    casts = done.casts()
    with done.graph.inserting_after(casts):
        done.graph.call_function(CASTS, casts.args).meta.update(casts.meta)


def late_casts(done: Rewritten) -> None:
    """Behind an operation of the model: a write there would come first."""
    first = done.siblings()
    relu = first.args[0]
    users = sorted(done.casts().users)
    relu.append(done.casts())
    for item in reversed(users):
        done.casts().append(item)


def casts_of(column: int) -> Callable[[Rewritten], None]:
    def damage(done: Rewritten) -> None:
        casts = done.casts()
        change(casts, column, casts.args[column][::-1])

    return damage


def a_in_the_place_of_b(done: Rewritten) -> None:
    casts = done.casts()
    change(casts, 1, casts.args[0])


def narrow(done: Rewritten) -> None:
    change(done.casts(), 4, not done.casts().args[4])


def another_spec(done: Rewritten) -> None:
    change(done.casts(), 5, "row amax e5m2 bfloat16 auto fast auto #0")


def swapped_parts(done: Rewritten) -> None:
    """Â in the place of s·B."""
    casts = done.casts()
    for item in list(casts.users):
        item.args = (casts, {0: 2, 2: 0}.get(item.args[1] % 3, 1) + item.args[1] // 3 * 3)


def of_another_adapter(done: Rewritten) -> None:
    casts = done.casts()
    for item in list(casts.users):
        item.args = (casts, (item.args[1] + 3) % 9)


def casts_scaled_otherwise(done: Rewritten) -> None:
    change(done.casts(), 2, [1.0, 0.5, 2.0])


def another_node(done: Rewritten) -> None:
    """A result of the siblings' op in the place of the last adapter's Â."""
    (*_, nodes) = done.operands.adapters.values()
    done.siblings().append(nodes.a)
    nodes.a.args = (done.siblings(), 0)


CASTING = {
    "none": (no_casts, "4 new operations .*getitem.*, 13 are to be added"),
    "two": (two_casts, "2 new operations falqon.proxy_update.*, 1 are"),
    "late": (late_casts, "stands before the update"),
    "another A": (casts_of(0), "the cast reads"),
    "another B": (casts_of(1), "the cast reads"),
    "A as B": (a_in_the_place_of_b, "the cast reads"),
    "another scaling": (casts_scaled_otherwise, "cast with"),
    "another dtype": (narrow, "cast with"),
    "another spec": (another_spec, "cast with"),
    "Â as s·B": (swapped_parts, "is another part of the cast"),
    "another adapter's": (of_another_adapter, "the cast reads"),
    "no cast at all": (another_node, "is no cast of the adapter"),
}


@pytest.mark.parametrize(("damage", "said"), CASTING.values(), ids=CASTING)
def test_a_wrong_cast_of_an_adapter_is_seen(done, damage, said):
    damage(done)
    with pytest.raises(PassError, match=said):
        done.verify()


def test_a_cast_of_b_for_another_weight_is_seen():
    x = randn(5, 64)
    done = passes(traced(Model(), x), [x], adapter_dtype="fp8")
    done.verify()
    casts_of(3)(done)
    with pytest.raises(PassError, match="b is cast for falqon_base_"):
        done.verify()


# -- adapter dropout -------------------------------------------------------------------------------


@pytest.fixture(params=FRONTENDS)
def dropping(request) -> Rewritten:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = HandWritten(Spelling(out=64, features=64, dropout="module"))
            self.q.dropout.p = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x.relu()).sigmoid()

    x = randn(5, 64)
    gm = FRONTENDS[request.param](Dropping(), x)
    return passes(gm, values(gm, x))


def not_dropped(done: Rewritten) -> None:
    fused = done.fused()
    change(fused, OWN_X, [fused.args[0]])


def as_without_dropout(done: Rewritten) -> None:
    change(done.fused(), OWN_X, [])


def all_dropped(done: Rewritten) -> None:
    fused = done.fused()
    change(fused, 0, fused.args[OWN_X][0])


DROPPED = {
    "the adapter reads x": (not_dropped, "its adapters read"),
    "nothing of its own": (as_without_dropout, "its adapters read"),
    "the base layer reads the dropped x": (all_dropped, "not its input"),
}


@pytest.mark.parametrize(("damage", "said"), DROPPED.values(), ids=DROPPED)
def test_another_value_than_the_dropped_one_is_seen(dropping, damage, said):
    dropping.verify()
    damage(dropping)
    with pytest.raises(PassError, match=said):
        dropping.verify()


# -- update="rows" ---------------------------------------------------------------------------------


@pytest.fixture(params=FRONTENDS)
def written(request) -> Rewritten:
    x = randn(5, 64)
    gm = FRONTENDS[request.param](frozen_a(Model()), x)
    return passes(gm, values(gm, x), update="rows", topk=1)


def no_update(done: Rewritten) -> None:
    done.graph.erase_node(done.writes())


def two_updates(done: Rewritten) -> None:
    with done.graph.inserting_after(done.writes()):
        done.graph.call_function(WRITES, done.writes().args).meta["val"] = None


def late_update(done: Rewritten) -> None:
    done.sigmoid().append(done.writes())


def update_of_another(column: int) -> Callable[[Rewritten], None]:
    def damage(done: Rewritten) -> None:
        change(done.writes(), column, done.writes().args[column][::-1])

    return damage


def other_scaling(done: Rewritten) -> None:
    change(done.writes(), 8, [1.0, 2.0, 2.0])


def part_of(name: str, rows: slice) -> Callable[[Rewritten], None]:
    """Other rows of the first slot's state where ``name`` is read."""

    def damage(done: Rewritten) -> None:
        node = getattr(done.operands.written[id(done.operands.rows[0].slot)], name)
        node.args = (node.args[0], rows)

    return damage


def pending_of(place: int) -> Callable[[Rewritten], None]:
    def damage(done: Rewritten) -> None:
        first, second = (done.operands.written[id(n.slot)].b for n in done.operands.rows[:2])
        change(first, place, second.args[place])

    return damage


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
    "a row too many of W": (part_of("weight", slice(None, 65)), "not slice"),
    "W's rows for A": (part_of("a", slice(None, 64)), "not slice"),
    "A's scales for W": (part_of("scale", slice(64, None)), "not slice"),
    "W's scales for A": (part_of("a_scale", slice(None, 64)), "not slice"),
    "pending of another B": (pending_of(0), "its pending part is made of"),
    "pending against another applied": (pending_of(1), "its pending part is made of"),
    "pending with another scaling": (pending_of(2), "its pending part is made of"),
}


@pytest.mark.parametrize(("damage", "said"), UPDATES.values(), ids=UPDATES)
def test_a_wrong_update_is_seen(written, damage, said):
    written.verify()
    damage(written)
    with pytest.raises(PassError, match=said):
        written.verify()


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
    with pytest.raises(PassError, match=f"^{found.name}: .*no metadata of its value"):
        done.verify()


def test_a_value_of_another_dtype_is_seen(done):
    result = done.sigmoid().args[0]
    key = "example_value" if "example_value" in result.meta else "val"
    result.meta[key] = result.meta[key].to(torch.bfloat16)
    with pytest.raises(PassError, match="has not the value of"):
        done.verify()


def test_a_lost_stack_trace_is_seen(done):
    traces = [n for n in done.graph.nodes if "nn_module_stack" in n.meta and n not in done.before]
    assert traces
    for node in traces:
        del node.meta["nn_module_stack"]
    with pytest.raises(PassError, match=r"has lost \['nn_module_stack'\]"):
        done.verify()


# -- a weight that is released ---------------------------------------------------------------------


def prepared_by(update: str) -> Rewritten:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(24, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x).sigmoid()

    model = peft.get_peft_model(One(), peft.LoraConfig(target_modules="proj", r=4))
    fill_b(frozen_a(model), 0.1)
    options = {"update": "rows", "topk": 1} if update == "rows" else {}
    prepare(model, FalqonConfig(**options), progress=False)
    gm = captured(model, randn(5, 24))
    return passes(gm, values(gm, randn(5, 24)), **options)


@pytest.mark.parametrize("update", ["adapter", "rows"])
def test_a_base_layer_that_runs_again_is_seen(update):
    """The eager op of the base layer, which reads bytes that the fused op reads already."""
    done = prepared_by(update)
    done.verify()
    (site,) = done.plan.sites
    with done.graph.inserting_after(done.fused()):
        base = site.match.base
        if update == "rows":
            op = torch.ops.falqon.rows_base_linear.default
            rest = (*base.state, base.bias, base.scaling)
        else:
            op = torch.ops.falqon.base_linear.default
            rest = (base.code, base.scale, base.digest, base.bias)
        done.graph.call_function(op, (done.fused().args[0], *rest, base.spec_text))
    with pytest.raises(PassError, match=r"1 new operations falqon.*base_linear.*, 0 are"):
        done.verify()


def test_a_prepared_base_made_of_other_bytes_is_seen():
    done = prepared_by("adapter")
    (nodes,) = done.operands.bases
    code, scale, digest = nodes.given
    swapped = replace(nodes, given=(code, digest, scale))
    done.operands = replace(done.operands, bases=(swapped,))
    with pytest.raises(PassError, match="its base is made of"):
        done.verify()


def test_another_bias_of_a_prepared_layer_is_seen():
    done = prepared_by("adapter")
    change(done.fused(), BIAS, done.fused().args[LORA_B])
    with pytest.raises(PassError, match=r"is not .*bias"):
        done.verify()


def test_an_update_from_a_released_weight_is_seen():
    done = prepared_by("rows")
    done.verify()
    change(done.writes(), 7, done.writes().args[6])
    with pytest.raises(PassError, match="a weight that is released"):
        done.verify()


# -- bodies of checkpoints -------------------------------------------------------------------------


@pytest.fixture
def checkpointed() -> Rewritten:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=False)

    x = randn(5, 64).requires_grad_()
    gm = captured(Checkpointed(), x)
    return passes(gm, values(gm, x))


def test_a_lost_operand_of_a_checkpoint_is_seen(checkpointed):
    checkpointed.verify()
    (body,) = checkpointed.plan.root.children
    body.call.args = body.call.args[:-1]
    with pytest.raises(PassError, match=r"gives \d+ operands to \d+ inputs"):
        checkpointed.verify()


def test_swapped_operands_of_a_checkpoint_are_seen(checkpointed):
    (body,) = checkpointed.plan.root.children
    *rest, last, end = body.call.args
    body.call.args = (*rest, end, last)
    with pytest.raises(PassError, match="is not the operand it stands for"):
        checkpointed.verify()


def test_an_operation_lost_in_the_body_of_a_checkpoint_is_seen(checkpointed):
    (body,) = checkpointed.plan.root.children
    sigmoid = next(n for n in body.gm.graph.nodes if n.target == "sigmoid")
    sigmoid.replace_all_uses_with(sigmoid.args[0])
    body.gm.graph.erase_node(sigmoid)
    with pytest.raises(PassError, match=r"outside the sites disappeared: \['sigmoid"):
        checkpointed.verify()


# -- all frontends alike ---------------------------------------------------------------------------

ALIKE = {
    "adapter": {},
    "hold": {"update": "rows", "topk": 1, "pending": "hold"},
    "apply": {"update": "rows", "topk": 1, "pending": "apply"},
    "drop": {"update": "rows", "topk": 1, "pending": "drop"},
}


@pytest.mark.parametrize("options", ALIKE.values(), ids=ALIKE)
def test_every_frontend_is_rewritten_alike(options):
    """The same sites in the same groups, the same ops for them, the same numbers."""
    found = [numbers(name, options) for name in FRONTENDS]
    for sites, added, tensors in found:
        assert (sites, added) == found[0][:2]
        assert all(torch.equal(a, b) for a, b in zip(tensors, found[0][2], strict=True))


def numbers(
    frontend: str, options: dict[str, Any]
) -> tuple[list[Any], dict[str, int], list[Tensor]]:
    """The sites, the ops that stand for them, and y, dL/dx and what is trained,
    also after a step.
    """
    torch.manual_seed(0)
    model, x = Model(), randn(5, 64).requires_grad_()
    if options:
        frozen_a(model)
    backend = Passes(**options)
    if frontend == "Dynamo":
        torch._dynamo.reset()
        call = torch.compile(model, backend=backend, fullgraph=True)
        call(x)
        (result,) = backend.results
    else:
        call = result = rewrite(FRONTENDS[frontend](model, x), [x], backend.config)
    tensors = []
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        y = call(x)
        y.sum().backward()
        tensors += [y.detach(), x.grad, *(p.grad for p in trained)]
        model.zero_grad()
        x.grad = None
        with torch.no_grad():
            for i, weight in enumerate(trained):
                weight.add_(randn(*weight.shape, seed=i) / 64)
    sites = [(s.path.split(".")[-1], s.group, s.scaling, s.rank) for s in result.report.sites]
    ops = ("merged_linear.default", "proxy_update.default", "proxy_update_.default", "zero_")
    return sites, {name: targets(result.gm)[name] for name in (*ops, "linear")}, tensors


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("options", ALIKE.values(), ids=ALIKE)
def test_rewriting_twice_changes_nothing(frontend, options):
    model, x = Model(), randn(5, 64)
    if options:
        frozen_a(model)
    first = rewritten_by(frontend, model, x, FalqonConfig(**options))
    inputs = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders(first.gm)]
    own = [n for n in placeholders(first.gm) if "falqon_shape" not in n.meta]
    states = first.fake_inputs(inputs[: len(own)])
    second = rewrite(first.gm, states, first.config)
    assert len(first.report.sites) == 4
    assert not second.report.sites
    assert not second.report.rejected
    assert not second.operands.bases
    assert not second.operands.rows
    assert str(second.gm.graph) == str(first.gm.graph)


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def rewritten_by(frontend: str, model: nn.Module, x: Tensor, config: FalqonConfig) -> RewriteResult:
    gm = FRONTENDS[frontend](model, x)
    return rewrite(gm, values(gm, x), config)
