"""Everything that trains, trains: loops that people write around an optimizer, on the constant FP8
base.

Each loop is written once and run on the compiled model and on two others: the same model on the
emulated ops (tests/emulation.py), to which it is equal bit for bit, and plain LoRA on the same
base, to which it comes as close as the FP8 casts allow.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx.model.prepare import Adapter
from tests import tolerances as tol
from tests.emulation import cast, emulate
from tests.models import Relu, fill_b, tiny_mlp
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.training import all_equal

Call = Callable[[Tensor], Tensor]
each_inner = pytest.mark.parametrize("inner", ["eager", "aot_eager"])
each_way = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])


def compiled(model: nn.Module, inner: str = "eager", **options: Any) -> Any:
    return torch.compile(model, backend="falqon", options={"inner": inner, **options})


def parameters(model: nn.Module, kind: str = "") -> list[nn.Parameter]:
    """Those that are trained; ``kind``: "lora_A" or "lora_B" alone."""
    return [p for name, p in model.named_parameters() if p.requires_grad and kind in name]


def values(tensors: list[nn.Parameter]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def on_grid(model: nn.Module) -> nn.Module:
    """Round the weights of the base layers to FP8: casting them again changes nothing."""
    for name, weight in model.named_parameters():
        if "base_layer" in name and weight.dim() == 2:
            codes, scale = cast(weight.detach(), torch.float8_e4m3fn, per_row=True, pow2=True)
            weight.data.copy_(codes * scale)
    return model


@dataclass(frozen=True)
class Bases:
    """Where the FP8 bases of a model lie, and what they are."""

    places: dict[str, tuple[int, int]]
    bytes: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> Bases:
        states: dict[str, Any] = falqon_fx.adapters(model)
        assert all(isinstance(state, Adapter) for state in states.values())
        return cls(
            {path: (s.weight.data_ptr(), s.scale.data_ptr()) for path, s in states.items()},
            {
                path: (s.weight.view(torch.uint8).clone(), s.scale.clone())
                for path, s in states.items()
            },
        )

    def assert_still(self, model: nn.Module) -> None:
        """The same bases in the same memory."""
        now = Bases.of(model)
        assert len(now.places) > 0
        assert now.places == self.places
        for path, found in now.bytes.items():
            assert all_equal([*found], [*self.bytes[path]]), path


# -- loops -----------------------------------------------------------------------------------------


@dataclass
class Loop:
    """What a training loop has: ``model``, called as ``call``, batches (x, y) and a rate.

    The loops below train with it and yield every loss.
    """

    call: Call
    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    rate: float

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self.call(x) - y).float().square().mean()

    def adam(self, *groups: dict[str, Any]) -> torch.optim.Optimizer:
        trained: Any = groups or parameters(self.model)
        return torch.optim.AdamW(trained, lr=self.rate, weight_decay=0.0)

    def decay(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(self.batches))


def plainly(loop: Loop) -> Iterator[Tensor]:
    optimizer = loop.adam()
    schedule = loop.decay(optimizer)
    for batch in loop.batches:
        loss = loop.loss(batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss


def accumulated(loop: Loop) -> Iterator[Tensor]:
    """Four parts of a batch, one step."""
    optimizer = loop.adam()
    schedule = loop.decay(optimizer)
    for x, y in loop.batches:
        for part in zip(x.chunk(4), y.chunk(4)):
            loss = loop.loss(part)
            (loss / 4).backward()
            yield loss
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def two_optimizers(loop: Loop) -> Iterator[Tensor]:
    """A and B apart, B faster (LoRA+) and more often."""
    trained = parameters(loop.model)
    slow, fast = (loop.adam({"params": parameters(loop.model, k)}) for k in ("lora_A", "lora_B"))
    fast.param_groups[0]["lr"] *= 2
    schedule = loop.decay(fast)
    for i, batch in enumerate(loop.batches):
        loss = loop.loss(batch)
        loss.backward()
        fast.step()
        if i % 2:
            slow.step()
        schedule.step()
        for p in trained:
            p.grad = None
        yield loss


def sharpness_aware(loop: Loop) -> Iterator[Tensor]:
    """SAM: the gradient that counts is the one at A and B moved uphill."""
    trained, optimizer = parameters(loop.model), loop.adam()
    schedule = loop.decay(optimizer)
    for batch in loop.batches:
        first = loop.loss(batch)
        first.backward()
        norm = torch.cat([p.grad.flatten() for p in trained]).norm()
        moves = [p.grad * (0.05 / norm) for p in trained]
        optimizer.zero_grad()
        with torch.no_grad():
            for p, move in zip(trained, moves):
                p.add_(move)
        second = loop.loss(batch)
        second.backward()
        with torch.no_grad():
            for p, move in zip(trained, moves):
                p.sub_(move)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield first
        yield second


def averaged(loop: Loop) -> Iterator[Tensor]:
    """EMA: every tenth step is evaluated, and ends, on the average of the trained parameters."""
    trained, optimizer = parameters(loop.model), loop.adam()
    mean = values(trained)
    for i, batch in enumerate(loop.batches, 1):
        loss = loop.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss
        with torch.no_grad():
            for average, p in zip(mean, trained):
                average.lerp_(p, 0.1)
            if i % 10:
                continue
            live = values(trained)
            for average, p in zip(mean, trained):
                p.copy_(average)
            yield loop.loss(batch)
            if i < len(loop.batches):
                for value, p in zip(live, trained):
                    p.copy_(value)


def stochastic_average(loop: Loop) -> Iterator[Tensor]:
    """SWA by torch's own class over the trained parameters, at a constant rate from half way on."""
    trained, optimizer = parameters(loop.model), loop.adam()
    mean = torch.optim.swa_utils.AveragedModel(nn.ParameterList(trained))
    for i, batch in enumerate(loop.batches, 1):
        loss = loop.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss
        if 2 * i > len(loop.batches):
            mean.update_parameters(nn.ParameterList(trained))
    with torch.no_grad():
        averages: Any = mean.module
        for average, p in zip(averages, trained):
            p.copy_(average)
        yield loop.loss(loop.batches[-1])


