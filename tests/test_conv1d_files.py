"""GPT-2's Conv1D, whose weight is [in, out], through every kind of file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.rows.prepared import MergedBaseLinear
from falqon_fx.site.base import cast_base
from falqon_fx.site.spec import SiteSpec
from tests.models import fill_b, freeze_a
from tests.parameters import PREPARED_OR_NOT, each_value

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

IDS = torch.arange(12).view(2, 6)


UPDATES = pytest.mark.parametrize("update", ["adapter", "rows"])


def lora() -> Any:
    return peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)


def base() -> nn.Module:
    """Its two layers named c_proj have no adapter, and are large enough to run in FP8."""
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=4, use_cache=False,
        attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def adapted(update: str) -> nn.Module:
    """With update="rows" A is frozen."""
    model = peft.get_peft_model(base(), lora())
    return freeze_a(model) if update == "rows" else model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    named = dict(other.named_parameters())
    assert dict(one.named_parameters()).keys() == named.keys()
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter.nan_to_num(), named[name].nan_to_num()), name


@each_value(update=["adapter", "rows"], prepared=PREPARED_OR_NOT)
def test_training_resumes(tmp_path, update, prepared):
    rows = {"topk": 5} if update == "rows" else {}
    config = FalqonConfig(update=update, inner="eager", **rows)
    runs: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        model = adapted(update)
        if prepared and not runs:
            falqon_fx.prepare(model, config, progress=False)
        compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
        trained = [p for p in model.parameters() if p.requires_grad]
        runs.append((model, compiled, torch.optim.SGD(trained, 1.0, momentum=0.9)))

    def steps(run, count):
        _, compiled, optimizer = run
        for _ in range(count):
            compiled(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(runs[0], 2)
    falqon_fx.save_checkpoint(runs[0][0], tmp_path, optimizer=runs[0][2])
    before = [p.clone() for p in runs[1][0].parameters()]
    falqon_fx.load_checkpoint(runs[1][0], tmp_path, optimizer=runs[1][2])
    for run in runs:
        steps(run, 2)
    assert_same(runs[0][0], runs[1][0])
    if not prepared:
        assert any(not torch.equal(*pair) for pair in zip(before, runs[1][0].parameters()))
    one, other = (falqon_fx.adapters(run[0]) for run in runs)
    assert len(one) == 2
    for path, site in one.items():
        assert torch.equal(site.weight.view(torch.uint8), other[path].weight.view(torch.uint8))
        assert update == "adapter" or site.writes.any()


@UPDATES
def test_prequantize_is_prepare(tmp_path, update):
    base().save_pretrained(tmp_path / "dense")
    config = FalqonConfig(update=update, init="svd")
    falqon_fx.prequantize(tmp_path / "dense", tmp_path / "out", lora(), config, progress=False)
    loaded = falqon_fx.load(tmp_path / "out")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    expected = peft.get_peft_model(dense, lora())
    falqon_fx.prepare(expected, config, progress=False)
    assert_same(loaded, expected)
    kinds = [type(module) for module in loaded.modules()]
    frozen = 2 if update == "rows" else 4
    assert (kinds.count(Fp8Linear), kinds.count(MergedBaseLinear)) == (frozen, 4 - frozen)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected.eval()(IDS).logits)


@UPDATES
def test_they_are_exported_dense_or_refused(tmp_path, update):
    """compressed-tensors knows nn.Linear alone."""
    model = adapted(update)
    falqon_fx.prepare(model, FalqonConfig(update=update), progress=False)
    with pytest.raises(FalqonError, match="have no FP8 form"):
        falqon_fx.save_fp8(model, tmp_path / "out", progress=False)


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
@UPDATES
def test_beside_a_linear_layer_they_are_exported_dense(tmp_path, update, prepared):
    """Merged in their own layout: from the base weight where it is there, else from FP8 bytes."""
    config = FalqonConfig(
        update=update, inner="eager", **({"topk": "all"} if update == "rows" else {})
    )
    targets = ["c_attn", "lm_head"]
    torch.manual_seed(0)
    model = base()
    model.lm_head.weight = nn.Parameter(torch.randn(64, 64))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    plain = model.get_base_model().transformer.h[0]
    weights = {
        n: plain.get_submodule(n).weight.detach().clone() for n in ("attn.c_proj", "mlp.c_fc")
    }
    fill_b(model, 0.1)
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    else:
        torch.compile(freeze_a(model), backend="falqon", options=dict[str, Any](config=config))(IDS)
    sites = falqon_fx.adapters(model)
    assert len(sites) == 2
    report = falqon_fx.save_fp8(model, tmp_path / "out", progress=False)
    assert report.layers == ("lm_head",)
    assert len([p for p, reason in report.dense.items() if reason.startswith("Conv1D")]) == 4
    tensors = safetensors.load_file(tmp_path / "out/model.safetensors")
    path = "transformer.h.0.attn.c_attn"
    layer, site = model.get_base_model().get_submodule(path), sites[f"base_model.model.{path}"]
    if update == "rows":
        expected = site.dequantize()[: len(site.applied)]
    else:
        a, b = (part.default.weight.detach() for part in (layer.lora_A, layer.lora_B))
        whole = site.base() if prepared else layer.base_layer.weight.detach().t()
        expected = whole + (b @ a) * layer.scaling["default"]
    assert torch.equal(tensors[f"{path}.weight"], expected.t())
    assert torch.equal(tensors[f"{path}.bias"], layer.base_layer.bias)
    for name, weight in weights.items():
        spec = SiteSpec.from_config(config)
        cast = cast_base(weight.t(), spec).dequantize().t()
        found = tensors[f"transformer.h.0.{name}.weight"]
        assert torch.equal(found, cast if prepared else weight)
