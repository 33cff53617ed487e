"""Adapters go from falqon to plain PEFT and back."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.rows.unload import fp8_layers
from tests.models import freeze_a, tiny_llama
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.tolerances import (
    Parameters,
    assert_within,
    gamma,
    site_bounds,
)
from tests.unloading import IDS, compiled, train


def plain_base(model: nn.Module) -> nn.Module:
    """The base model as it was before PEFT wrapped it."""
    return copy.deepcopy(model).unload()


def save_adapter(model: nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: no config of a base model to look up
        model.save_pretrained(folder)


@each_value(init=["keep", "svd"], prepared=PREPARED_OR_NOT)
def test_an_adapter_trained_under_falqon_loads_in_plain_peft(tmp_path, prepared, init):
    """On the original base, with the same A and B; logits differ by the casts of the one layer that
    runs in FP8, the head.
    """
    model = tiny_llama(layers=1, target_modules=["lm_head"])
    original = plain_base(model)
    call = compiled(model, prepared, init=init, frozen="leave")
    train(call, model, 4, rate=0.3)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(original, tmp_path).eval()
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(names) == 2
    for name in names:
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    assert loaded.get_parameter(names[1]).any()

    seen: dict[str, Tensor] = {}
    loaded.get_base_model().model.register_forward_hook(lambda m, a, out: seen.update(x=out[0]))
    model.eval()
    with torch.no_grad():
        found = call(IDS).logits
        expected = loaded(IDS).logits
    head = loaded.get_base_model().lm_head
    site = Parameters(
        head.base_layer.weight.detach(),
        head.lora_A.default.weight.detach(),
        head.lora_B.default.weight.detach(),
        head.scaling["default"],
    )
    x = seen["x"].reshape(-1, 32).double()
    without = x @ site.base.double().t()
    adapter = site.scaling * x @ site.lora_a.double().t() @ site.lora_b.double().t()
    bound = site_bounds(x.float(), found.reshape(-1, 64), site).y
    assert_within(found.reshape(-1, 64), without + adapter, bound)
    # In float32, without FP8: sums of 32 and of 4 products.
    terms = x.abs() @ site.base.double().abs().t()
    terms += (
        site.scaling * x.abs() @ site.lora_a.double().abs().t() @ site.lora_b.double().abs().t()
    )
    assert_within(expected.reshape(-1, 64), without + adapter, gamma(32 + 4 + 4) * terms)
    # The bound says something: the adapter itself is far outside it.
    assert (adapter.abs() > bound).any()


@pytest.mark.parametrize(
    ("options", "prepared", "update"),
    [
        ({}, False, "adapter"),
        ({}, True, "rows"),
        ({"use_rslora": True}, True, "adapter"),
        ({"alpha_pattern": {"q_proj": 3}}, True, "adapter"),
        ({"init_lora_weights": "olora"}, False, "adapter"),
    ],
    ids=str,
)
def test_an_adapter_trained_elsewhere_goes_on_under_falqon(tmp_path, prepared, options, update):
    """A and B as they were trained; training goes on from there."""
    elsewhere = tiny_llama(layers=1, target_modules=["q_proj", "v_proj"], **options)
    original = plain_base(elsewhere)
    before = train(elsewhere, elsewhere, 8)
    save_adapter(elsewhere, tmp_path)

    model = peft.PeftModel.from_pretrained(original, tmp_path, is_trainable=True).train()
    parameters = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    for name, parameter in elsewhere.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, parameters[name])
    rows = {"topk": "all"} if update == "rows" else {}
    call = compiled(model, prepared, update=update, init="svd", **rows)
    after = train(call, model, 8)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            moved = "lora_B" in name or update == "adapter"
            assert torch.equal(parameter, parameters[name]) != moved
    # It starts where the other ended, not where that began, and goes on falling.
    assert abs(after[0] - before[-1]) < 0.2 * (before[0] - before[-1])
    assert after[-1] < after[0]


def test_with_update_rows_a_loaded_adapter_is_in_the_fp8_weight_at_once(tmp_path):
    elsewhere = tiny_llama(target_modules=["q_proj"])
    original = plain_base(elsewhere)
    train(elsewhere, elsewhere, 3)
    save_adapter(elsewhere, tmp_path)
    model = peft.PeftModel.from_pretrained(original, tmp_path, is_trainable=True)
    config = FalqonConfig(update="rows", init="svd")
    falqon_fx.prepare(freeze_a(model), config, progress=False)
    found = fp8_layers(model.get_base_model())
    assert len(found) == 2
    for layer, state in found.values():
        assert torch.equal(state.applied, layer.lora_b)
        assert not state.pending().any()
