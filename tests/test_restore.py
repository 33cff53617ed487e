"""What undoes `prepare`, and what reads its layers: `restore`, `adapters`, `flush`."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.site.numerics import E4M3
from tests.models import Relu, fill_b, freeze_a, lora_b, tiny_mlp
from tests.sites import dequantized, randn
from tests.test_prepare import (
    BF16,
    F16,
    F32,
    GRANULARITY,
    ROWS,
    SCALE,
    SITES,
    UPDATES,
    base_off,
    parameters,
    prepared_mlp,
    smollm_layer,
    unchanged,
)
from tests.tolerances import (
    Approx,
    assert_within,
    fp8_cast_bound,
    fp8_stochastic_bound,
    gamma,
    rounded_bound,
)

# -- restore ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@GRANULARITY
@SCALE
def test_restore_gives_plain_base_weights(dtype, granularity, scale):
    """dq(W), rounded to the base's dtype: the product of code and scale rounds to
    float32 before.
    """
    model = nn.Sequential(nn.Linear(32, 48, dtype=dtype))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    fill_b(model, 0.1)
    layer = model.base_model.model[0]
    bias, b, original = layer.base_layer.bias, lora_b(model)[0], layer.base_layer.weight.detach()
    config = FalqonConfig(granularity=granularity, scale=scale)
    falqon_fx.prepare(model, config, progress=False)
    (state,) = falqon_fx.adapters(model).values()
    fill_b(model, 0.05, seed=1)
    falqon_fx.restore(model)
    assert type(layer.base_layer) is nn.Linear
    weight = layer.base_layer.weight
    assert (weight.dtype, weight.requires_grad) == (dtype, False)
    assert layer.base_layer.bias is bias
    assert lora_b(model)[0] is b
    assert torch.equal(weight, (state.weight.float() * state.scale).to(dtype))
    off = fp8_cast_bound(original, state.scale, E4M3)
    assert_within(weight, original, rounded_bound(original, off, dtype))
    assert not falqon_fx.adapters(model)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_restore_with_update_rows_takes_the_adapter_out(dtype):
    """base := dq(W) - s·applied·dq(A), rounded to the base dtype, after B moved and was written."""
    model = nn.Sequential(nn.Linear(32, 48, dtype=dtype))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    fill_b(model, 0.1)
    layer = model.base_model.model[0]
    original = layer.base_layer.weight.detach()
    falqon_fx.prepare(freeze_a(model), FalqonConfig(update="rows", topk="all"), progress=False)
    start = next(iter(falqon_fx.adapters(model).values()))
    first = base_off(start, original)
    fill_b(model, 0.05, seed=1)
    falqon_fx.flush(model)
    (state,) = falqon_fx.adapters(model).values()
    merged = dequantized(state)
    adapter = state.scaling * state.applied.double()
    exact = merged[:48] - adapter @ merged[48:]
    off = gamma(state.rank + 4) * (merged[:48].abs() + adapter.abs() @ merged[48:].abs())
    falqon_fx.restore(model)
    assert type(layer.base_layer) is nn.Linear
    weight = layer.base_layer.weight
    assert (weight.dtype, weight.requires_grad) == (dtype, False)
    Approx(exact, rounded_bound(exact, off, dtype)).assert_holds(weight.detach())
    # One cast at the start, one stochastic write (less than a gap: |x|/8 or a subnormal's).
    scale = state.scale.double().expand(52, 1)[:48]
    write = fp8_stochastic_bound(merged[:48], scale, E4M3)
    total = rounded_bound(original, first + write + 2 * off, dtype)
    Approx(original.double(), total).assert_holds(weight.detach())


@UPDATES
def test_restore_keeps_the_result_and_the_adapter_apart(config):
    model = prepared_mlp(config)
    x = randn(3, 32)
    before = model(x)
    with model.disable_adapter():
        base_before = model(x)
    assert falqon_fx.restore(model) is model
    assert torch.equal(model(x), before)
    with model.disable_adapter():
        assert torch.equal(model(x), base_before)


def test_restore_leaves_unprepared_layers_alone_and_a_second_cast_changes_nothing():
    """What lies on the FP8 grid once stays where it is: also at the scale of its own amax, which
    may be one power of two smaller.
    """
    model = tiny_mlp()
    weights = parameters(model)
    falqon_fx.restore(model)
    assert unchanged(model, weights)
    falqon_fx.prepare(model, progress=False)
    once = [state.base() for state in falqon_fx.adapters(model).values()]
    falqon_fx.restore(model)
    report = falqon_fx.prepare(model, progress=False)
    assert list(report.prepared) == SITES
    twice = [state.base() for state in falqon_fx.adapters(model).values()]
    assert all(map(torch.equal, once, twice))


def test_restore_gives_frozen_layers_without_an_adapter_too():
    model = smollm_layer()
    before = {n: m.weight.detach() for n, m in model.named_modules() if type(m) is nn.Linear}
    report = falqon_fx.prepare(model, progress=False)
    falqon_fx.restore(model)
    for path in report.frozen:
        layer = model.get_submodule(path)
        assert type(layer) is nn.Linear
        weight = layer.weight.detach()
        assert (weight.dtype, weight.requires_grad) == (BF16, False)
        amax = before[path].double().abs().amax(1, keepdim=True)
        off = fp8_cast_bound(before[path], 2 * amax / 448, E4M3)  # a power of two is below that
        assert_within(weight, before[path], off)


# -- adapters and flush ----------------------------------------------------------------------------


def test_adapters_takes_the_module_or_its_compiled_wrapper():
    model = prepared_mlp()
    compiled = torch.compile(model, backend="falqon", options={"inner": "eager"})
    assert list(falqon_fx.adapters(model)) == list(falqon_fx.adapters(compiled)) == SITES
    state = falqon_fx.adapters(model)[SITES[0]]
    assert (state.weight.shape, state.weight.dtype) == ((48, 32), E4M3)
    assert (state.scale.shape, state.scale.dtype) == ((48, 1), F32)
    layer = model.get_submodule(SITES[0])
    ((a, b, scaling),) = state.adapters
    assert (a is layer.lora_A.default.weight, b is layer.lora_B.default.weight) == (True, True)
    assert scaling == layer.scaling["default"]


def test_merged_is_the_base_with_the_active_adapters_added():
    """In float32, in the order of the adapters: r products, the scaling and the sum round."""
    model = tiny_mlp()
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"]))
    fill_b(model, 0.1)
    falqon_fx.prepare(model, progress=False)
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        for path, state in falqon_fx.adapters(model).items():
            layer, exact = model.get_submodule(path), state.base().double()
            assert [s for _, _, s in state.adapters] == [layer.scaling[n] for n in names]
            largest = exact.abs()
            for name in names:
                a, b = (getattr(layer, p)[name].weight.detach().double() for p in PARTS)
                exact = exact + layer.scaling[name] * b @ a
                largest = largest + layer.scaling[name] * b.abs() @ a.abs()
            assert_within(state.merged(), exact, gamma(4 + 2 + len(names)) * largest)


PARTS = ("lora_A", "lora_B")


@UPDATES
def test_adapters_of_an_unprepared_model_appear_with_the_first_call(config):
    model = freeze_a(tiny_mlp())
    assert falqon_fx.adapters(model) == {}
    options = {"inner": "eager", "update": config.update}
    compiled = torch.compile(model, backend="falqon", options=options)
    compiled(randn(3, 32))
    assert sorted(falqon_fx.adapters(compiled)) == SITES
    if config.update == "rows":
        falqon_fx.restore(compiled)
        assert falqon_fx.adapters(model) == {}


def test_adapters_of_layers_that_are_not_pefts_follow_the_scaling_of_the_last_call():
    model, x = Relu(), randn(3, 32)
    compiled = torch.compile(model, backend="falqon", options={"inner": "eager"})
    for scaling in (2.0, 3.0, 2.0):  # the last time a graph is found again
        model.up.scaling = scaling
        compiled(x)
        found = falqon_fx.adapters(model)
        assert list(found) == ["up", "down"]
        for path, state in found.items():
            layer = model.get_submodule(path)
            ((a, b, s),) = state.adapters
            assert (a is layer.lora_A.weight, b is layer.lora_B.weight) == (True, True)
            assert s == layer.scaling


@pytest.mark.parametrize("init", ["keep", "svd"])
def test_parameters_that_share_one_flat_buffer_are_told_apart(init):
    """As optimizers that flatten them leave them: views of one memory."""
    model, x = Relu(), randn(3, 32)
    apart = copy.deepcopy(model)
    for part in ("base_layer", "lora_A", "lora_B"):
        mine = [p for name, p in model.named_parameters() if part in name]
        flat = torch.cat([p.detach().flatten() for p in mine])
        for parameter, view in zip(mine, flat.split([p.numel() for p in mine]), strict=True):
            parameter.data = view.view(parameter.shape)
    results = []
    for each in (model, apart):
        options = {"inner": "eager", "init": init}
        results.append(torch.compile(each, backend="falqon", options=options)(x))
    assert torch.equal(*results)
    found, wanted = falqon_fx.adapters(model), falqon_fx.adapters(apart)
    assert list(found) == list(wanted) == ["up", "down"]
    for path, state in found.items():
        assert torch.equal(state.base(), wanted[path].base())
        assert torch.equal(state.merged(), wanted[path].merged())
        assert state.adapters[0][0] is model.get_submodule(path).lora_A.weight
        assert torch.equal(state.adapters[0][0], apart.get_submodule(path).lora_A.weight)
    report = falqon_fx.prepare(model, progress=False)  # they are not tied either
    assert list(report.prepared) == ["up.base_layer", "down.base_layer"]
    assert torch.equal(torch.compile(model, backend="falqon", options=options)(x), results[0])


def test_adapters_are_live_and_their_base_is_constant():
    model = prepared_mlp()
    compiled = torch.compile(model, backend="falqon", options={"inner": "eager"})
    state = falqon_fx.adapters(model)[SITES[0]]
    before, merged = state.base(), state.merged()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        compiled(randn(3, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(state.base(), before)
    assert not torch.equal(state.merged(), merged)
    assert torch.equal(state.merged(), falqon_fx.adapters(model)[SITES[0]].merged())


def test_adapters_with_update_rows_are_live():
    """What `adapters` gives shares memory with the model that trains."""
    config = FalqonConfig(update="rows", inner="eager", topk=10)
    model = prepared_mlp(config)
    compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    state = falqon_fx.adapters(model)[SITES[0]]
    compiled(randn(3, 32))
    assert not state.writes.any()
    fill_b(model, 0.1, seed=3)  # so that no row grows by more than four times
    compiled(randn(3, 32))
    assert int(state.writes.sum()) == 10


def test_flush_writes_all_sites_and_by_default_nothing():
    model = prepared_mlp(ROWS)
    fill_b(model, 0.2, seed=4)
    assert all(state.pending().any() for state in falqon_fx.adapters(model).values())
    falqon_fx.flush(model)
    for state, b in zip(falqon_fx.adapters(model).values(), lora_b(model), strict=True):
        assert torch.equal(state.applied, b)
        assert not state.pending().any()
        assert (state.writes == 1).all()
    model = prepared_mlp()
    fill_b(model, 0.2, seed=4)
    before = parameters(model)
    falqon_fx.flush(model)
    assert unchanged(model, before)


def test_the_progress_bar_is_shown_on_request_only(capsys):
    falqon_fx.prepare(tiny_mlp(), progress=False)
    assert capsys.readouterr() == ("", "")
