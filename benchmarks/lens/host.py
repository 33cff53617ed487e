"""Host time of the generated code: Python and allocation, with launches left out.

What the backend does around each call of the compiled code is not in it: it reads the contents of
weights, which fake ones don't have (`benchmarks/wrapper_time.py` measures it).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lens import fake_gpu
from lens.fake_gpu import Graph

CALLS, BATCHES = 100, 5


def microseconds(graph: Graph, results: Mapping[str, Sequence[Any]]) -> float:
    """Process time of a call of the graph's code, the least of several batches.

    Tensors are on the meta device, which allocates and makes views at a GPU's price; a launch is a
    Python function that does nothing; ``results`` are those of each op that makes its own.
    """
    inputs = [fake_gpu.as_meta(value) for value in graph.inputs]
    with fake_gpu.no_launches(graph.module, graph.source, results):
        return _least(lambda: graph.module.call([*inputs])) * 1e6


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
