"""Faults in what goes into the sites: bases, casts, dropout, updates, released weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import peft
import pytest
import torch
from torch import Tensor, nn

from falqon_fx import FalqonConfig, prepare
from tests.models import fill_b
from tests.passes.rewritten import (
    BIAS,
    CASTS,
    FRONTENDS,
    LORA_B,
    OWN_X,
    WRITES,
    Model,
    Rewritten,
    captured,
    change,
    frozen_a,
    passes,
    seen,
    traced,
    values,
)
from tests.sites import randn
from tests.spellings import HandWritten, Spelling

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
    with seen(said):
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
    change(done.casts(), 7, not done.casts().args[7])


def another_spec(done: Rewritten) -> None:
    change(done.casts(), 8, "row amax e5m2 bfloat16 auto fast auto #0")


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
    with seen(said):
        done.verify()


def test_a_cast_of_b_for_another_weight_is_seen():
    x = randn(5, 64)
    done = passes(traced(Model(), x), [x], adapter_dtype="fp8")
    done.verify()
    casts_of(3)(done)
    with seen("b is cast for falqon_base_"):
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
    with seen(said):
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
    with seen(said):
        written.verify()


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
    with seen(r"1 new operations falqon.*base_linear.*, 0 are"):
        done.verify()


def test_a_prepared_base_made_of_other_bytes_is_seen():
    done = prepared_by("adapter")
    (nodes,) = done.operands.bases
    code, scale, digest = nodes.given
    swapped = replace(nodes, given=(code, digest, scale))
    done.operands = replace(done.operands, bases=(swapped,))
    with seen("its base is made of"):
        done.verify()


def test_another_bias_of_a_prepared_layer_is_seen():
    done = prepared_by("adapter")
    change(done.fused(), BIAS, done.fused().args[LORA_B])
    with seen(r"is not .*bias"):
        done.verify()


def test_an_update_from_a_released_weight_is_seen():
    done = prepared_by("rows")
    done.verify()
    change(done.writes(), 7, done.writes().args[6])
    with seen("a weight that is released"):
        done.verify()
