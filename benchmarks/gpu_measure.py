"""How `benchmarks/gpu.py` measures: clocks, repetitions, CUDA graphs, ceilings, the time budget."""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from falqon_fx._compat import scaled_mm

E4M3 = torch.float8_e4m3fn


class Clock:
    """Marks on a device's time line, and the seconds between them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.gpu = device == "cuda"

    def mark(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self.gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def of(self, run: Callable[[], Any]) -> float:
        """Seconds of one call."""
        start = self.mark()
        run()
        return self.seconds(start, self.mark())


@dataclass(frozen=True)
class Timing:
    """Seconds of several calls; ``how`` is "calls" or "graph" (replays of a CUDA graph)."""

    seconds: tuple[float, ...]
    how: str = "calls"

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest minus fastest."""
        return max(self.seconds) - min(self.seconds)


def repeat(run: Callable[[], Any], clock: Clock, count: int = 9, warm: int = 3) -> Timing:
    """Times ``count`` calls behind ``warm`` others that compile and fill caches."""
    for _ in range(warm if clock.gpu else 0):
        run()
    return Timing(tuple(clock.of(run) for _ in range(count if clock.gpu else 1)))


def replay(run: Callable[[], Any], clock: Clock, count: int = 9, calls: int = 10) -> Timing:
    """Seconds of a call without the host's share: ``calls`` of them in one CUDA graph, replayed.

    Where there is no GPU, or ``run`` can't be captured, calls are timed one by one.
    """
    if not clock.gpu:
        return repeat(run, clock, count)
    try:
        graph = captured(run, calls)
    except RuntimeError:  # it waits for the device, or allocates in its own way
        torch.cuda.synchronize()
        return repeat(run, clock, count)
    whole = repeat(graph.replay, clock, count)
    return Timing(tuple(seconds / calls for seconds in whole.seconds), "graph")


def captured(run: Callable[[], Any], calls: int = 1) -> torch.cuda.CUDAGraph:
    """``calls`` calls of ``run`` as a CUDA graph, behind three that warm up on a side stream.

    Raises RuntimeError where something in ``run`` can't be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph


def has_row_scales(device: str) -> bool:
    """Whether ``torch._scaled_mm`` takes one scale per row there; on CPU only newer versions do."""
    q, scale = torch.zeros(16, 16, device=device).to(E4M3), torch.ones(16, 1, device=device)
    try:
        scaled_mm(q, q.t(), scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True)
class Ceilings:
    """What the library reaches on this card at a size that suits it: the measure of all else."""

    bf16: float  # FLOP/s
    fp8_tensor: float
    fp8_row: float
    bandwidth: float  # bytes/s, read and written

    def seconds(self, bf16: float, fp8: float, mode: str = "row") -> float:
        """The least time for so many FLOPs of each kind."""
        return bf16 / self.bf16 + fp8 / (self.fp8_row if mode == "row" else self.fp8_tensor)


def ceilings(clock: Clock, size: int) -> Ceilings:
    """Measures ``size``³ products of random bf16 and FP8 values, and a copy of 16 such matrices."""
    device = clock.device
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    qa, qb = a.to(E4M3), b.to(E4M3)
    one, rows = torch.ones((), device=device), torch.ones(size, 1, device=device)
    flops = 2.0 * size**3

    def fp8(scale_a: Tensor, scale_b: Tensor) -> float:
        def run() -> Tensor:
            return scaled_mm(
                qa, qb.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        return flops / replay(run, clock).median

    source = torch.empty(16 * size * size, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    tensorwise = fp8(one, one)
    return Ceilings(
        flops / replay(lambda: a @ b.t(), clock).median,
        tensorwise,
        fp8(rows, rows.t()) if has_row_scales(device) else tensorwise,
        2 * source.nbytes / replay(lambda: target.copy_(source), clock).median,
    )


@dataclass
class Budget:
    """Seconds for everything, given out in order of importance; what does not fit is named."""

    total: float
    start: float = field(default_factory=time.perf_counter)
    dropped: list[str] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)

    def share(self, part: float) -> Budget:
        """The first part of it, for what is not to take all."""
        return Budget(part * self.total, self.start, self.dropped, self.costs)

    def left(self) -> float:
        return self.total - (time.perf_counter() - self.start)

    def run(self, what: str, kind: str, work: Callable[[], Any], guess: float) -> Any:
        """``work()``, or None where fewer seconds are left than the last of its ``kind`` took, or
        ``guess``.
        """
        expected = self.costs.get(kind, guess)
        if expected > self.left():
            self.dropped.append(what)
            return None
        start = time.perf_counter()
        result = work()
        self.costs[kind] = time.perf_counter() - start
        return result


def free(clock: Clock) -> None:
    """Give back what the last model held, compiled code included."""
    torch._dynamo.reset()
    gc.collect()
    if clock.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(clock: Clock) -> float:
    """The most that the allocator held since `free`."""
    return torch.cuda.max_memory_allocated() / 2**30 if clock.gpu else 0.0


def card(clock: Clock) -> dict[str, str]:
    """The card, its driver and what it is driven with."""
    if not clock.gpu:
        return {"card": "none: a rehearsal on CPU, kernels interpreted"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    about = torch.cuda.get_device_properties(0)
    memory = f"{about.total_memory / 2**30:.0f} GiB"
    return {
        "card": f"{about.name}, sm_{about.major}{about.minor}, {memory}",
        "driver and power limit": found or "nvidia-smi says nothing",
        "cuda": str(torch.version.cuda),
    }


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)
