"""Host time of the generated code: Python and allocation, with launches left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

from falqon_fx.kernels import hardware
from falqon_fx.kernels.gemm import launch
from falqon_fx.kernels.products import dispatch
from lens import fake_gpu
from lens.fake_gpu import Graph
from lens.launches import BODIES

CALLS, BATCHES = 100, 5


def microseconds(graph: Graph, results: Mapping[str, Sequence[Any]]) -> float:
    """Process time of a call of the graph's code, the least of several batches.

    Tensors are on the meta device, which allocates and makes views at a GPU's price; a launch is a
    Python function that does nothing; ``results`` are those of each op that makes its own. Bodies
    of our ops run, each with a choice between kernels that has been made.
    """
    inputs = [fake_gpu.as_meta(value) for value in graph.inputs]
    chosen: dict[tuple[str, str], str] = {}

    def run(contest: dispatch.Contest) -> Any:
        place = (contest.key, contest.wanted)
        if place not in chosen:
            chosen[place] = _first(contest)
        return contest.candidates[chosen[place]]()

    with (
        mock.patch.object(dispatch.Contest, "run", run),
        mock.patch.object(hardware, "_number", return_value=90),
        mock.patch.object(launch, "programs", return_value=132),
        mock.patch.object(dispatch, "programs", return_value=132),
        fake_gpu.no_launches(graph.module, graph.source, results, BODIES),
    ):
        return _least(lambda: graph.module.call([*inputs])) * 1e6


def _first(contest: dispatch.Contest) -> str:
    wanted = contest.wanted
    alike = [n for n in contest.candidates if n.replace("+", ":").split(":")[0] == wanted]
    return [*alike, *contest.candidates][0]


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
