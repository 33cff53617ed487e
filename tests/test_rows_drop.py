"""pending="drop": what was trained lies in W' alone, and what a state dict lacks."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.rows.state import create
from tests.by_rows import OPTIONS, PREPARED, SITES, compiled, mlp, sgd, states_of
from tests.models import fill_b, lora_b, train
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.sites import dequantized, randn, same


def trained_with_drop(prepared: bool, **options: Any) -> tuple[nn.Module, nn.Module]:
    model, run = mlp(prepared, pending="drop", **options)
    train(run, sgd(model), randn(6, 32), 3)
    run(randn(6, 32))  # writes the last step
    assert not any(b.any() for b in lora_b(model))
    assert all(state.applied.any() for state in falqon_fx.adapters(model).values())
    return model, run


# -- drop: what was trained lies in W' alone -------------------------------------------------------


def assert_refused_and_kept(model: nn.Module, action: Any, match: str) -> None:
    before = states_of(model)
    with pytest.raises(FalqonError, match=match) as error:
        action()
    assert error.value.site in SITES
    assert "merge_and_unload" in error.value.remedy
    after = states_of(model)
    assert before.keys() == after.keys()
    assert all(same(before[path], after[path]) for path in before)


@PREPARED
def test_drop_refuses_a_restore_that_would_lose_the_training(prepared):
    model, _ = trained_with_drop(prepared)
    assert_refused_and_kept(model, lambda: falqon_fx.restore(model), "would be thrown away")


@PREPARED
@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
def test_drop_restores_what_was_not_trained(prepared, loaded):
    """B is still what it was: nothing is lost."""
    model, run = mlp(prepared, pending="drop")
    if loaded:
        fill_b(model)
        if prepared:
            falqon_fx.restore(model)
            falqon_fx.prepare(model, FalqonConfig(**OPTIONS, pending="drop"), progress=False)
    else:
        run(randn(6, 32))
    before = [b.clone() for b in lora_b(model)]
    falqon_fx.restore(model)
    assert same(before, [b.detach() for b in lora_b(model)])


def test_a_layer_without_its_adapter_is_not_restored_either():
    model, _ = trained_with_drop(True)
    model.unload()
    with pytest.raises(FalqonError, match="would be thrown away") as error:
        falqon_fx.restore(model)
    assert error.value.site == SITES[0]


CHANGES = {
    "A in place": lambda layer: layer.lora_A["default"].weight.mul_(1.5),
    "A through .data": lambda layer: layer.lora_A["default"].weight.data.mul_(1.5),
    "A loaded": lambda layer: layer.lora_A["default"].load_state_dict(
        {"weight": torch.ones(layer.lora_A["default"].weight.shape)}
    ),
    "W in place": lambda layer: layer.base_layer.weight.mul_(1.5),
    "W through .data": lambda layer: layer.base_layer.weight.data.mul_(1.5),
    "W loaded as it was": lambda layer: layer.base_layer.load_state_dict(
        layer.base_layer.state_dict()
    ),
    "W moved": lambda layer: setattr(
        layer.base_layer.weight, "data", layer.base_layer.weight.data.clone()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_drop_refuses_to_be_made_anew_from_another_a_or_w(change):
    model, run = trained_with_drop(False)
    change(model.base_model.model[2])
    assert_refused_and_kept(model, lambda: run(randn(6, 32)), "would be made anew without it")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("pending", ["hold", "apply"])
def test_others_are_made_anew_from_b(change, pending):
    model, run = mlp(pending=pending)
    x = randn(6, 32)
    train(run, sgd(model), x, 3)
    layer = model.base_model.model[2]
    change(layer)
    run(x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    config = FalqonConfig(**OPTIONS, pending=pending)
    fresh = create("site", layer.base_layer.weight, a, b, 2.0, config)
    state = falqon_fx.adapters(model)[SITES[1]]
    assert same([state.code, state.scale, state.applied], [fresh.code, fresh.scale, fresh.applied])


@PREPARED
@pytest.mark.parametrize("other", [{"scale": "amax"}, {"pending": "apply"}, {"topk": 3}])
def test_drop_refuses_other_options_beside_it(prepared, other):
    """A second state would be made from the base weight and a B of zeros. (A prepared layer has one
    state for all options.)
    """
    model, _ = trained_with_drop(prepared, scale="pow2")
    run = compiled(model, **{"pending": "drop", **other})
    if prepared:
        if "scale" in other:
            with pytest.raises(Exception, match="Give prepare"):
                run(randn(6, 32))
        return
    assert_refused_and_kept(model, lambda: run(randn(6, 32)), "other options or another scaling")


def test_drop_refuses_another_scaling():
    model, run = trained_with_drop(False)
    model.base_model.model[0].scale_layer(0.5)
    assert_refused_and_kept(model, lambda: run(randn(6, 32)), "other options or another scaling")


def test_drop_refuses_to_be_prepared_behind_its_training():
    model, _ = trained_with_drop(False)
    config = FalqonConfig(**OPTIONS, pending="drop")

    def prepare() -> object:
        return falqon_fx.prepare(model, config, progress=False)

    assert_refused_and_kept(model, prepare, "would make anew without it")


@PREPARED
def test_what_drop_trained_is_merged(prepared):
    model, _ = trained_with_drop(prepared)
    wanted = {p: dequantized(s)[: len(s.applied)] for p, s in falqon_fx.adapters(model).items()}
    plain = falqon_fx.merge_and_unload(model)
    for path, layer in zip(wanted, (plain[0], plain[2]), strict=True):
        assert torch.equal(layer.weight.double(), wanted[path].float().double())


@each_value(
    prepared=PREPARED_OR_NOT, pending=["hold", "drop", "apply"], inner=["eager", "aot_eager"]
)
def test_two_forward_passes_before_one_backward_pass(prepared, pending, inner):
    """B rests, so W' does: both backward passes are right. That "drop" zeroes B is no step."""
    model, run = mlp(prepared, pending=pending, inner=inner)
    x = randn(6, 32)
    train(run, sgd(model), x, 2)
    losses = [run(value).square().sum() for value in (x, 2 * x)]
    together = torch.autograd.grad(losses[0], lora_b(model))
    torch.autograd.grad(losses[1], lora_b(model))
    alone = torch.autograd.grad(run(x).square().sum(), lora_b(model))
    assert same(list(together), list(alone))


