"""Batches of a model's inputs, and the model run over them as it is: without compiled code."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import Progress, SpinnerColumn, TextColumn
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.report.compiling import EVERY, say

FORM = (
    "Give batches of this model's inputs: a dict is passed as keyword arguments, a tuple or list "
    "as positional ones, a tensor as the only one"
)


@contextmanager
def quietly(model: nn.Module, *, grad: bool = False) -> Iterator[None]:
    """The model in evaluation mode, without compiled code; its modes and the random states are put
    back.
    """
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    model.eval()
    try:
        with (
            torch.set_grad_enabled(grad),
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def shown(show: bool) -> Iterator[Any]:
    """What tells how far a calibration is: on a terminal as it goes on, in a log now and then."""
    last = time.perf_counter()
    columns = SpinnerColumn(), TextColumn("{task.description}")
    with Progress(*columns, disable=not show, transient=True) as bar:
        task = bar.add_task("calibrating")

        def tell(text: str) -> None:
            nonlocal last
            bar.update(task, description=f"calibrating: {text}")
            if show and not bar.console.is_terminal and time.perf_counter() - last > EVERY:
                last = time.perf_counter()
                say(f"falqon: calibrating: {text}")

        yield tell


def batches_of(batches: Iterable[Any]) -> Iterator[Any]:
    """Each batch.

    Raises:
        FalqonError: there can't be any.
    """
    try:
        each = iter(batches)
    except TypeError as error:
        raise FalqonError("calibration", f"{batches!r} is not iterable", FORM) from error
    yield from each


def run_batch(model: nn.Module, batch: Any, number: int) -> Any:
    """What the model makes of a batch.

    Raises:
        FalqonError: it can't run it.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {str(name): there(value) for name, value in batch.items()}
    elif isinstance(batch, Tensor):
        args = [there(batch)]
    elif isinstance(batch, tuple | list):
        args = [there(value) for value in batch]
    else:
        kind = type(batch).__name__
        raise FalqonError("calibration", f"its batch {number} is a {kind}", FORM)
    try:
        return model(*args, **kwargs)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        problem = f"the model can't run its batch {number} ({type(e).__name__}: {e})"
        raise FalqonError("calibration", problem, FORM) from e
