"""Everything that trains, trains: loops that people write around an optimizer, on the constant FP8
base.

Each loop is written once and run on the compiled model and on two others: the same model on the
emulated ops (tests/emulation.py), to which it is equal bit for bit, and plain LoRA on the same
base, to which it comes as close as the FP8 casts allow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from tests.emulation import emulate
from tests.loops import Bases, on_grid, parameters, values
from tests.models import Relu, compiled, fill_b, tiny_mlp
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.training import all_equal

Call = Callable[[Tensor], Tensor]


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
    call(torch.randn(8, 32))
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
    """In the fast tests one."""
    return pytest.param(LONG[name], id=name, marks=() if name == "plainly" else pytest.mark.slow)


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
