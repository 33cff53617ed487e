"""Models that never exist in dense form: `prequantize`, `load`, and FP8 checkpoints of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import (
    FalqonConfig,
    FalqonError,
)
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.rows.prepared import MergedBaseLinear
from tests.folders import BF16, IDS, WIDE, dense_model, folder_of, lora, prequantize
from tests.models import fill_b
from tests.parameters import each_pair, slow

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


ROWS = FalqonConfig(update="rows", init="svd")


@each_pair(
    tied={"untied": False, "tied": True},
    scale=["pow2", "amax"],
    granularity=["row", "tensor"],
    update=["adapter", "rows"],
)
def test_it_is_prepare_bit_for_bit(tmp_path, update, granularity, scale, tied):
    """The same bytes, scales, counters and A as `prepare` makes from the whole model in memory."""
    config = FalqonConfig(update=update, init="svd", granularity=granularity, scale=scale)
    source = folder_of(dense_model(tied), tmp_path / "dense", "20KB")
    report = prequantize(source, tmp_path / "out", config)
    assert report.layers == 14
    assert_is_prepare(tmp_path, config)


@pytest.mark.parametrize("update", ["adapter", "rows"])
@pytest.mark.parametrize("frozen", ["fp8", "leave"])
def test_it_casts_the_layers_without_an_adapter_that_prepare_casts(tmp_path, update, frozen):
    config = FalqonConfig(update=update, init="svd", frozen=frozen)
    source = folder_of(dense_model(**WIDE), tmp_path / "dense")
    targets = ["q_proj", "v_proj"]
    report = prequantize(source, tmp_path / "out", config, target_modules=targets)
    assert report.layers == (14 if frozen == "fp8" else 4)
    loaded = assert_is_prepare(tmp_path, config, target_modules=targets)
    kinds = [type(module) for module in loaded.modules()]
    adapted = Fp8Linear if update == "adapter" else MergedBaseLinear
    assert kinds.count(MergedBaseLinear) == (4 if update == "rows" else 0)
    assert kinds.count(Fp8Linear) == report.layers - kinds.count(MergedBaseLinear)
    assert type(loaded.base_model.model.model.layers[0].self_attn.q_proj.base_layer) is adapted
    assert type(loaded.base_model.model.lm_head) is nn.Linear


def assert_is_prepare(folder: Path, config: FalqonConfig, **options) -> nn.Module:
    """The model loaded from ``out`` is the one from ``dense``, prepared."""
    loaded = falqon_fx.load(folder / "out")
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=BF16)
    expected = peft.get_peft_model(dense, lora(**options))
    falqon_fx.prepare(expected, config, progress=False)
    kinds = dict(expected.named_modules())
    for path, module in loaded.named_modules():
        assert type(module) is type(kinds[path])
        if isinstance(module, Fp8Linear | MergedBaseLinear):
            assert module.extra_repr() == kinds[path].extra_repr()
            assert (module.path, module.dtype) == (kinds[path].path, kinds[path].dtype)
    named = dict(expected.named_parameters())
    assert named.keys() == dict(loaded.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == named[name].dtype
        assert parameter.requires_grad == named[name].requires_grad
        assert torch.equal(parameter, named[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected.eval()(IDS).logits)
    return loaded


def test_a_write_into_a_loaded_weight_names_its_layer(tmp_path):
    prequantize(folder_of(dense_model(), tmp_path / "dense"), tmp_path / "out")
    model = falqon_fx.load(tmp_path / "out")
    with pytest.raises(FalqonError, match="would be lost") as refused:
        model.merge_adapter()
    assert refused.value.site == next(iter(falqon_fx.adapters(model)))


@pytest.mark.parametrize("update", ["adapter", slow("rows")])
def test_the_loaded_model_trains(tmp_path, update):
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out", FalqonConfig(update=update, init="svd"))
    model = falqon_fx.load(tmp_path / "out").train()
    config = FalqonConfig(update=update, inner="eager")
    if update == "rows":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.02)
    losses = []
    for _ in range(6):
        loss = compiled(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        written = update == "rows" and name.endswith((".code", ".writes", ".applied"))
        if parameter.requires_grad or written:
            assert not torch.equal(parameter, before[name]), name
        elif update == "adapter":
            assert torch.equal(parameter, before[name]), name
    # Nothing was written into the files.
    again = dict(falqon_fx.load(tmp_path / "out").named_parameters())
    assert all(torch.equal(again[name], parameter) for name, parameter in before.items())


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_same_files(tmp_path, workers):
    source = folder_of(dense_model(attention_bias=True), tmp_path / "dense")
    prequantize(source, tmp_path / "one")
    prequantize(source, tmp_path / "out", workers=workers)
    one, out = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
                for f in (tmp_path / "one", tmp_path / "out"))  # fmt: skip
    assert one.keys() == out.keys()
    assert all(one[n] == out[n] for n in one if n.suffix == ".safetensors")
    model = falqon_fx.load(tmp_path / "out")
    assert model(IDS).logits.isfinite().all()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias is not None


@pytest.mark.parametrize("config", [None, ROWS], ids=["adapter", "rows"])
def test_a_checkpoint_loads_into_mapped_files_and_leaves_them_as_they_are(tmp_path, config):
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out", config)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    model = falqon_fx.load(tmp_path / "out")
    fill_b(model, 0.1)
    falqon_fx.flush(model)
    falqon_fx.save_checkpoint(model, tmp_path / "trained")
    mapped = falqon_fx.load(tmp_path / "out")
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=BF16)
    expected = dict(model.named_parameters())
    for target in (mapped, peft.get_peft_model(dense, lora())):
        falqon_fx.load_checkpoint(target, tmp_path / "trained")
        assert dict(target.named_parameters()).keys() == expected.keys()
        for name, parameter in target.named_parameters():
            assert torch.equal(parameter, expected[name]), name
    assert all(path.read_bytes() == whole for path, whole in files.items())


def test_layers_left_out_stay_dense(tmp_path):
    dense = dense_model()
    source = folder_of(dense, tmp_path / "dense")
    report = prequantize(source, tmp_path / "out", FalqonConfig(exclude=("*mlp*",)))
    assert report.layers == 8
    model = falqon_fx.load(tmp_path / "out")
    up = model.base_model.model.model.layers[1].mlp.up_proj
    assert type(up.base_layer) is nn.Linear
    assert torch.equal(up.base_layer.weight, dense.model.layers[1].mlp.up_proj.weight)
    assert up.lora_A.default.weight.any()
    assert not up.lora_B.default.weight.any()


def test_adapters_outside_of_the_files_start_as_peft_starts_them(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out", target_modules=["q_proj", "embed_tokens"])
    inner = falqon_fx.load(tmp_path / "out").base_model.model.model
    assert not inner.embed_tokens.lora_embedding_A.default.any()
    assert 0.8 < inner.embed_tokens.lora_embedding_B.default.std() < 1.2  # normal, of 128 numbers
    assert inner.embed_tokens.lora_embedding_B.default.requires_grad
    assert not inner.layers[0].self_attn.q_proj.lora_B.default.weight.any()


def test_no_two_adapters_start_alike(tmp_path):
    """Layers of one width, which share a seed, have rows of their own."""
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out", FalqonConfig(), target_modules=["q_proj", "v_proj"])
    inner = falqon_fx.load(tmp_path / "out").base_model.model.model
    layers = [getattr(b.self_attn, n) for b in inner.layers for n in ("q_proj", "v_proj")]
    starts = torch.stack([layer.lora_A.default.weight.detach().flatten() for layer in layers])
    assert len(starts.unique(dim=0)) == 4


def test_no_dense_weight_is_made_while_loading(tmp_path):
    """The FP8 parameters are the mapped files themselves."""
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out")
    model = falqon_fx.load(tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert len(layers) == 14
    for layer in layers:
        for tensor in (layer.code, layer.scale, layer.digest):
            assert not tensor.untyped_storage().resizable()  # memory that torch did not allocate
