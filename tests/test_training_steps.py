"""One step is that of plain LoRA where casts are exact, in mixed precision and accumulated, too."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from tests import tolerances as tol
from tests.emulation import emulate
from tests.loops import Bases, each_inner, on_grid, parameters, values
from tests.models import Relu, compiled, fill_b, tiny_mlp
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.training import all_equal


@each_value(inner=["eager", "aot_eager"], prepared=PREPARED_OR_NOT)
def test_where_every_cast_is_exact_training_is_that_of_plain_lora_bit_for_bit(inner, prepared):
    """Integers up to 16, times a power of two, are FP8 numbers, and their sums are exact in float32
    in any order. Signs of gradients move A and B by such steps.
    """

    def whole(*shape: int, seed: int, largest: int = 15, unit: float = 2.0**-3) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-largest, largest + 1, shape, generator=generator) * unit

    plain = one_layer()
    with torch.no_grad():
        for i, p in enumerate(plain.parameters()):
            p.copy_(whole(*p.shape, seed=i, largest=4 if p.requires_grad else 15))
    model = copy.deepcopy(plain)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    call, ends = compiled(model, inner), []
    for run, trained in ((plain, parameters(plain)), (call, parameters(model))):
        found: list[Any] = []
        for step in range(8):
            for part in range(2):  # accumulated
                x = whole(6, 32, seed=100 + 2 * step + part).requires_grad_()
                y = run(x)
                # dL/dO: integers that E5M2 holds
                y.backward(whole(6, 48, seed=200 + 2 * step + part, largest=3))
                found += [y.detach(), x.grad]
            found += [p.grad.clone() for p in trained]
            with torch.no_grad():
                for p in trained:
                    p.sub_(p.grad.sign() * 2.0**-3)
                    p.grad = None
        ends.append(found + values(trained))
    assert all_equal(*ends)
    assert all(p.abs().max() <= 2.0 for p in parameters(model))


@each_inner
def test_accumulated_gradients_are_the_sum_of_those_of_the_parts(inner):
    """One after the other, or two forward passes before one backward pass: bit for bit."""
    model = Relu()
    fill_b(model, 0.1)
    call, xs = compiled(model, inner), torch.randn(2, 5, 32)

    def gradients(*losses: Callable[[], Tensor]) -> list[Tensor]:
        model.zero_grad()
        for loss in losses:
            loss().backward()
        return [p.grad.clone() for p in parameters(model)]

    def loss(x: Tensor) -> Tensor:
        return call(x).square().mean()

    parts = [gradients(functools.partial(loss, x)) for x in xs]
    expected = [first + second for first, second in zip(*parts)]
    assert len(expected) == 4
    assert all_equal(gradients(*(functools.partial(loss, x) for x in xs)), expected)
    assert all_equal(gradients(lambda: loss(xs[0]) + loss(xs[1])), expected)


def one_layer() -> nn.Module:
    """PEFT on one layer: W, A and B are its parameters of two dimensions."""
    import peft

    return peft.get_peft_model(
        nn.Sequential(nn.Linear(32, 48)),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]),
    )


@each_value(inner=["eager", "aot_eager"], dtype=[torch.bfloat16, torch.float16])
def test_in_mixed_precision_every_step_sees_the_gradients_of_plain_lora(dtype, inner):
    """Within `tol.site_bounds`, at the parameters of each step and for its own dL/dO. In float16
    the first scales of the scaler overflow, so that steps are skipped.
    """
    model, half = one_layer(), dtype == torch.float16
    fill_b(model, 0.1)
    base, a, b = (p.detach() for p in (on_grid(model).parameters()) if p.dim() == 2)
    call, optimizer = compiled(model, inner), torch.optim.AdamW(parameters(model), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", 2.0**24, growth_interval=4, enabled=half)
    taken = 0
    for i in range(14):
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(i))
        with torch.autocast("cpu", dtype):
            y = call(x)
        assert y.dtype == dtype
        grads: list[Tensor] = []
        y.register_hook(grads.append)
        scaler.scale((y - 1).float().square().mean()).backward()
        (grad,), trained = grads, parameters(model)
        if grad.isfinite().all():
            bounds = tol.site_bounds(x, grad, tol.Parameters(base, a, b, 2.0))
            wide, wide_x = grad.double() * 2.0, x.double()
            of_a, of_b = (wide @ b.double()).t() @ wide_x, wide.t() @ (wide_x @ a.double().t())
            tol.assert_within(trained[0].grad, of_a, bounds.grad_a)
            tol.assert_within(trained[1].grad, of_b, bounds.grad_b)
        before = values(trained)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not torch.equal(p, old) for p, old in zip(trained, before)]
        assert all(moved) == any(moved) == bool(grad.isfinite().all())
        taken += all(moved)
    assert taken >= 5
    assert (taken < 14) == half


@pytest.mark.parametrize(("kind", "prepared"), [("swa", False), ("swa", True), ("ema", False)])
def test_an_average_of_the_whole_model_has_the_average_of_a_and_b_on_the_same_base(kind, prepared):
    """torch's AveragedModel, which averages every parameter: W - W is nothing to add. (An EMA of a
    prepared model's bytes is an error: tests/test_prepare.py.)
    """
    model, x = tiny_mlp(), torch.randn(5, 32)
    fill_b(model, 0.1)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    call, optimizer = compiled(model), torch.optim.AdamW(parameters(model), lr=1e-2)
    averaging = torch.optim.swa_utils
    how = {"multi_avg_fn": averaging.get_ema_multi_avg_fn(0.9)} if kind == "ema" else {}
    average, seen = averaging.AveragedModel(model, **how), []
    for _ in range(4):
        call(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        seen.append(values(parameters(model)))
    expected = seen[0]
    for i, step in enumerate(seen[1:], 2):
        weight = 0.1 if kind == "ema" else 1 / i
        expected = [torch.lerp(mean, p, weight) for mean, p in zip(expected, step)]
    for found, wanted in zip(parameters(average), expected, strict=True):
        # Both round three times an average; what is averaged is at most as large as |p| over all.
        largest = max(float(p.abs().max()) for step in seen for p in step)
        tol.assert_within(found.detach(), wanted, 2 * tol.gamma(9) * largest)
    y = compiled(average)(x)
    bases, states = Bases.of(model).bytes, falqon_fx.adapters(average)
    for (code, scale), state in zip(bases.values(), states.values(), strict=True):
        assert all_equal([code, scale], [state.weight.view(torch.uint8), state.scale])
    twin = emulate(copy.deepcopy(average), states)
    assert torch.equal(y, twin(x))
