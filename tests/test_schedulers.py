"""Every learning rate schedule of torch goes on from a checkpoint as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.files import training
from tests.sites import randn

STEPS = 12
Make = Callable[[torch.optim.Optimizer], Any]


class Halving:
    """A callable with a state, which torch saves; functions it does not."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 0.5 ** (self.calls / 4)


def chained(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.LinearLR(optimizer, total_iters=6),
            lr_scheduler.MultiStepLR(optimizer, [3, 3, 8], gamma=0.3),
        ]
    )


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    parts = [
        lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=4),
        lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.3),
        lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4, 7])


S = lr_scheduler
MAKE: dict[str, Make] = {
    "LambdaLR": lambda o: S.LambdaLR(o, [lambda epoch: 0.9**epoch, lambda epoch: 0.8**epoch]),
    "LambdaLR of an object": lambda o: S.LambdaLR(o, [Halving(), Halving()]),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: S.StepLR(o, 3),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 5, 5, 9]),
    "ConstantLR": lambda o: S.ConstantLR(o, total_iters=7),
    "LinearLR": lambda o: S.LinearLR(o, total_iters=9),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: S.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "ReduceLROnPlateau of the largest": lambda o: S.ReduceLROnPlateau(o, "max", patience=1),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="triangular2"),
    "CyclicLR of a range": lambda o: S.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "CyclicLR of a function": lambda o: S.CyclicLR(o, 0.01, 0.1, 3, scale_fn=lambda x: 0.9**x),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, total_steps=STEPS + 2),
    "OneCycleLR in NumPy's numbers": lambda o: S.OneCycleLR(
        o, [np.float64(0.1), np.float64(0.2)], total_steps=STEPS + 2, three_phase=True
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=5),
    "SWALR by a line": lambda o: swa_utils.SWALR(o, 0.01, 5, anneal_strategy="linear"),
    "ChainedScheduler": chained,
    "SequentialLR": sequential,
}


class Run:
    """Two groups of parameters and a schedule."""

    def __init__(self, make: Make, tensor_rate: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        groups = [{"params": layer.parameters()} for layer in self.model]
        rate: Any = torch.tensor(0.05) if tensor_rate else 0.05
        self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
        self.scheduler = make(self.optimizer)

    def steps(self, first: int, last: int) -> list[Any]:
        """Losses and rates."""
        seen: list[Any] = []
        for step in range(first, last):
            loss = self.model(randn(3, 4, seed=step)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*([loss.item()] if plateau else []))
            rates = [(float(g["lr"]), g["momentum"]) for g in self.optimizer.param_groups]
            seen.append((loss.item(), rates))
        return seen

    def save(self, folder: Path) -> None:
        falqon_fx.save_checkpoint(
            self.model, folder, optimizer=self.optimizer, scheduler=self.scheduler
        )

    def load(self, folder: Path) -> None:
        falqon_fx.load_checkpoint(
            self.model, folder, optimizer=self.optimizer, scheduler=self.scheduler
        )


def goes_on_exactly(make: Make, folder: Path, **options: Any) -> None:
    whole = Run(make, **options).steps(0, STEPS)
    for interrupted in (0, 1, 4, 7):
        first = Run(make, **options)
        first.steps(0, interrupted)
        first.save(folder)
        resumed = Run(make, **options)
        resumed.load(folder)
        assert resumed.steps(interrupted, STEPS) == whole[interrupted:]


def test_every_schedule_of_torch_is_here():
    of_torch = {name for name in lr_scheduler.__all__ if name != "LRScheduler"} | {"SWALR"}
    assert of_torch == {name.partition(" ")[0] for name in MAKE}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_schedule_goes_on_from_a_checkpoint_exactly(tmp_path, make):
    rates = [rates for _, rates in Run(make).steps(0, STEPS)]
    assert any(rate != rates[0] for rate in rates)
    goes_on_exactly(make, tmp_path)


@pytest.mark.parametrize("name", ["StepLR", "MultiStepLR", "SequentialLR"])
def test_so_does_one_of_a_rate_that_is_a_tensor(tmp_path, name):
    goes_on_exactly(MAKE[name], tmp_path, tensor_rate=True)


@pytest.mark.parametrize(
    ("saved", "ours", "problem"),
    [
        ("MultiStepLR", "StepLR", r"scheduler: it has \['step_size'\], .* \['milestones'\]"),
        ("ChainedScheduler", "StepLR", "scheduler: it has"),
        ("SequentialLR", "ChainedScheduler", "made of 2, the one in .* of 3"),
    ],
)
def test_another_schedule_is_refused_and_nothing_changed(tmp_path, saved, ours, problem):
    first, other = Run(MAKE[saved]), Run(MAKE[ours])
    first.steps(0, 3)
    first.save(tmp_path)
    before = {name: p.clone() for name, p in other.model.named_parameters()}
    rates = [group["lr"] for group in other.optimizer.param_groups]
    with pytest.raises(FalqonError, match=problem):
        other.load(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.model.named_parameters())
    assert [group["lr"] for group in other.optimizer.param_groups] == rates


@pytest.mark.parametrize(
    ("name", "change", "value"),
    [
        ("StepLR", "optimizer", 3),
        ("StepLR", "step", 3),
        ("StepLR", "gamma", "0.1"),
        ("StepLR", "base_lrs", [0.1]),
        ("MultiStepLR", "milestones", [2]),
        ("ReduceLROnPlateau", "mode", 3),
        ("OneCycleLR", "_schedule_phases", [3, 4]),
        ("CyclicLR", "_scale_fn_ref", 3),
        ("SequentialLR", "optimizer", 3),
        ("SequentialLR inside", "optimizer", 3),
        ("ChainedScheduler inside", "milestones", 3),
        ("ChainedScheduler", "_schedulers", 3),
    ],
)
def test_a_state_that_would_take_the_place_of_something_else_is_refused(name, change, value):
    """A schedule's state becomes its attributes."""
    name, inside, _ = name.partition(" inside")
    run = Run(MAKE[name])
    saved = training.without_functions(run.scheduler.state_dict())
    target = saved["_schedulers"][-1 if change == "milestones" else 0] if inside else saved
    target[change] = value
    before = {**vars(run.scheduler)}
    with pytest.raises(FalqonError, match="scheduler: "):
        training.check_scheduler(run.scheduler, saved, "a checkpoint")
    assert vars(run.scheduler) == before
