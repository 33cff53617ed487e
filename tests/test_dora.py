"""DoRA: its base runs in FP8 behind its norm."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import falqon_fx
from tests import tolerances as tol
from tests.models import fill_b, train
from tests.parameters import slow
from tests.peft_calls import CONFIG, SITES, cast, compiled, inputs, made, trained


def dora_parts(layer: nn.Module, x: tol.Approx) -> tuple[tol.Approx, tol.Approx, tol.Approx]:
    """Of a DoRA layer on plain weights: x·Wᵀ with a cast of x, s·B·A·x, and magnitude / ‖W +
    s·B·A‖, a float32 sum of ``in`` squares of sums of r products.
    """
    f32, exact = torch.float32, tol.Approx.exact
    weight, magnitude = layer.base_layer.weight, layer.lora_magnitude_vector["default"].weight
    a, b = (exact(m["default"].weight.detach()) for m in (layer.lora_A, layer.lora_B))
    factor = exact(torch.tensor(layer.scaling["default"]))
    base = (cast(x) @ exact(weight.detach()).t()).rounded(f32)
    lora = ((x @ a.t()).rounded(f32) @ b.t()).rounded(f32)
    delta = layer.get_delta_weight("default").detach().double()
    ratio = magnitude.detach().double() / (weight.detach().double() + delta).norm(dim=1)
    return base, (lora * factor).rounded(f32), tol.Approx(ratio, tol.gamma(2 * 64) * ratio.abs())


def dora(layer: nn.Module, x: tol.Approx) -> tol.Approx:
    """y + ((ratio - 1)·(y - bias) + ratio·s·B·A·x) for y = x·Wᵀ + bias, as PEFT computes it."""
    f32, bias = torch.float32, tol.Approx.exact(layer.base_layer.bias.detach())
    base, lora, ratio = dora_parts(layer, x)
    y = (base + bias).rounded(f32)
    apart = (y + tol.Approx(-bias.value, bias.bound)).rounded(f32)
    less = tol.Approx(ratio.value - 1, ratio.bound).rounded(f32)
    added = ((less * apart).rounded(f32) + (ratio * lora).rounded(f32, f32)).rounded(f32)
    return (y + added).rounded(f32)


@pytest.mark.parametrize("inner", [slow("eager"), "aot_eager", slow("inductor")])
def test_the_base_of_dora_runs_in_fp8_behind_its_norm(inner):
    """DoRA reads the base layer's weight for its norm, and rescales the layer's result: against the
    original on the restored weights, with a cast of x before the base.
    """
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(64, 96)),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True),
    )
    fill_b(model, 0.1)
    report = falqon_fx.prepare(model, CONFIG, progress=False)
    assert list(report.prepared) == ["base_model.model.0"]
    layer = falqon_fx.restore(copy.deepcopy(model)).base_model.model[0]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    call = torch.compile(model, backend="falqon", options={"inner": inner})
    with pytest.warns(UserWarning, match="no DoRA or other variant"):
        found = call(x)
    expected = layer(x)
    exact = dora(layer, tol.Approx.exact(x))
    exact.assert_holds(found.detach())
    assert not torch.equal(found, expected)  # FP8 had a part in it

    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    found.backward(grad)
    expected.backward(grad)
    base, lora, ratio = dora_parts(layer, tol.Approx.exact(x))
    a, b = (m["default"].weight.detach().double().abs() for m in (layer.lora_A, layer.lora_B))
    through = grad.double().abs() * ratio.largest * layer.scaling["default"]
    norm = layer.lora_magnitude_vector["default"].weight.detach().double() / ratio.value
    limits = {  # float32 on both sides, but for the base's cast of x in dL/dmagnitude
        "lora_A": 2 * tol.gamma(96 + 5 + 8) * (through @ b).t() @ x.double().abs(),
        "lora_B": 2 * tol.gamma(64 + 5 + 8) * through.t() @ (x.double().abs() @ a.t()),
        "lora_magnitude_vector": (grad.double().abs() * (base.bound + lora.bound)).sum(0) / norm
        + 2
        * tol.gamma(64 + 8)
        * (grad.double().abs() * (base.largest + lora.largest)).sum(0)
        / norm,
    }
    names = {p: n for n, p in layer.named_parameters()}
    ours, theirs = model.base_model.model[0], layer
    for name, limit in limits.items():
        (path,) = (n for p, n in names.items() if name in n)
        tol.assert_within(ours.get_parameter(path).grad, theirs.get_parameter(path).grad, limit)


def test_a_dora_model_trains_in_fp8_as_on_its_restored_weights():
    """In each step the loss is that of the original with the same parameters, to what the casts of
    the inputs of its two layers move the output by: |Δ mean(r²)| <= mean(2|r||e| + e²).
    """
    model, x = made(True, use_dora=True), inputs()
    call, optimizer, losses = compiled(model), trained(model), []
    for _ in range(5):
        plain = falqon_fx.restore(copy.deepcopy(model))
        first, second = (plain.get_submodule(path) for path in SITES)
        hidden = dora(first, tol.Approx.exact(x))
        result = dora(second, tol.Approx(hidden.value.relu(), hidden.bound))
        rest = (result.value - x.double() / 2).abs()
        bound = (2 * rest * result.bound + result.bound.square()).mean()
        (loss,) = train(call, optimizer, x, steps=1)
        assert abs(loss - rest.square().mean()) <= bound + tol.gamma(5 * 32 + 4) * loss
        losses.append(loss)
    assert losses[-1] < losses[0]
