"""From falqon to plain models and adapters, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.rows.unload import fp8_layers
from falqon_fx.site.numerics import E4M3
from tests.models import fill_b, freeze_a, tiny_llama, tiny_mlp
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.sites import dequantized, randn
from tests.tolerances import (
    Approx,
    assert_within,
    fp8_cast_bound,
    gamma,
    rounded_bound,
)
from tests.unloading import IDS, compiled, train

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

SITES = ["base_model.model.0", "base_model.model.2"]
PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
UPDATES = pytest.mark.parametrize("update", ["adapter", "rows"])


def cast_off(weight: Tensor) -> Tensor:
    """One cast with one scale per row, a power of two and so below 2·amax/448."""
    return fp8_cast_bound(weight, 2 * weight.abs().amax(1, keepdim=True) / 448, E4M3)


# -- merge_and_unload ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, pytest.param(F16, marks=pytest.mark.slow)])
def test_a_prepared_model_merges_as_peft_does_on_its_fp8_base(dtype):
    """All linear layers become plain, in the dtype that they had."""
    model = tiny_llama(dtype, layers=1)
    train(compiled(model, prepared=True), model, 3)
    restored = falqon_fx.restore(copy.deepcopy(model))
    merged, expected = falqon_fx.merge_and_unload(model), restored.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM"
    linears = {name: m for name, m in merged.named_modules() if type(m) is nn.Linear}
    assert len(linears) == 8
    assert all(layer.weight.dtype == dtype for layer in linears.values())
    for (name, weight), (other, wanted) in zip(
        merged.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(weight, wanted), name
    assert not any("lora" in name or "code" in name for name, _ in merged.named_parameters())
    assert falqon_fx.adapters(merged) == {}


def test_an_unprepared_model_merges_as_peft_does():
    """Its base weights are still there: FP8 has no part in it."""
    model = tiny_llama(layers=1)
    train(compiled(model, prepared=False), model, 3)
    expected = copy.deepcopy(model).merge_and_unload()
    merged = falqon_fx.merge_and_unload(model)
    assert all(map(torch.equal, merged.parameters(), expected.parameters()))


def nothing(model: nn.Module) -> None:
    """The adapter as it is."""


def scale(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)


def set_scale(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


def load_in_place(model: nn.Module) -> None:
    """Another adapter into the same parameters."""
    peft.set_peft_model_state_dict(
        model, {n: p + 0.1 for n, p in peft.get_peft_model_state_dict(model).items()}
    )


def add(model: nn.Module, rank: int = 4) -> None:
    config = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=["0", "2"])
    generator = torch.Generator().manual_seed(5)
    model.add_adapter("other", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def set_other(model: nn.Module) -> None:
    add(model)
    model.set_adapter("other")


def set_other_rank(model: nn.Module) -> None:
    add(model, rank=3)
    model.set_adapter("other")


def set_both(model: nn.Module) -> None:
    add(model, rank=3)
    model.base_model.set_adapter(["default", "other"])


def disable(model: nn.Module) -> None:
    model.base_model.disable_adapter_layers()


ACTS: list[Callable[[nn.Module], None]] = [
    nothing,
    scale,
    set_scale,
    load_in_place,
    set_other,
    set_other_rank,
    set_both,
    disable,
]


def added(model: nn.Module, path: str) -> tuple[Any, Any]:
    """Σ s·|B|·|A| of the active adapters of a layer, and what a cast of each A moves of it."""
    layer = model.get_submodule(path)
    total: Any = 0.0
    off: Any = 0.0
    for name in layer.active_adapters:
        a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach().double()
        total = total + layer.scaling[name] * b.abs() @ a.double().abs()
        off = off + layer.scaling[name] * b.abs() @ cast_off(a)
    return total, off


@each_value(act=ACTS, prepared=PREPARED_OR_NOT, update=["adapter", "rows"])
def test_the_adapters_that_are_active_now_are_merged(act, prepared, update):
    """As PEFT merges them, within the cast of the base, and float32 sums of at most 4 + 3 products
    and a few scalings. With update="rows" the base was cast together with the adapter of that time,
    s·B·Â, and that is taken off again.
    """
    model = tiny_mlp()
    fill_b(model, 0.1)
    plain = copy.deepcopy(model)
    call, x = compiled(model, prepared, update=update), randn(5, 32)
    call(x)
    first = {path: added(plain, path) for path in SITES}
    act(model)
    act(plain)
    if act is disable:
        call(x)  # a graph of the base alone
    off = {}
    for path in SITES:
        weight = plain.get_submodule(path).base_layer.weight.detach()
        (before, cast_a), (now, _) = first[path], added(plain, path)
        cast = cast_off(weight)
        if update == "rows":
            cast = cast_a + cast_off(weight.double().abs() + before)
        sums = gamma(16) * (weight.double().abs() + before + now)
        off[f"{path.removeprefix('base_model.model.')}.weight"] = cast + 2 * sums
    merged: Any = falqon_fx.merge_and_unload(model)
    expected = plain.merge_and_unload()
    assert [type(m) for m in merged] == [nn.Linear, nn.ReLU, nn.Linear]
    for name, weight in merged.named_parameters():
        if not prepared and update == "adapter":
            assert torch.equal(weight, expected.get_parameter(name))
        assert_within(weight, expected.get_parameter(name), off.get(name, 0.0))


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


@PREPARED
def test_adapters_that_a_model_was_given_itself_are_merged(prepared, tmp_path):
    """As `add_adapter` of transformers and diffusers does it."""
    wrapped = tiny_llama(layers=1, modules_to_save=["norm"])
    (lora,) = wrapped.peft_config.values()
    fill_b(wrapped, 0.1)
    adapter = peft.get_peft_model_state_dict(wrapped)
    model = copy.deepcopy(wrapped).unload()
    peft.inject_adapter_in_model(lora, model)
    model._hf_peft_config_loaded = True  # theirs: that save_pretrained is to save an adapter
    peft.set_peft_model_state_dict(
        model, {name.removeprefix("base_model.model."): value for name, value in adapter.items()}
    )
    if prepared:
        falqon_fx.prepare(model, progress=False)
        falqon_fx.prepare(wrapped, progress=False)
    model.compile(backend="falqon", options={"inner": "eager"})
    merged, expected = falqon_fx.merge_and_unload(model), falqon_fx.merge_and_unload(wrapped)
    assert merged is model
    assert torch.equal(merged(IDS).logits, expected(IDS).logits)  # not in FP8
    merged.save_pretrained(tmp_path)
    saved = type(merged).from_pretrained(tmp_path).state_dict()
    assert saved.keys() == expected.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.state_dict().items())


def test_what_is_no_peft_model_is_refused():
    with pytest.raises(FalqonError, match="not a PEFT model"):
        falqon_fx.merge_and_unload(nn.Linear(2, 2))


@UPDATES
@PREPARED
def test_a_lora_bias_without_a_place_is_refused_and_nothing_changed(prepared, update):
    base = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32, bias=False))
    with pytest.warns(UserWarning, match="has no bias"):  # PEFT's own
        model = peft.get_peft_model(
            base, peft.LoraConfig(r=4, target_modules=["0", "2"], lora_bias=True)
        )
    compiled(model, prepared, update=update)(randn(5, 32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FalqonError, match="its lora_B has a bias and its base layer none") as no:
        falqon_fx.merge_and_unload(model)
    assert no.value.site == "2"
    assert "a bias of zeros" in no.value.remedy
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# -- update="rows" ---------------------------------------------------------------------------------


@each_value(dtype={"float32": F32, "bfloat16": BF16}, prepared=PREPARED_OR_NOT)
def test_with_update_rows_merged_weights_are_the_fp8_weights(dtype, prepared):
    """Nothing pending and powers of two as scales: bit for bit, in every dtype.

    16 bits of ``applied`` round what PEFT keeps in float32: that rest is pending, so B drops it.
    """
    model = tiny_llama(dtype, layers=1)
    train(compiled(model, prepared, update="rows", topk=9), model, 4)
    falqon_fx.flush(model)
    for layer, state in fp8_layers(model.get_base_model()).values():
        layer.lora_b.data.copy_(state.applied)
    expected = {p: s.dequantize() for p, (_, s) in fp8_layers(model.get_base_model()).items()}
    assert len(expected) == 7
    merged = falqon_fx.merge_and_unload(model)
    for path, weight in expected.items():
        plain = merged.get_submodule(path)
        assert type(plain) is nn.Linear
        assert plain.weight.dtype == dtype
        assert torch.equal(plain.weight.float(), weight[: len(plain.weight)])
    assert merged(IDS).logits.isfinite().all()
    assert falqon_fx.adapters(merged) == {}


@pytest.mark.parametrize("scale", ["pow2", "amax"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_pending_rows_are_merged_too(scale, dtype):
    """dq(W) + s·(B - applied)·dq(A): r float32 products and one rounding to the weight's dtype."""
    model = freeze_a(tiny_mlp().to(dtype))
    falqon_fx.prepare(model, FalqonConfig(update="rows", scale=scale), progress=False)
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


@pytest.mark.parametrize("act", [scale, load_in_place, set_other, set_both])
def test_what_pending_drop_has_in_its_fp8_weight_alone_is_not_merged_with_another_adapter(act):
    """lora_B was zeroed, so that nothing else knows of it."""
    model = tiny_mlp()
    call = compiled(model, True, update="rows", pending="drop", topk="all")
    call(randn(5, 32))
    fill_b(model, 0.1)
    call(randn(5, 32))
    act(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FalqonError) as caught:
        falqon_fx.merge_and_unload(model)
    assert caught.value.site == "0"
    assert "Activate the adapter that was trained" in caught.value.remedy
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
