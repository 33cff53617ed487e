"""From falqon to plain models and adapters, and back."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.numerics import E4M3
from falqon_fx.unload import fp8_layers
from tests.models import fill_b, tiny_llama, tiny_mlp
from tests.sites import dequantized
from tests.tolerances import (
    Approx,
    assert_within,
    fp8_cast_bound,
    fp8_stochastic_bound,
    gamma,
    rounded_bound,
)

peft = pytest.importorskip("peft")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def trained(
    model: nn.Module, prepared: bool, steps: int = 4, rate: float = 0.02, **options
) -> nn.Module:
    """The compiled wrapper of a model after some steps."""
    config = FalqonConfig(**{"inner": "eager", "topk": 9, **options})
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    compiled = torch.compile(model, backend="falqon", options={"config": config})
    train(compiled, model, steps, rate)
    return compiled


def train(forward: nn.Module, model: nn.Module, steps: int, rate: float = 0.02) -> list[float]:
    losses = []
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], rate)
    for _ in range(steps):
        loss = forward(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# -- merge_and_unload ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, pytest.param(F16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_merged_weights_are_the_fp8_weights(dtype, prepared):
    """Nothing pending and powers of two as scales: bit for bit, in every dtype.

    16 bits of ``applied`` round what PEFT keeps in float32: that rest is pending, so B drops it.
    """
    model = tiny_llama(dtype)
    trained(model, prepared)
    falqon_fx.flush(model)
    for layer, state in fp8_layers(model.get_base_model()).values():
        layer.lora_b.data.copy_(state.applied)
    expected = {p: s.dequantize() for p, (_, s) in fp8_layers(model.get_base_model()).items()}
    assert len(expected) == 14
    merged = falqon_fx.merge_and_unload(model)
    assert type(merged).__name__ == "LlamaForCausalLM"
    for path, weight in expected.items():
        layer = merged.get_submodule(path)
        assert type(layer) is nn.Linear
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight.float(), weight[: len(layer.weight)])
    assert not any("lora" in name or "code" in name for name, _ in merged.named_parameters())
    assert merged(IDS).logits.isfinite().all()
    assert falqon_fx.adapters(merged) == {}


@pytest.mark.parametrize("scale", ["pow2", "amax"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_pending_rows_are_merged_too(scale, dtype):
    """dq(W) + s·(B - applied)·dq(A): r float32 products and one rounding to the weight's dtype."""
    model = tiny_mlp().to(dtype)
    falqon_fx.prepare(model, FalqonConfig(scale=scale), progress=False)
    fill_b(model, 0.1)
    exact, off = {}, {}
    for path, (_, state) in fp8_layers(model.get_base_model()).items():
        merged, out = dequantized(state), len(state.applied)
        pending = state.scaling * (state.lora_b().double() - state.applied.double())
        assert pending.any()
        exact[path] = merged[:out] + pending @ merged[out:]
        terms = merged[:out].abs() + pending.abs() @ merged[out:].abs()
        off[path] = gamma(state.rank + 5) * terms
    plain = falqon_fx.merge_and_unload(model)
    for path, value in exact.items():
        bound = rounded_bound(value, off[path], dtype)
        Approx(value, bound).assert_holds(plain.get_submodule(path).weight.detach())


def test_merge_is_restore_with_the_adapter_added():
    """Base apart from the adapter, then PEFT's own merge: W - s·applied·Â + s·B·Â, as W + s·(B -
    applied)·Â is in one, where A is the Â that is really used (init="svd").
    """
    model = tiny_mlp()
    falqon_fx.prepare(model, FalqonConfig(init="svd"), progress=False)
    fill_b(model, 0.1)
    falqon_fx.flush(model)
    fill_b(model, 0.1, seed=1)
    off = {}
    for path, (_, state) in fp8_layers(model.get_base_model()).items():
        merged, out = dequantized(state).abs(), len(state.applied)
        added = (state.applied.double().abs() + state.lora_b().double().abs()) * state.scaling
        # Each way: two products of r terms, scaled, and two additions; one of them may be PEFT's.
        off[f"{path}.weight"] = (
            2 * gamma(2 * (state.rank + 3)) * (merged[:out] + added @ merged[out:])
        )
    apart = falqon_fx.restore(copy.deepcopy(model))
    one, other = falqon_fx.merge_and_unload(model), apart.merge_and_unload()
    for name, weight in one.named_parameters():
        assert_within(weight, other.get_parameter(name), off.get(name, 0.0))


