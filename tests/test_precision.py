"""Autocast, GradScaler and casts of models after compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from tests import tolerances as tol
from tests.either_update import UPDATES, each_update, of_update
from tests.models import LoraLinear, Relu, compiled, fill_b, lora_b, tiny_mlp, train
from tests.parameters import each_value, slow
from tests.sites import randn
from tests.training import adam, all_equal, steps, trained, weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_exact_arithmetic_within_the_casts(dtype):
    """Forward and backward of a site under autocast, its parameters and input in float32."""
    model, x = LoraLinear(32, 48, bias=True), randn(6, 32).requires_grad_()
    fill_b(model, 0.1)
    with torch.autocast("cpu", dtype):
        y = compiled(model, "aot_eager")(x)
        original = model(x.detach())
    assert y.dtype == original.dtype
    grad = randn(6, 48, seed=1).to(y.dtype)
    y.backward(grad)

    base, a, b = (m.weight.detach() for m in (model.base_layer, model.lora_A, model.lora_B))
    bias = model.base_layer.bias.detach()
    bounds = tol.site_bounds(x.detach(), grad, tol.Parameters(base, a, b, model.scaling, bias))
    merged = base.double() + model.scaling * b.double() @ a.double()
    wide_x, wide_grad = x.detach().double(), grad.double()
    tol.assert_within(y.detach(), wide_x @ merged.t() + bias.double(), bounds.y)
    tol.assert_within(x.grad, wide_grad @ merged, bounds.grad_x)
    expected = model.scaling * wide_grad.t() @ (wide_x @ a.double().t())
    tol.assert_within(model.lora_B.weight.grad, expected, bounds.grad_b)
    expected = model.scaling * (wide_grad @ b.double()).t() @ wide_x
    tol.assert_within(model.lora_A.weight.grad, expected, bounds.grad_a)


def test_a_wider_cast_behind_a_site_sees_the_rounded_sum():
    """As in the original: logits of a bfloat16 head that are cast to float32 for the loss."""

    class Head(nn.Module):
        def __init__(self, wide: bool) -> None:
            super().__init__()
            self.base, self.a = (
                nn.Linear(32, 48).requires_grad_(False),
                nn.Linear(32, 4, bias=False),
            )
            self.b, self.wide = nn.Linear(4, 48, bias=False), wide

        def forward(self, x: Tensor) -> Tensor:
            total = self.base(x) + self.b(self.a(x)) * 2.0
            return total.float() if self.wide else total

    head, x = Head(wide=True).bfloat16(), torch.randn(5, 32).bfloat16()
    wide = compiled(head)(x)
    head.wide = False
    assert wide.dtype == torch.float32
    assert torch.equal(wide, compiled(head)(x).float())
    assert len(falqon_fx.adapters(head)) == 1


@pytest.mark.parametrize(
    ("dtype", "compiler"),
    [
        (torch.bfloat16, "aot_eager"),
        (torch.float16, "aot_eager"),
        slow(torch.bfloat16, "inductor"),
    ],
)
def test_autocast_trains_bit_for_bit_as_eager(dtype, compiler):
    """Autocast is on around the eager ops, and off in what AOTAutograd runs. (Inductor drops the
    rounding to float16 between two kernels that it fuses.)
    """
    model, x = Relu(), torch.randn(2, 5, 32)
    result = []
    for inner in ("eager", compiler):
        own = copy.deepcopy(model)
        with torch.autocast("cpu", dtype):
            losses = train(compiled(own, inner), adam(own), x, steps=5)
        result.append((losses, weights(own)))
    assert result[0][0] == result[1][0]
    assert all_equal(result[0][1], result[1][1])
    assert len(trained(model)) == 4
    assert result[0][0][-1] < result[0][0][0]


@each_update
def test_float16_with_a_grad_scaler_trains_by_the_steps_that_were_taken(update):
    """The first scales overflow float16: those steps are skipped, and nothing is written."""
    model, x = of_update(Relu(), update), torch.randn(2, 5, 32)
    result = []
    for inner in ("eager", "aot_eager"):
        own = copy.deepcopy(model)
        call, optimizer = compiled(own, inner, **UPDATES[update]), adam(own)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
        taken, losses = 0, []
        for _ in range(16):
            with torch.autocast("cpu", torch.float16):
                loss = (call(x) - x / 2).float().square().mean()
            scaler.scale(loss).backward()
            before = lora_b(own)[1].detach().clone()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            taken += not torch.equal(before, lora_b(own)[1])
            losses.append(loss.item())
        call(x)
        assert 0 < taken < 16
        if update == "rows":
            assert steps(own)[1] == taken
        assert losses[-1] < losses[0]
        result.append((losses, weights(own)))
    assert result[0][0] == result[1][0]
    assert all_equal(result[0][1], result[1][1])


@each_value(update=["adapter", "rows"], cast=["half", "bfloat16"])
def test_a_cast_after_compile_goes_on_as_a_cast_before_it(cast, update):
    model, x = of_update(tiny_mlp(), update), torch.randn(5, 32)
    fill_b(model, 0.1)
    before = getattr(copy.deepcopy(model), cast)()
    call, half = compiled(model, **UPDATES[update]), getattr(x, cast)()
    call(x)
    getattr(model, cast)()
    found = train(call, torch.optim.SGD(trained(model), lr=0.1), half, steps=3)
    torch._dynamo.reset()
    sgd = torch.optim.SGD(trained(before), lr=0.1)
    assert found == train(compiled(before, **UPDATES[update]), sgd, half, steps=3)
    assert found[-1] < found[0]
    assert all_equal(weights(model), weights(before))
    if update == "rows":
        assert steps(model) == [2, 2]


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_cast_of_a_prepared_model_rounds_its_adapter_and_nothing_else(cast):
    """As of any model; the base keeps its bytes and its scales."""
    model, x = tiny_mlp(), torch.randn(5, 32)
    fill_b(model, 0.1)
    falqon_fx.prepare(model, progress=False)
    kept = [
        (s.weight, s.scale, s.weight.view(torch.uint8).clone(), s.scale.clone())
        for s in falqon_fx.adapters(model).values()
    ]
    call, half = compiled(model), getattr(x, cast)()
    call(x)
    getattr(model, cast)()
    for state, (weight, scale, code, values) in zip(falqon_fx.adapters(model).values(), kept):
        assert state.weight.data_ptr() == weight.data_ptr()
        assert state.scale.data_ptr() == scale.data_ptr()
        assert torch.equal(state.weight.view(torch.uint8), code)
        assert torch.equal(state.scale, values)
    found = train(call, torch.optim.SGD(trained(model), lr=0.1), half, steps=3)
    assert found[-1] < found[0]


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_with_rows_a_cast_of_a_prepared_models_adapter_is_an_error_whose_remedy_works(cast):
    """It rounds lora_A, which W' holds as it was."""
    model, x, config = (
        of_update(tiny_mlp(), "rows"),
        torch.randn(5, 32),
        FalqonConfig(**UPDATES["rows"]),
    )
    falqon_fx.prepare(model, config, progress=False)
    call, half = compiled(model, **UPDATES["rows"]), getattr(x, cast)()
    call(x)
    getattr(model, cast)()
    with pytest.raises(FalqonError, match=r"changed or cast since") as no:
        call(half)
    assert no.value.site == "base_model.model.0"
    falqon_fx.restore(model)
    falqon_fx.prepare(model, config, progress=False)
    assert call(half).isfinite().all()
