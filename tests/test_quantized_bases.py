"""Models whose weights others have quantized: left exactly as they are, and named."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from tests.models import Net, fill_b
from tests.parameters import slow
from tests.sites import randn

BF16 = torch.bfloat16
PATH = "base_model.model."


def in_four_bits(linear: nn.Linear, storage: torch.dtype = torch.uint8) -> nn.Module:
    """NF4 with its scales in eight bits, as QLoRA has it; ``storage`` is the dtype that codes are
    kept in, for FSDP a floating one.
    """
    bnb = pytest.importorskip("bitsandbytes")
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    how: dict[str, Any] = {"quant_type": "nf4", "quant_storage": storage}
    layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, **how)
    layer.weight = bnb.nn.Params4bit(linear.weight.detach(), module=layer, **how)
    layer.bias = linear.bias
    return layer.to("cpu")  # which quantizes


def in_eight_bits(linear: nn.Linear) -> nn.Module:
    """LLM.int8()."""
    bnb = pytest.importorskip("bitsandbytes")
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    how: dict[str, Any] = {"requires_grad": False, "has_fp16_weights": False}
    layer.weight = bnb.nn.Int8Params(linear.weight.detach(), **how)
    layer.bias = linear.bias
    return layer.to("cpu")


def by_torchao(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(linear, quantization.Float8WeightOnlyConfig())
    return linear


KINDS = {
    "NF4": (in_four_bits, "Params4bit"),
    "NF4 kept as bfloat16": (lambda linear: in_four_bits(linear, BF16), "Params4bit"),
    "INT8": (in_eight_bits, "Int8Params"),
    "torchao": (by_torchao, "Float8Tensor"),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def quantized(kind: str, *names: str) -> nn.Module:
    """PEFT's LoRA on `up` and `down` of a `Net` with the layers called ``names`` quantized."""
    torch.manual_seed(0)
    model: Any = Net().requires_grad_(False)
    for name in names:
        model.set_submodule(name, KINDS[kind][0](model.get_submodule(name)))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "NF4" in kind, kind == "INT8"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up", "down"]))
    fill_b(adapted, 0.1)
    return adapted


ALL = "up", "plain", "down"


@EACH
def test_explain_names_them(kind):
    model, x = quantized(kind, *ALL), randn(3, 64)
    expected, weights = model(x), [*model.parameters()]
    report = falqon_fx.explain(model, x)
    assert not report.sites
    assert [item.site for item in report.rejected] == [f"{PATH}up", f"{PATH}down"]
    assert [item.site for item in report.left] == [f"{PATH}plain"]
    for item in (*report.rejected, *report.left):
        assert "already quantized" in item.reason
        assert "base_dtype" in item.remedy
    shown = str(report), report.to_html()
    assert all("already" in text and "nvfp4" in text for text in shown)
    if kind != "torchao":  # which fake tensors can stand for
        assert any(KINDS[kind][1] in note for note in report.notes)
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["NF4", "INT8"])
def test_explain_names_the_sites_between_them(kind):
    model = quantized(kind, "up")
    report = falqon_fx.explain(model, randn(3, 64))
    assert {site.path for site in report.sites} == {f"{PATH}down", f"{PATH}plain"}
    assert [item.site for item in report.rejected] == [f"{PATH}up"]


def test_explain_takes_a_forward_of_the_users_own_back():
    """accelerate's hooks put one on a layer."""
    model: Any = quantized("NF4", "up")
    layer = model.base_model.model.up.base_layer
    layer.forward = mine = layer.forward
    falqon_fx.explain(model, randn(3, 64))
    assert layer.forward is mine
    with pytest.raises(RuntimeError):
        falqon_fx.explain(model, randn(3, 5))
    assert layer.forward is mine


def test_explain_refuses_such_a_weight_in_another_layer():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Embedding4bit(50, 64), nn.Linear(64, 64)).to("cpu")
    with pytest.raises(FalqonError, match=r"0\.weight: it is a Params4bit") as error:
        falqon_fx.explain(model, torch.zeros(2, 3, dtype=torch.int64))
    assert "Compile the model" in error.value.remedy


def step(model: nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    """The output, and A and B after two steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        out = call(x)
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [out.detach(), *(p.detach() for p in trained)]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", slow("inductor")])
@pytest.mark.parametrize("kind", ["NF4", "INT8"])
def test_training_is_bit_for_bit_that_of_another_backend(kind, inner):
    x, results = randn(5, 64), []
    for backend, options in ((inner, None), ("falqon", {"inner": inner})):
        torch._dynamo.reset()
        model = quantized(kind, *ALL)
        results.append(step(model, torch.compile(model, backend=backend, options=options), x))
    assert len(results[0]) == 5
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", ["NF4", "INT8"])
def test_the_backend_warns_of_them(kind):
    model = quantized(kind, *ALL)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="up: its base weight is already quantized") as seen:
        torch.compile(model, backend="falqon", options={"inner": "eager"})(randn(5, 64))
    assert any("nvfp4" in str(warning.message) for warning in seen)
    assert not falqon_fx.adapters(model)


@EACH
def test_prepare_leaves_them(kind):
    model: Any = quantized(kind, "up", "down")
    layers = [model.base_model.model.get_submodule(name).base_layer for name in ("up", "down")]
    weights = [layer.weight for layer in layers]
    x = randn(3, 64)
    outputs = [layer(x) for layer in layers]
    report = falqon_fx.prepare(model, progress=False)
    assert report.prepared == (f"{PATH}plain",)
    assert list(report.skipped) == [f"{PATH}up", f"{PATH}down"]
    assert all(layer.weight is weight for layer, weight in zip(layers, weights, strict=True))
    assert all(torch.equal(layer(x), out) for layer, out in zip(layers, outputs, strict=True))
    torch._dynamo.reset()
    out, *trained = step(
        model, torch.compile(model, backend="falqon", options={"inner": "eager"}), x
    )
    assert out.isfinite().all()
    assert len(trained) == 4


@EACH
@pytest.mark.parametrize("frozen", ["fp8", "leave"])
def test_prepare_names_those_without_an_adapter(kind, frozen):
    report = falqon_fx.prepare(
        quantized(kind, "plain"), FalqonConfig(frozen=frozen), progress=False
    )
    assert report.prepared == (f"{PATH}up", f"{PATH}down")
    assert list(report.skipped) == [f"{PATH}plain"] * (frozen == "fp8")
