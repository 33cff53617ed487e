"""Workers side by side: how long each part took, how much memory is used, whose threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds in each part of the work, summed over workers."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        with self._lock:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


class Admission:
    """Lets weights be worked on side by side while their bytes together stay below a budget; one
    alone is always let in.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self._held = budget, 0
        self._changed = threading.Condition()

    @contextmanager
    def __call__(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size <= self._budget)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


@contextmanager
def shared_threads(workers: int) -> Iterator[None]:
    """Give each of some workers its share of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)
