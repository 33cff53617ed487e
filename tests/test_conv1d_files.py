"""GPT-2's Conv1D, whose weight is [in, out], through every kind of file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.unload import fp8_layers
from tests.models import fill_b, lora_b
from tests.sites import same, snapshot

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)


def base() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4, use_cache=False,
        attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_training_resumes(tmp_path, prepared):
    config = FalqonConfig(inner="eager", topk=5)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = peft.get_peft_model(base(), lora())
        if prepared and not runs:
            falqon_fx.prepare(model, config, progress=False)
        compiled = torch.compile(model, backend="falqon", options={"config": config})
        runs.append((model, compiled, torch.optim.SGD(lora_b(model), 1.0, momentum=0.9)))

    def steps(run, count):
        _, compiled, optimizer = run
        for _ in range(count):
            compiled(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(runs[0], 2)
    falqon_fx.save_checkpoint(runs[0][0], tmp_path, optimizer=runs[0][2])
    falqon_fx.load_checkpoint(runs[1][0], tmp_path, optimizer=runs[1][2])
    for run in runs:
        steps(run, 2)
    one, other = (falqon_fx.adapters(run[0]) for run in runs)
    assert len(one) == 2
    assert all(same(snapshot(one[path]), snapshot(other[path])) for path in one)
    assert all(state.writes.any() for state in one.values())


def test_prequantize_is_prepare(tmp_path):
    base().save_pretrained(tmp_path / "dense")
    config = FalqonConfig(init="svd")
    falqon_fx.prequantize(tmp_path / "dense", tmp_path / "out", lora(), config, progress=False)
    loaded = falqon_fx.load(tmp_path / "out")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    expected = peft.get_peft_model(dense, lora())
    falqon_fx.prepare(expected, config, progress=False)
    one, other = falqon_fx.adapters(loaded), falqon_fx.adapters(expected)
    assert len(one) == 2
    assert all(same(snapshot(one[path]), snapshot(other[path])) for path in one)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected.eval()(IDS).logits)


def test_merged_weights_are_in_their_own_layout():
    model = peft.get_peft_model(base(), lora())
    fill_b(model, 0.1)
    falqon_fx.prepare(model, progress=False)
    expected = {p: s.dequantize() for p, (_, s) in fp8_layers(model.get_base_model()).items()}
    assert len(expected) == 2
    merged = falqon_fx.merge_and_unload(model)
    for path, weight in expected.items():
        layer = merged.get_submodule(path)
        assert type(layer).__name__ == "Conv1D"
        assert torch.equal(layer.weight, weight[: layer.nf].t())
    assert merged(IDS).logits.isfinite().all()


def test_they_are_exported_dense_or_refused(tmp_path):
    """compressed-tensors knows nn.Linear alone."""
    model = peft.get_peft_model(base(), lora())
    falqon_fx.prepare(model, progress=False)
    with pytest.raises(FalqonError, match="have no FP8 form"):
        falqon_fx.save_fp8(model, tmp_path / "out", progress=False)
