"""`prepare` refuses a model before it changes anything."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError
from tests.models import freeze_a, tiny_mlp
from tests.sites import randn
from tests.test_prepare import (
    DEFAULT,
    ROWS,
    SITES,
    UPDATES,
    Tied,
    is_prepared,
    parameters,
    smollm_layer,
    unchanged,
)


def refused(model: nn.Module, config: FalqonConfig = DEFAULT) -> FalqonError:
    before = parameters(model)
    with pytest.raises(FalqonError) as caught:
        falqon_fx.prepare(model, config, progress=False)
    assert unchanged(model, before)
    assert not any(map(is_prepared, model.modules()))
    return caught.value


@UPDATES
def test_a_tied_weight_is_refused(config):
    model = peft.get_peft_model(Tied(), peft.LoraConfig(r=2, target_modules=["up", "head"]))
    error = refused(freeze_a(model), config)
    assert error.site == "base_model.model.head"
    assert "tied" in str(error)
    assert "embed" in str(error)
    assert "exclude=" in error.remedy
    config = FalqonConfig(update=config.update, exclude=("*head",))
    report = falqon_fx.prepare(model, config, progress=False)
    assert list(report.prepared) == ["base_model.model.up"]  # the remedy works


@UPDATES
@pytest.mark.parametrize("init", ["svd", "keep"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 1e5])
def test_bad_values_in_the_last_base_change_no_layer_before_it(bad, init, config):
    """Not even lora_A of the first, which init="svd" overwrites."""
    model = freeze_a(tiny_mlp())
    with torch.no_grad():
        model.get_submodule(f"{SITES[1]}.base_layer").weight[1, 2] = bad
    error = refused(model, FalqonConfig(update=config.update, init=init))
    assert error.site == SITES[1]
    assert "65536" in str(error) if bad == 1e5 else "NaN or Inf" in str(error)
    assert "exclude=" in error.remedy


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e5])
def test_bad_values_in_a_frozen_layer_without_an_adapter_change_nothing(bad):
    model = smollm_layer()
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").weight[3, 4] = bad
    error = refused(model)
    assert error.site == "base_model.model.model.layers.0.mlp.down_proj"
    assert "65536" in str(error) if bad == -1e5 else "NaN or Inf" in str(error)
    assert "exclude=" in error.remedy
    report = falqon_fx.prepare(model, FalqonConfig(exclude=("*down_proj",)), progress=False)
    assert len(report.prepared) == 6  # the remedy works


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_bad_values_in_an_adapter_are_its_own_affair_but_with_update_rows(which):
    """They are no part of what `prepare` casts: the result is NaN with and without it."""
    model = freeze_a(tiny_mlp())
    with torch.no_grad():
        model.get_submodule(f"{SITES[1]}.{which}.default").weight[1, 2] = float("nan")
    error = refused(copy.deepcopy(model), ROWS)
    assert error.site == SITES[1]
    assert "NaN or Inf" in str(error)
    x = randn(3, 32)
    before = model(x).isnan()
    falqon_fx.prepare(model, progress=False)
    assert before.any()
    assert torch.equal(model(x).isnan(), before)


@pytest.mark.parametrize(
    ("part", "shape"),
    [("lora_A", (5, 48)), ("lora_A", (4, 47)), ("lora_B", (32, 3)), ("lora_B", (31, 4))],
)
@UPDATES
def test_an_adapter_that_does_not_fit_is_refused(part, shape, config):
    """As after a swap of A or B alone."""
    model = freeze_a(tiny_mlp())
    layer = model.get_submodule(SITES[1])
    getattr(layer, part)["default"].weight = nn.Parameter(randn(*shape))
    error = refused(model, config)
    assert error.site == SITES[1]
    assert all(str(n) in error.problem for n in shape)
    assert "A [r, in] and B [out, r]" in error.remedy


@pytest.mark.parametrize("adapted", [True, False])
@UPDATES
def test_a_model_without_values_is_refused(config, adapted):
    model = freeze_a(tiny_mlp()) if adapted else nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(FalqonError, match="its base weight is on the meta device") as caught:
        falqon_fx.prepare(model.requires_grad_(False).to("meta"), config, progress=False)
    assert caught.value.site == (SITES[0] if adapted else "0")
    assert "Give it values" in caught.value.remedy
    assert not any(map(is_prepared, model.modules()))


@UPDATES
def test_an_adapter_on_another_device_is_refused(config):
    model = freeze_a(tiny_mlp())
    model.get_submodule(SITES[1]).lora_A.to("meta")
    with pytest.raises(FalqonError) as caught:
        falqon_fx.prepare(model, config, progress=False)
    assert caught.value.site == SITES[1]
    assert "lora_A is on meta, its base weight on cpu" in str(caught.value)
    assert "Move the whole model to one device" in caught.value.remedy
    assert not any(map(is_prepared, model.modules()))


def test_a_topk_above_the_rows_of_a_layer_is_refused():
    error = refused(freeze_a(tiny_mlp()), FalqonConfig(update="rows", topk=40))  # of 48, then 32
    assert isinstance(error, FalqonConfigError)
    assert SITES[1] in str(error)
    assert '"all"' in str(error)
