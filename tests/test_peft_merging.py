"""PEFT merges and unloads, and adapters under update="rows": as documented, or an error."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.rows.prepared import MergedBaseLinear
from falqon_fx.site import found, looks
from tests.models import WIDTH, Net, fill_b, freeze_a, train
from tests.parameters import each_value
from tests.peft_calls import (
    CONFIG,
    ROWS,
    SITES,
    WHEN,
    activate,
    afresh,
    after,
    compiled,
    inputs,
    load,
    made,
    other,
    replace,
    trained,
)


@pytest.fixture
def saved(tmp_path):
    other().save_pretrained(tmp_path / "other")
    return tmp_path / "other"


# -- merging and unloading -------------------------------------------------------------------------


def merged_weights(model: nn.Module) -> list[Tensor]:
    """W + s·B·A as PEFT computes it, from a model whose base layers are plain."""
    result = []
    for path in SITES:
        layer = model.get_submodule(path)
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        result.append((layer.base_layer.weight + delta * layer.scaling["default"]).detach())
    return result


def plain_weights(model: Any) -> list[Tensor]:
    """The weights of an unloaded model."""
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    return [model[0].weight.detach(), model[2].weight.detach()]


@each_value(safe=[False, True], when=["before", "after"])
def test_merge_and_unload_adds_the_trained_adapter_to_the_base_weights(safe, when):
    model = made()
    if when == "after":
        train(compiled(model), trained(model), inputs(), steps=3)
    expected = merged_weights(model)
    unloaded = model.merge_and_unload(safe_merge=safe)
    assert all(map(torch.equal, plain_weights(unloaded), expected))
    assert torch.equal(compiled(unloaded)(inputs()), unloaded(inputs()))


@WHEN
def test_unload_gives_the_base_model(when):
    model = made()
    expected = [model.get_submodule(path).base_layer.weight.clone() for path in SITES]
    if when == "after":
        train(compiled(model), trained(model), inputs(), steps=3)
    assert all(map(torch.equal, plain_weights(model.unload()), expected))


@WHEN
def test_merge_adapter_and_back(when):
    """A merged base weight is another one, so its FP8 form is made anew."""
    found, model, first = after(lambda m: m.merge_adapter(), False, when)
    assert torch.equal(found, afresh(model))
    call = compiled(model)
    model.unmerge_adapter()  # W + ΔW - ΔW: W but for its rounding
    back = call(inputs())
    assert torch.equal(back, afresh(model))


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_graph_sees_what_was_merged_before_it_ran_on_a_gpu(call, monkeypatch):
    """PEFT writes W through `.data`, which no version counts, and a step never waits for a GPU to
    look at W. What asks the registry does.
    """
    for module in (looks, found):
        monkeypatch.setattr(module, "waits", lambda weight: True)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["up", "down"])
    model, x = peft.get_peft_model(Net(), lora), torch.randn(5, WIDTH)
    fill_b(model, 0.1)
    run = compiled(model)
    run(x)
    merged = getattr(model, call)() or model
    assert torch.equal(compiled(merged)(x), compiled(copy.deepcopy(merged))(x))
    if merged is model:
        model.unmerge_adapter()
        assert torch.equal(run(x), compiled(copy.deepcopy(model))(x))


@pytest.mark.parametrize("config", [CONFIG, ROWS], ids=["adapter", "rows"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_a_prepared_model_is_an_error_whose_remedy_works(call, safe, config):
    """PEFT writes into a weight that is only a copy here: the write would be lost."""
    model = made(True, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FalqonError, match="FP8 in the place of its base weight") as no:
        getattr(model, call)(safe_merge=safe)
    assert no.value.site == SITES[0]
    assert "falqon_fx.restore(model)" in no.value.remedy
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    falqon_fx.restore(model)
    expected = merged_weights(model)
    getattr(model, call)(safe_merge=safe)
    unloaded = model.unload()
    assert all(map(torch.equal, plain_weights(unloaded), expected))


def test_an_initialization_that_writes_the_base_weight_is_refused_on_a_prepared_model():
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights="pissa")
    with pytest.raises(FalqonError, match=r"base_model\.model\.0: prepare"):
        made(prepared=True).add_adapter("other", config)


@pytest.mark.parametrize("through", ["weight", "data", "transpose", "slice"])
def test_writes_into_a_prepared_weight_are_errors_and_copies_are_free(through):
    layer = made(prepared=True).get_submodule(SITES[0]).base_layer
    views = {
        "weight": lambda w: w,
        "data": lambda w: w.data,
        "transpose": lambda w: w.t(),
        "slice": lambda w: w[:1],
    }
    view = views[through](layer.weight)
    for write in (
        lambda: view.add_(1),
        lambda: view.__iadd__(1),
        lambda: view.__setitem__(0, 1.0),
        lambda: view.copy_(view),
    ):
        with pytest.raises(FalqonError, match="would be lost"):
            write()
    own = view.float().clone()
    own += 1
    assert type(own) is Tensor
    assert torch.equal(own, view + 1)


def test_unload_of_a_prepared_model_leaves_fp8_layers_which_restore_makes_plain():
    model = made(prepared=True)
    restored = falqon_fx.restore(copy.deepcopy(model))
    call = compiled(model)
    with restored.disable_adapter(), model.disable_adapter():
        eager, base = restored(inputs()), call(inputs())
    unloaded = model.unload()
    assert isinstance(unloaded[0], Fp8Linear)
    assert torch.equal(unloaded(inputs()), eager)
    assert torch.equal(compiled(unloaded)(inputs()), base)
    plain = [restored.get_submodule(path).base_layer.weight for path in SITES]
    assert all(map(torch.equal, plain_weights(falqon_fx.restore(unloaded)), plain))


@pytest.mark.parametrize("config", [CONFIG, ROWS], ids=["adapter", "rows"])
def test_a_merged_adapter_is_not_prepared(config):
    model = made(config=config)
    model.merge_adapter()
    report = falqon_fx.prepare(model, config, progress=False)
    assert report.prepared == ()
    assert all("unmerge_adapter()" in reason for reason in report.skipped.values())
    model.unmerge_adapter()
    assert list(falqon_fx.prepare(model, config, progress=False).prepared) == SITES


# -- update="rows" ---------------------------------------------------------------------------------


@each_value(act=[activate, load], when=["before", "after"])
def test_with_update_rows_another_adapter_gets_a_weight_of_its_own(act, when, saved):
    act = load(saved, "other") if act is load else activate
    model = made(config=ROWS)
    call = compiled(model, ROWS)
    if when == "after":
        call(inputs())
    act(model)
    freeze_a(model)
    found = call(inputs())
    torch._dynamo.reset()
    assert torch.equal(found, compiled(freeze_a(other()), ROWS)(inputs()))


@each_value(
    act=["set_adapter", "delete_adapter", "load_adapter", "overwritten"], when=["before", "after"]
)
def test_with_update_rows_another_adapter_on_a_prepared_model_is_an_error_whose_remedy_works(
    saved, act, when
):
    """Eagerly it is right all the same: the base layer stands apart from the adapter."""
    acts = {
        "set_adapter": activate,
        "delete_adapter": replace,
        "load_adapter": load(saved, "other"),
        "overwritten": load(saved, "default"),
    }
    model = made(True, ROWS)
    call, plain = compiled(model, ROWS), falqon_fx.restore(made(True, ROWS))
    if when == "after":
        call(inputs())
    acts[act](model)
    freeze_a(model)
    with pytest.raises(FalqonError) as no:
        call(inputs())
    assert no.value.site == SITES[0]
    assert "its lora_A is not the one that prepare() merged" in str(no.value)
    assert "Call falqon_fx.restore(model)" in no.value.remedy
    acts[act](plain)
    freeze_a(plain)
    assert torch.equal(model(inputs()), plain(inputs()))

    falqon_fx.restore(model)
    falqon_fx.prepare(model, ROWS, progress=False)
    assert torch.equal(call(inputs()), compiled(plain, ROWS)(inputs()))


def test_with_update_rows_an_adapter_of_another_rank_on_a_prepared_model_runs_unmerged():
    model = made(True, ROWS)
    activate(model, rank=3)
    freeze_a(model)
    with pytest.warns(UserWarning, match=r"prepare\(\) merged an adapter of another rank") as seen:
        found = compiled(model, ROWS)(inputs())
    assert "Call falqon_fx.restore(model)" in str(seen[0].message)
    assert torch.equal(found, model(inputs()))


def test_with_update_rows_unload_of_a_prepared_model_leaves_its_layers():
    model = made(True, ROWS)
    expected = falqon_fx.restore(copy.deepcopy(model))
    with expected.disable_adapter():
        result = expected(inputs())
    unloaded = model.unload()
    assert isinstance(unloaded[0], MergedBaseLinear)
    assert torch.equal(unloaded(inputs()), result)
    assert torch.equal(compiled(unloaded, ROWS)(inputs()), result)
    plain = [expected.get_submodule(path).base_layer.weight for path in SITES]
    assert all(map(torch.equal, plain_weights(falqon_fx.restore(unloaded)), plain))
