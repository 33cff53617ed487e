"""`save_fp8` of whatever is active: other adapters, merged ones, frozen layers, pending rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.site.base import cast_base
from falqon_fx.site.spec import SiteSpec
from tests.exports import (
    assert_one_cast_off,
    by_rows,
    export,
    in_fp8,
    layers_in,
    lora_modules,
    merged_by_peft,
    sites,
    wide_llama,
)
from tests.models import fill_b, tiny_llama
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.sites import randn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("compressed_tensors")


# -- whatever is active ----------------------------------------------------------------------------


def scaled(model: nn.Module) -> None:
    for _, module in lora_modules(model):
        module.scale_layer(0.5)


def loaded_in_place(model: nn.Module) -> None:
    fill_b(model, 0.1, seed=7)
    with torch.no_grad():
        for i, (_, module) in enumerate(lora_modules(model)):
            a = module.lora_A.default.weight
            a.copy_(randn(*a.shape, seed=100 + i))


def another(model: nn.Module) -> None:
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    fill_b(model, 0.1, seed=3)
    model.set_adapter("other")


def both(model: nn.Module) -> None:
    another(model)
    model.base_model.set_adapter(["default", "other"])


CHANGES = {"scaled": scaled, "loaded": loaded_in_place, "another": another, "both": both}


@each_value(change=CHANGES, prepared=PREPARED_OR_NOT)
def test_what_is_active_is_merged_as_peft_merges_it(tmp_path, prepared, change):
    model = in_fp8(tiny_llama(), prepared)
    before = merged_by_peft(model)
    change(model)
    expected = merged_by_peft(model)
    report = export(model, tmp_path)
    assert set(report.cast_from.values()) == {"FP8 weight" if prepared else "base weight"}
    assert len(report.layers) == 14
    assert_one_cast_off(tmp_path, expected)
    with pytest.raises(AssertionError):  # what was active before is another model
        assert_one_cast_off(tmp_path, before)


@pytest.mark.parametrize("change", ["scaled", "loaded", "both"])
def test_with_rows_another_adapter_is_cast_with_a_weight_that_is_at_hand(tmp_path, change):
    model = by_rows(tiny_llama(layers=1), prepared=False)
    CHANGES[change](model)
    expected = merged_by_peft(model)
    assert set(export(model, tmp_path).cast_from.values()) == {"base weight"}
    assert_one_cast_off(tmp_path, expected)


@each_value(change=CHANGES, pending=["apply", "drop"])
def test_with_rows_another_adapter_than_the_trained_one_is_refused(tmp_path, pending, change):
    """Where the FP8 weight alone holds what was trained."""
    model = by_rows(tiny_llama(), prepared=pending == "apply", pending=pending)
    change(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    match = r"layers\.0\.self_attn\.q_proj: .* Activate the adapter that was trained"
    if (pending, change) == ("drop", another):  # nothing is known of it
        match = "no layer of the model has an FP8 weight"
    with pytest.raises(FalqonError, match=match):
        export(model, tmp_path)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_merged_already_is_not_merged_again(tmp_path):
    model = in_fp8(tiny_llama(), prepared=False)
    expected = merged_by_peft(model)
    model.merge_adapter()
    export(model, tmp_path)
    assert_one_cast_off(tmp_path, expected)


def test_disabled_adapters_are_not_active_ones(tmp_path):
    """PEFT merges what is active, whether it is enabled or not."""
    model = in_fp8(tiny_llama(), prepared=True)
    with model.disable_adapter():
        export(model, tmp_path)
    assert_one_cast_off(tmp_path, merged_by_peft(model))


def test_dora_is_merged_as_peft_merges_it(tmp_path):
    """Prepared: PEFT calls its base layer outside of compiled code, which is in FP8 then alone."""
    model = in_fp8(tiny_llama(use_dora=True), prepared=True)
    expected = merged_by_peft(model)
    assert len(export(model, tmp_path).layers) == 14
    assert_one_cast_off(tmp_path, expected)


def test_what_peft_cannot_merge_is_refused_by_its_layer(tmp_path):
    model = tiny_llama(target_modules=["q_proj"], alora_invocation_tokens=[1])
    falqon_fx.prepare(model, progress=False)
    fill_b(model, 0.1)
    with pytest.raises(FalqonError, match=r"q_proj: PEFT can't merge its adapter \(aLoRA"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "problem"),
    [(float("nan"), "1 of 192 elements of its lora_B hold NaN"), (1e30, "its merged weight")],
)
def test_a_merged_weight_that_fp8_cannot_hold_is_refused_by_its_layer(tmp_path, value, problem):
    model = in_fp8(tiny_llama(), prepared=True)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.lora_B.default.weight[3, 1] = value
    with pytest.raises(FalqonError, match=rf"layers\.1\.mlp\.up_proj: {problem}"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())


# -- frozen layers ---------------------------------------------------------------------------------


@each_value(prepared=PREPARED_OR_NOT, frozen=["fp8", "leave"])
def test_what_ran_in_fp8_without_an_adapter_is_in_fp8(tmp_path, prepared, frozen):
    model = wide_llama()
    plain = copy.deepcopy(model.get_base_model())
    report = export(in_fp8(model, prepared, frozen=frozen), tmp_path)
    adapted = {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"}
    linear = {p for p, m in plain.named_modules() if isinstance(m, nn.Linear)}
    linear = {path.removesuffix(".base_layer") for path in linear if "lora_" not in path}
    others = linear - adapted - {"lm_head"}
    assert len(others) == 10
    wanted = adapted | others if frozen == "fp8" else adapted
    assert set(report.layers) == wanted
    assert set(report.dense) == linear - wanted
    assert report.dense["lm_head"] == "it is an output head"
    source = "FP8 weight" if prepared else "base weight"
    assert {p for p, s in report.cast_from.items() if s == source} == adapted
    found = layers_in(tmp_path)
    for path in others & wanted:
        expected = cast_base(plain.get_submodule(path).weight, SiteSpec.from_config(FalqonConfig()))
        assert torch.equal(found[path].code, expected.code)
        assert torch.equal(found[path].scale, expected.scale)
    # vLLM fuses q, k and v: all or none of them may be in FP8.
    assert any("vLLM" in note for note in report.notes) is (frozen == "leave")


# -- base= -----------------------------------------------------------------------------------------


def test_a_folder_of_other_weights_is_refused(tmp_path):
    model = in_fp8(tiny_llama(), prepared=True)
    torch.manual_seed(1)
    other = transformers.LlamaForCausalLM(model.get_base_model().config)
    other.save_pretrained(tmp_path / "plain")
    with pytest.raises(FalqonError, match=r"q_proj: its FP8 weight was not made from the weight"):
        export(model, tmp_path, base=tmp_path / "plain")
    file = tmp_path / "plain/model.safetensors"
    tensors = safetensors.load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    safetensors.save_file(tensors, file)
    with pytest.raises(FalqonError, match=r"has no tensor 'model\.layers\.0\.self_attn\.q_proj"):
        export(model, tmp_path, base=tmp_path / "plain")
    with pytest.raises(FalqonError, match=r"there is no config\.json in it"):
        export(model, tmp_path, base=tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


# -- pending rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pending", ["hold", "apply", "drop"])
def test_pending_rows_are_written_first_and_the_report_says_how_much_that_changed(
    tmp_path, pending
):
    model = by_rows(tiny_llama(), pending=pending, rounding="nearest")
    fill_b(model, 0.05, seed=2)
    states = sites(model)
    before = {path: state.dequantize() for path, state in states.items()}
    waiting = sum(int(state.pending().any(1).sum()) for state in states.values())
    report = export(model, tmp_path)
    assert report.flushed.rows == waiting > 300
    assert not any(state.pending().any() for state in states.values())
    out = {path: state.applied.shape[0] for path, state in states.items()}
    moved = [(s.dequantize() - before[p])[: out[p]] for p, s in states.items()]
    changed = sum(m.double().square().sum() for m in moved)
    total = sum(before[p][: out[p]].double().square().sum() for p in states)
    assert report.flushed.relative_change == pytest.approx(float((changed / total) ** 0.5))
    assert f"{waiting} pending rows in 14 layers" in str(report)
    assert "pending rows" not in str(export(model, tmp_path / "again"))