def second_order(loop: Loop) -> Iterator[Tensor]:
    """L-BFGS calls the model several times a step, with other parameters each time."""
    optimizer = torch.optim.LBFGS(parameters(loop.model), lr=0.5, max_iter=3)
    for batch in loop.batches:
        losses: list[Tensor] = []

        def closure(batch: tuple[Tensor, Tensor] = batch, losses: list[Tensor] = losses) -> Tensor:
            optimizer.zero_grad()
            loss = loop.loss(batch)
            loss.backward()
            losses.append(loss)
            return loss

        optimizer.step(closure)
        yield from losses


def frozen_a(loop: Loop) -> Iterator[Tensor]:
    """LoRA-FA: A has no gradient and doesn't move."""
    of_a = [p for name, p in loop.model.named_parameters() if "lora_A" in name]
    for p in of_a:
        p.requires_grad_(False)
    before = values(of_a)
    for loss in plainly(loop):
        assert all(p.grad is None for p in of_a)
        yield loss
    assert all_equal(before, values(of_a))


LOOPS = {
    loop.__name__: loop
    for loop in (
        plainly,
        accumulated,
        two_optimizers,
        sharpness_aware,
        averaged,
        stochastic_average,
        second_order,
        frozen_a,
    )
}


NOISE = 0.5


