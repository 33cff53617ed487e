"""What the processes of a sharded model do together: one writes what all gather, and what goes
wrong on one is an error on each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from falqon_fx.errors import FalqonError
from falqon_fx.site.agreement import agree, from_rank, of_each, plain

T = TypeVar("T")
R = TypeVar("R")


def lead(sharded: bool, steps: Sequence[Callable[[], T]], work: Callable[[Iterator[T]], R]) -> R:
    """The result of ``work``, which the first process does with what the ``steps`` give; all of
    them take each step, in which parts of ``sharded`` tensors are gathered, and get the result.

    Raises:
        FalqonError: what the first process ran into, on every process.
    """
    if not sharded:
        return work(step() for step in steps)
    if dist.get_rank() == 0:
        return _lead(steps, work)
    kind, said = _heard()
    for step in steps:
        if kind != "step":
            break
        step()
        kind, said = _heard()
    if kind == "error":
        raise from_rank(0, said)
    result: R = said
    return result


def _lead(steps: Sequence[Callable[[], T]], work: Callable[[Iterator[T]], R]) -> R:
    def each() -> Iterator[T]:
        for step in steps:
            _say("step", None)
            yield step()

    try:
        result = work(each())
    except BaseException as error:  # Ctrl-C too: the others wait
        _say("error", plain(error))
        raise
    _say("done", result)
    return result


def _say(kind: str, value: Any) -> None:
    dist.broadcast_object_list([(kind, value)])


def _heard() -> tuple[str, Any]:
    said: list[Any] = [None]
    dist.broadcast_object_list(said)
    kind, value = said[0]
    return kind, value


@contextmanager
def together(sharded: bool) -> Iterator[None]:
    """What is raised inside on one process of a ``sharded`` model is raised on all."""
    if not sharded:
        yield
        return
    own: BaseException | None = None
    try:
        yield
    except BaseException as error:
        own = error
    agree(None, {}, own)


def check_alike(where: str, checksum: str) -> None:
    """Raise on every process where they read something else."""
    if len({*of_each(checksum)}) > 1:
        problem = "the processes find different checkpoints there"
        raise FalqonError(where, problem, "Name a folder that all of them share")