def test_other_adapters_and_saved_modules_are_merged_by_peft():
    model = tiny_llama(target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
    fill_b(model, 0.1)
    inner = model.get_base_model()
    with torch.no_grad():
        inner.model.norm.modules_to_save.default.weight.fill_(3.0)
    layer = inner.model.layers[0].self_attn.v_proj
    expected = (layer.base_layer.weight + layer.get_delta_weight("default")).detach()
    falqon_fx.prepare(model, FalqonConfig(exclude=("*v_proj",)), progress=False)
    merged = falqon_fx.merge_and_unload(model)
    assert torch.equal(merged.model.layers[0].self_attn.v_proj.weight, expected)
    assert (merged.model.norm.weight == 3).all()
    assert type(merged.model.norm).__name__ == "LlamaRMSNorm"


def test_what_is_no_peft_model_is_refused():
    with pytest.raises(FalqonError, match="not a PEFT model"):
        falqon_fx.merge_and_unload(nn.Linear(2, 2))


# -- PEFT round trips ------------------------------------------------------------------------------


def plain_base(model: nn.Module) -> nn.Module:
    """The base model as it was before PEFT wrapped it."""
    return copy.deepcopy(model).unload()


def save_adapter(model: nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: no config of a base model to look up
        model.save_pretrained(folder)


def fp8_error(state: falqon_fx.MergedAdapter, base: Tensor) -> Tensor:
    """|dq(W) + s·pending·Â - (base + s·B·Â)|: what the state says of its own error.

    A row that was never written is the cast of the base. For each write (``writes``) comes one
    stochastic rounding, less than a gap of the value it casts, which is at most 448 times the row's
    scale of then: with rows that only grow, the scale of now. Float32 sums of r products each.
    """
    merged, out = dequantized(state), len(state.applied)
    scale = state.scale.double()[:out]
    writes = state.writes.double()[:, None]
    first = fp8_cast_bound(base, scale, E4M3)
    each = fp8_stochastic_bound(448 * scale.expand_as(base), scale, E4M3)
    step = abs(state.scaling) * state.lora_b().double().abs() @ merged[out:].abs()
    return first + writes * each + gamma(state.rank + 8) * (base.double().abs() + step)


@pytest.mark.parametrize("init", ["keep", "svd"])
@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_an_adapter_trained_under_falqon_loads_in_plain_peft(tmp_path, prepared, init):
    """On the original base, with the same A and B; logits differ by the FP8 error of the one
    adapted layer, the head, alone: x·(base + s·B·A)ᵀ against x·(dq(W) + s·(B - applied)·Â)ᵀ.
    """
    model = tiny_llama(target_modules=["lm_head"])
    original = plain_base(model)
    compiled = trained(model, prepared, init=init, topk=3, rate=0.3)
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
        expected = compiled(IDS).logits
        actual = loaded(IDS).logits
    ((layer, state),) = fp8_layers(model.get_base_model()).values()
    base = original.get_submodule("lm_head")
    base = getattr(base, "base_layer", base).weight.detach()
    out = len(base)
    a, used = layer.lora_a.detach().double(), dequantized(state)[out:]
    b = state.lora_b().double()
    x = seen["x"].reshape(-1, base.shape[1]).double()
    exact = x @ (base.double() + state.scaling * b @ used).t()
    weight_off = fp8_error(state, base) + abs(state.scaling) * b.abs() @ (a - used).abs()
    cast = fp8_cast_bound(x, 2 * x.abs().amax(1, keepdim=True) / 448, E4M3)
    largest = (base.double().abs() + weight_off + abs(state.scaling) * b.abs() @ used.abs()).t()
    bound = (x.abs() + cast) @ weight_off.t() + cast @ largest
    bound = bound + 4 * gamma(base.shape[1] + state.rank + 8) * (x.abs() + cast) @ largest
    for result in (expected, actual):
        Approx(exact, bound).assert_holds(result.reshape(exact.shape))
    # The bound says something: the adapter itself is far outside it.
    without = (x @ base.double().t()) - exact
    assert (without.abs() > bound).any()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}, {"init_lora_weights": "olora"}],
    ids=str,
)
@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_an_adapter_trained_elsewhere_goes_on_under_falqon(tmp_path, prepared, options):
    """A and B as they were trained; B is in the FP8 weight at once; training goes on from there."""
    elsewhere = tiny_llama(target_modules=["q_proj", "v_proj"], **options)
    original = plain_base(elsewhere)
    before = train(elsewhere, elsewhere, 8)
    save_adapter(elsewhere, tmp_path)

    model = peft.PeftModel.from_pretrained(original, tmp_path, is_trainable=True).train()
    parameters = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    for name, parameter in elsewhere.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, parameters[name])
    compiled = trained(model, prepared, steps=0, init="svd", topk="all")
    after = train(compiled, model, 8)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert torch.equal(parameter, parameters[name])
        if "lora_B" in name:
            assert not torch.equal(parameter, parameters[name])
    # It starts where the other ended, not where that began, and goes on falling.
    assert abs(after[0] - before[-1]) < 0.2 * (before[0] - before[-1])
    assert after[-1] < after[0]


def test_a_loaded_adapter_is_in_the_fp8_weight_at_once(tmp_path):
    elsewhere = tiny_llama(target_modules=["q_proj"])
    original = plain_base(elsewhere)
    train(elsewhere, elsewhere, 3)
    save_adapter(elsewhere, tmp_path)
    model = peft.PeftModel.from_pretrained(original, tmp_path, is_trainable=True)
    falqon_fx.prepare(model, FalqonConfig(init="svd"), progress=False)
    for layer, state in fp8_layers(model.get_base_model()).values():
        assert torch.equal(state.applied, layer.lora_b)
        assert not state.pending().any()
