"""Host time of the generated code: Python and allocation, with launches left out.

What the backend does around each call of the compiled code is not in it: it reads the contents of
weights, which fake ones don't have (`benchmarks/wrapper_time.py` measures it).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from lens import fake_gpu
from lens.fake_gpu import Graph

CALLS, BATCHES = 100, 5
# What the code calls, by what it is for.
_CALLS = {
    "checks": ("assert_size_stride", "assert_alignment"),
    "views": ("reinterpret_tensor",),
    "buffers": ("empty_strided_cuda",),
    "descriptors": ("TensorDescriptor.from_tensor",),
}


@dataclass(frozen=True)
class Host:
    """Microseconds of a call of a graph's code, without its checks, and without making views;
    and how often it does what.
    """

    us: float
    without: dict[str, float]
    calls: dict[str, int]


def look(graph: Graph, results: Mapping[str, Sequence[Any]]) -> Host:
    """Process times, each the least of several batches.

    Tensors are on the meta device, which allocates and makes views at a GPU's price; a launch is a
    Python function that does nothing; ``results`` are those of each op that makes its own.
    """
    inputs = [fake_gpu.as_meta(value) for value in graph.inputs]

    def timed(part: str = "") -> float:
        with contextlib.ExitStack() as stack:
            for name in _CALLS.get(part, ()):
                if hasattr(graph.module, name):
                    stack.enter_context(mock.patch.object(graph.module, name, _first))
            return _least(lambda: graph.module.call([*inputs])) * 1e6

    with fake_gpu.no_launches(graph.module, graph.source, results):
        return Host(timed(), {part: timed(part) for part in ("checks", "views")}, calls(graph))


def calls(graph: Graph) -> dict[str, int]:
    """How often the code of a graph makes checks, views, buffers and descriptors for TMA."""
    source = graph.source
    return {part: sum(source.count(f"{n}(") for n in names) for part, names in _CALLS.items()}


def _first(value: Any, *rest: Any) -> Any:
    return value


def _least(call: Callable[[], Any]) -> float:
    for _ in range(10):
        call()
    times = []
    for _ in range(BATCHES):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        times.append((time.process_time() - start) / CALLS)
    return min(times)