# -- drop: what a state dict lacks -----------------------------------------------------------------


@PREPARED
def test_saving_an_adapter_that_holds_nothing_of_its_training_warns_once(prepared, tmp_path):
    model, run = trained_with_drop(prepared)
    with pytest.warns(UserWarning, match="holds nothing of what was trained") as caught:
        model.save_pretrained(tmp_path)
    assert len([w for w in caught if "falqon" in str(w.message)]) == 1
    assert f"falqon: {SITES[0]}: " in str(caught[0].message)
    assert "save_checkpoint" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()
        run(randn(6, 32))
        model.save_pretrained(tmp_path)


def test_saving_warns_of_a_state_that_took_anothers_place(tmp_path):
    """What was compiled and restored before the training that is at stake."""
    model, run = mlp(pending="drop")
    x = randn(6, 32)
    run(x)
    falqon_fx.restore(model)
    train(run, sgd(model), x, 2)
    run(x)
    with pytest.warns(UserWarning, match="holds nothing of what was trained"):
        model.save_pretrained(tmp_path)


@PREPARED
def test_a_checkpoint_of_the_library_is_whole_and_nothing_warns(prepared, tmp_path):
    model, _ = trained_with_drop(prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        falqon_fx.save_checkpoint(model, tmp_path)


@pytest.mark.parametrize("pending", ["hold", "apply", "drop"])
def test_what_a_state_dict_holds_is_saved_silently(pending, tmp_path):
    model, run = mlp(pending=pending)
    x = randn(6, 32)
    run(x)
    if pending != "drop":
        train(run, sgd(model), x, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


def test_models_that_would_warn_can_be_copied_and_pickled():
    model, _ = trained_with_drop(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = copy.deepcopy(model)
        layer = pickle.loads(pickle.dumps(model.base_model.model[0].lora_B))
        twin.state_dict()
        layer.state_dict()
