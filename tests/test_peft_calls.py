"""PEFT's model calls before and after compile, unprepared and prepared: what their documentation
promises, or an error that names the site and the remedy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from tests import tolerances as tol
from tests.emulation import emulate
from tests.models import train
from tests.parameters import PREPARED_OR_NOT, each_pair, each_value, slow
from tests.peft_calls import (
    SITES,
    activate,
    afresh,
    after,
    cast,
    compiled,
    inputs,
    load,
    made,
    other,
    other_config,
    replace,
    trained,
)

PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])


@pytest.fixture
def saved(tmp_path):
    other().save_pretrained(tmp_path / "other")
    return tmp_path / "other"


# -- the adapter stays as it is --------------------------------------------------------------------


@each_value(when=["before", "after"], prepared=PREPARED_OR_NOT)
def test_disable_adapter_gives_the_fp8_base_and_comes_back(prepared, when):
    model = made(prepared)
    call = compiled(model)
    first = call(inputs()) if when == "after" else None
    with model.disable_adapter():
        disabled = call(inputs())
    last = call(inputs())
    assert first is None or torch.equal(first, last)
    twin = emulate(made(), falqon_fx.adapters(model))
    assert torch.equal(last, twin(inputs()))
    with twin.disable_adapter():
        assert torch.equal(disabled, twin(inputs()))


@PREPARED
def test_the_reference_model_is_the_same_bit_for_bit_from_first_to_last_step(prepared):
    """As DPO has it: the policy with its adapter disabled."""
    model = made(prepared)
    call, optimizer, seen = compiled(model), trained(model), []
    for _ in range(4):
        with model.disable_adapter(), torch.no_grad():
            seen.append(call(inputs()))
        train(call, optimizer, inputs(), steps=1)
    assert all(torch.equal(seen[0], result) for result in seen)


@each_value(when=["before", "after"], prepared=PREPARED_OR_NOT)
def test_an_added_adapter_changes_nothing_until_it_is_active(prepared, when):
    found, model, first = after(lambda m: m.add_adapter("other", other_config()), prepared, when)
    assert torch.equal(found, first)
    assert list(falqon_fx.adapters(model)) == SITES


@PREPARED
def test_save_pretrained_after_training_writes_the_trained_adapter(prepared, tmp_path):
    model = made(prepared)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    train(compiled(model), trained(model), inputs(), steps=3)
    assert all(not torch.equal(model.get_parameter(n), p) for n, p in before.items())
    model.save_pretrained(tmp_path)
    loaded = other()
    loaded.load_adapter(tmp_path, "back")
    for path in SITES:
        for part in ("lora_A", "lora_B"):
            layers = (getattr(m.get_submodule(path), part) for m in (model, loaded))
            assert torch.equal(*(x[n].weight for x, n in zip(layers, ("default", "back"))))


# -- scalings --------------------------------------------------------------------------------------


def each_layer(call: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def act(model: nn.Module) -> None:
        for path in SITES:
            call(model.get_submodule(path))

    return act


SCALINGS: dict[str, Callable[[nn.Module], object]] = {
    "scale_layer": each_layer(lambda layer: layer.scale_layer(0.5)),
    "set_scale": each_layer(lambda layer: layer.set_scale("default", 3.0)),
}


@each_pair(act=list(SCALINGS), when=["before", "after"], prepared=PREPARED_OR_NOT)
def test_another_scaling_is_used_on_the_same_base(act, when, prepared):
    """And back: `unscale_layer`."""
    model = made(prepared)
    call = compiled(model)
    first = call(inputs())
    made_at_first = [state.weight.data_ptr() for state in falqon_fx.adapters(model).values()]
    if when == "before":
        torch._dynamo.reset()
    SCALINGS[act](model)
    found = call(inputs())
    states = falqon_fx.adapters(model)
    assert [state.weight.data_ptr() for state in states.values()] == made_at_first
    wanted = [model.get_submodule(path).scaling["default"] for path in SITES]
    assert [s for state in states.values() for *_, s in state.adapters] == wanted
    assert torch.equal(found, afresh(model))
    if act == "scale_layer":
        each_layer(lambda layer: layer.unscale_layer())(model)
        assert torch.equal(call(inputs()), first)


# -- another adapter -------------------------------------------------------------------------------


def activate_of_rank_3(model: nn.Module) -> None:
    activate(model, rank=3)


@each_value(
    act=[activate, activate_of_rank_3, replace],
    when=["before", "after"],
    prepared=PREPARED_OR_NOT,
)
def test_another_adapter_is_used_on_the_same_base(act, when, prepared):
    found, model, first = after(act, prepared=prepared, when=when)
    rank = 3 if act is activate_of_rank_3 else 4
    assert torch.equal(found, afresh(other(rank)))
    assert not torch.equal(found, first)


@each_pair(
    name=["other", "default"],
    when=["before", "after"],
    prepared=PREPARED_OR_NOT,
)
def test_a_loaded_adapter_is_used(saved, name, when, prepared):
    """Under a name of its own, or over the adapter that was active."""
    found, _, first = after(load(saved, name), prepared=prepared, when=when)
    assert torch.equal(found, afresh(other()))
    assert not torch.equal(found, first)


@each_value(when=["before", "after"], prepared=PREPARED_OR_NOT)
def test_two_active_adapters_are_both_used(when, prepared):
    def both(model: nn.Module) -> None:
        activate(model, rank=3)
        model.base_model.set_adapter(["default", "other"])

    found, model, first = after(both, prepared=prepared, when=when)
    plain = made()
    both(plain)
    twin = emulate(plain, falqon_fx.adapters(model))
    assert torch.equal(found, twin(inputs()))
    assert not torch.equal(found, first)
    assert all(len(state.adapters) == 2 for state in falqon_fx.adapters(model).values())


# -- mixed batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", slow("aot_eager"), slow("inductor")])
@pytest.mark.parametrize("prepared", [False, True], ids=PREPARED_OR_NOT)
def test_a_mixed_batch_has_the_adapter_of_each_sample(prepared, inner):
    """PEFT adds each sample's adapter to its rows of the base layer's result: in FP8 that of the
    base, the adapters as they were. So the original on exact operands, with the casts of the base
    layer in each, is what bounds it.
    """
    model = made(prepared)
    activate(model, rank=3)
    model.eval()
    plain = made()
    activate(plain, rank=3)
    plain.eval()
    names = ["default", "other", "__base__", "other", "default"]
    call = torch.compile(model, backend="falqon", options={"inner": inner})
    with torch.no_grad():
        found = call(inputs(), adapter_names=names)
        eager = model(inputs(), adapter_names=names)
        wanted = mixed(plain, inputs(), names)
        if prepared:
            restored = falqon_fx.restore(copy.deepcopy(model))
            assert torch.equal(eager, restored(inputs(), adapter_names=names))
    wanted.assert_holds(found)


def mixed(model: nn.Module, x: Tensor, names: list[str]) -> tol.Approx:
    """Layer by layer, with the bounds of one cast of x and one of W."""
    value = tol.Approx.exact(x)
    for path in SITES:
        layer = model.get_submodule(path)
        weight = tol.Approx.exact(layer.base_layer.weight.detach())
        y = (cast(value) @ cast(weight).t()).rounded(torch.float32)
        y = (y + tol.Approx.exact(layer.base_layer.bias.detach())).rounded(torch.float32)
        rows = []
        for i, name in enumerate(names):
            row = tol.Approx(y.value[i : i + 1], y.bound[i : i + 1])
            if name != "__base__":
                a, b = (tol.Approx.exact(m[name].weight) for m in (layer.lora_A, layer.lora_B))
                of_x = tol.Approx(value.value[i : i + 1], value.bound[i : i + 1])
                term = (of_x @ a.t()).rounded(torch.float32) @ b.t()
                factor = tol.Approx.exact(torch.tensor(layer.scaling[name]))
                term = (term.rounded(torch.float32) * factor).rounded(torch.float32)
                row = (row + term).rounded(torch.float32)
            rows.append(row)
        value = tol.Approx(
            torch.cat([row.value for row in rows]), torch.cat([row.bound for row in rows])
        )
        if path == SITES[0]:  # ReLU moves no two values further apart
            value = tol.Approx(value.value.relu(), value.bound)
    return value
