"""Batches of a model's inputs, and the model run over them as it is: without compiled code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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


Tell = Callable[[str], None]  # says how far a calibration is


@contextmanager
def quietly(model: nn.Module, *, grad: bool = False) -> Iterator[None]:
    """The model in evaluation mode, without compiled code; its modes and the random states are put
    back. What is made within are ordinary tensors, also where the caller is in inference mode.
    """
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    for module in modes:  # not `eval()`, which merges loralib's adapters, and they would stay so
        module.training = False
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def shown(show: bool) -> Iterator[Tell]:
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


def lasting(batches: Iterable[Any]) -> Iterable[Any]:
    """Batches that can be gone through several times: an iterator comes but once, and is held."""
    return list(batches) if isinstance(batches, Iterator) else batches


def input_of(given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a call of a linear layer reads, by its place or its name."""
    return given[0] if given else next(iter(named.values()), None)


def run_batch(model: nn.Module, batch: Any, number: int) -> Any:
    """What the model makes of a batch.

    Raises:
        FalqonError: it can't run it.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = value.to(device)
        return moved.clone() if moved.is_inference() else moved  # which backward could not read

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