def regression(
    teacher: Call,
    count: int,
    noise: float = NOISE,
    rows: int = 64,
    width: int = 64,
    seed: int = 7,
) -> list[tuple[Tensor, Tensor]]:
    """Batches of the outputs of a model, with noise."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        x = torch.randn(rows, width, generator=generator)
        with torch.no_grad():
            y = teacher(x)
        batches.append((x, y + noise * torch.randn(y.shape, generator=generator)))
    return batches


def student() -> nn.Module:
    """Two sites with a new adapter; outputs of variance 1 or so."""
    model = Relu(64, 96, rank=8, bias=True)
    for site in (model.up, model.down):
        site.base_layer.weight.data.mul_(2)
    return on_grid(model)


def teacher_of(model: nn.Module, same_a: bool) -> nn.Module:
    """The same base with an adapter to be learned."""
    teacher = copy.deepcopy(model)
    fill_b(teacher, 0.04)
    for site in (teacher.up, teacher.down):
        if not same_a:
            nn.init.normal_(site.lora_A.weight, std=0.2)
    return teacher


# -- bit for bit -----------------------------------------------------------------------------------


@each_value(loop=LOOPS, inner=["eager", "aot_eager"], prepared=PREPARED_OR_NOT)
def test_a_loop_gives_the_numbers_of_the_emulated_ops(loop, inner, prepared):
    """Losses and parameters, bit for bit; the base stays where and what it is."""
    model = tiny_mlp()
    fill_b(model, 0.1)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    call = compiled(model, inner)
    call(torch.randn(2, 32))
    bases = Bases.of(model)
    twin = emulate(copy.deepcopy(model), falqon_fx.adapters(model))
    before = values(parameters(model))
    data = regression(lambda x: x / 2, 10, noise=0.0, rows=8, width=32)
    found = [loss.detach() for loss in loop(Loop(call, model, data, 1e-2))]
    expected = [loss.detach() for loss in loop(Loop(twin, twin, data, 1e-2))]
    assert all_equal(found, expected)
    assert all_equal(values(parameters(model)), values(parameters(twin)))
    all_of = [p for name, p in model.named_parameters() if "lora_" in name]
    moved = [not torch.equal(p, old) for p, old in zip(all_of, before, strict=True)]
    assert moved == [p.requires_grad for p in all_of]
    assert sum(moved) == (2 if loop is frozen_a else 4)
    bases.assert_still(model)


# -- as good as plain LoRA -------------------------------------------------------------------------


STEPS = 400


def autocast(dtype: torch.dtype) -> Callable[[Loop], Iterator[Tensor]]:
    """`plainly` in mixed precision; float16 with a scaler whose first scales overflow."""

    def run(loop: Loop) -> Iterator[Tensor]:
        optimizer = loop.adam()
        scaler = torch.amp.GradScaler("cpu", 2.0**24, enabled=dtype == torch.float16)
        schedule = loop.decay(optimizer)
        for batch in loop.batches:
            with torch.autocast("cpu", dtype):
                loss = loop.loss(batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            yield loss

    return run


LONG = {
    **{name: loop for name, loop in LOOPS.items() if loop is not second_order},
    "bfloat16": autocast(torch.bfloat16),
    "float16": autocast(torch.float16),
}


def _long(name: str) -> Any:
    """In the fast tests one, one without A, and one in mixed precision."""
    fast = name in ("plainly", "frozen_a", "bfloat16")
    return pytest.param(LONG[name], id=name, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize("loop", [_long(name) for name in LONG])
def test_hundreds_of_steps_end_where_plain_lora_does_on_the_same_base(loop):
    """400 steps of a noisy regression; base weights lie on the FP8 grid, so that both share them.

    The test loss, noise included, is within 1.1 of that of plain LoRA. Without the noise, which is
    20 times as large, it is within 1.1 of what A and B of plain LoRA give when they are run in FP8:
    what FP8 costs is what the casts of x and A cost any adapter, and training in it adds nothing.
    """
    start = student()
    teacher = teacher_of(start, same_a=loop is frozen_a)
    data, test = regression(teacher, STEPS), regression(teacher, 8, noise=0.0, seed=8)
    x, clean = (torch.cat(column) for column in zip(*test))

    plain, model = copy.deepcopy(start), copy.deepcopy(start)
    for _ in loop(Loop(plain, plain, data, 0.02)):
        pass
    call = compiled(model)
    call(x)
    bases = Bases.of(model)
    for _ in loop(Loop(call, model, data, 0.02)):
        pass
    bases.assert_still(model)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), start.parameters())]
    assert sum(moved) == (2 if loop is frozen_a else 4)  # and no base weight

    def test_loss(call: Call) -> float:
        with torch.no_grad():
            return (call(x) - clean).square().mean().item()

    untrained, without, within = test_loss(start), test_loss(plain), test_loss(call)
    in_fp8 = test_loss(compiled(plain))
    assert within < untrained / 10
    assert NOISE**2 + within <= 1.1 * (NOISE**2 + without)
    assert within <= 1.1 * in_fp8


# -- one step --------------------------------------------------------------------------------------


@each_way
@each_inner
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


@each_inner
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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
