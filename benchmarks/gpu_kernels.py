"""Single products of `benchmarks/gpu.py`: all candidates, the library as roof; and what brings the
adapters up to date: their casts, and with update="rows" the writes into W'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_check import fp8, positive, random_bf16
from gpu_measure import Budget, Ceilings, Clock, Timing, has_row_scales, repeat, replay
from gpu_models import SHAPES
from torch import Tensor

from falqon_fx import FalqonConfig
from falqon_fx._compat import scaled_mm
from falqon_fx.config import Accumulation
from falqon_fx.kernels.gemm.launch import Piece, Product
from falqon_fx.kernels.products import adapters, dispatch
from falqon_fx.kernels.products.choice import Refusal
from falqon_fx.kernels.products.contest import Contest, Options
from falqon_fx.ops import gpu
from falqon_fx.rows import cuda as rows_cuda
from falqon_fx.rows.state import allocate
from falqon_fx.site.numerics import E4M3, E5M2
from falqon_fx.site.spec import RowsSpec, SiteSpec

BF16 = torch.bfloat16
LIBRARY = "torch._scaled_mm"  # of W alone: the roof
WITH_W = ("O alone", "O with the adapter", "O, O_A", "dL/dx", "dL/dx with the adapter")


@dataclass(frozen=True)
class KernelRow:
    """One candidate of one product. ``of_library`` is the time of ``torch._scaled_mm`` on W alone
    in the same mode by the time taken: above 1 is faster. ``of_ceiling`` likewise, of the FLOPs at
    the ceiling of the card.
    """

    what: str
    candidate: str
    mode: str  # row or tensor
    accumulation: str
    tokens: int
    out: int
    features: int
    rank: int
    seconds: float
    spread: float
    how: str
    of_library: float | None
    of_ceiling: float
    chosen: bool


@dataclass(frozen=True)
class Problem:
    """A site's product."""

    tokens: int
    out: int
    features: int
    rank: int
    mode: str = "row"
    accumulation: Accumulation = "fast"
    templates: bool = False  # Inductor's too: seconds each

    def __str__(self) -> str:
        shape = f"{self.tokens}x{self.features}x{self.out} r{self.rank}"
        return f"{shape} {self.mode} {self.accumulation}"


def problems(tiny: bool) -> list[Problem]:
    """The most important first."""
    if tiny:
        modes = ("row", "tensor") if has_row_scales("cpu") else ("tensor",)
        return [Problem(17, 48, 64, 16, mode) for mode in modes]
    square, up, down = (4096, 4096), (11008, 4096), (4096, 11008)
    listed = [
        Problem(n, *shape, 16, mode)
        for mode in ("row", "tensor")
        for n in (4096, 8192, 2048)
        for shape in (square, up, down)
    ]
    listed += [Problem(n, *shape, 16) for n in (512, 16384) for shape in (square, up)]
    listed += [Problem(n, *shape, 64) for n in (4096, 512) for shape in (square, up, down)]
    wide = [(14336, 4096), (1024, 4096), (5120, 5120), (13824, 5120), (18944, 3584)]
    listed += [Problem(4096, *shape, 16) for shape in wide]
    listed += [Problem(4096, *shape, 16, "row", "promoted") for shape in (square, up)]
    return listed


def measure(problem: Problem, clock: Clock, ceiling: Ceilings) -> Iterator[KernelRow]:
    """Forward (O_A, then O with the adapter), what pending="hold" of update="rows" does (both in
    one), O alone as of a frozen layer, dL/dx, dL/dB and dL/dA.
    """
    n, out, features, rank = problem.tokens, problem.out, problem.features, problem.rank
    device, row = clock.device, problem.mode == "row"
    scalar = torch.ones((), device=device)
    q, q_scale = fp8(n, features, E4M3, device, 0), positive(n, device, 1) if row else scalar
    merged = fp8(out + rank, features, E4M3, device, 2)
    scale = positive(out + rank, device, 3) if row else scalar
    w, a = (
        Piece(merged[part], scale[part] if row else scale)
        for part in (slice(out), slice(out, None))
    )
    g, g_scale = fp8(n, out, E5M2, device, 4), positive(n, device, 5) if row else scalar
    o_a, grad = random_bf16(n, rank, device, 6), random_bf16(n, out, device, 7)
    b, a_turned = random_bf16(out, rank, device, 8), random_bf16(features, rank, device, 9)
    options = Options(
        kernel="max-autotune" if problem.templates else "auto",
        accumulation=problem.accumulation,
    )

    def forward(pieces: list[Piece], a_pieces: int) -> Contest:
        return dispatch.forward(q, q_scale, pieces, a_pieces, BF16, BF16, options)

    def library() -> Tensor:
        s = (q_scale, scale[:out].t().contiguous()) if row else (scalar, scalar)
        fast = problem.accumulation == "fast"
        return scaled_mm(q, merged[:out].t(), *s, out_dtype=BF16, use_fast_accum=fast)

    roof = _timed(library, clock, n)
    flops = 2.0 * n * out * features

    def rows(what: str, contest: Contest, least: float) -> Iterator[KernelRow]:
        timings: dict[str, Timing] = {}
        for name, run in contest.candidates.items():
            try:
                timings[name] = _timed(run, clock, n)
            except Refusal as error:
                print(f"{what} {problem}: {name}: {str(error).splitlines()[0][:120]}", flush=True)
        best = min(timings, key=lambda name: timings[name].median)
        for name, timing in timings.items():
            yield _row(what, name, problem, timing, roof, least, name == best)

    least = ceiling.seconds(0.0, flops, problem.mode)
    yield _row("O alone", LIBRARY, problem, roof, roof, least, False)
    yield from rows("O alone", forward([w], 0), least)
    yield from rows("O_A", forward([a], 1), least * rank / out)
    yield from rows("O with the adapter", forward([replace(w, left=o_a, right=b)], 0), least)
    yield from rows("O, O_A", forward([w, a], 1), least)
    one = [Product(g, g_scale, merged[:out])]
    yield from rows("dL/dx", dispatch.grad_x(one, None, None, BF16, options), least)
    both = dispatch.grad_x(one, o_a, a_turned, BF16, options)
    yield from rows("dL/dx with the adapter", both, least)
    of_b = ([grad], o_a, [rank], [1.0])
    flops_b, flops_a = 2.0 * n * out * rank, 2.0 * n * features * rank
    contest = adapters.adapter_grads(*of_b, [], [], torch.float32, "auto")
    yield from rows("dL/dB", contest, ceiling.seconds(flops_b, 0.0))
    contest = adapters.adapter_grads(*of_b, [q, q_scale], [o_a], torch.float32, "auto")
    yield from rows("dL/dB, dL/dA", contest, ceiling.seconds(flops_b + flops_a, 0.0))


def _timed(run: Callable[[], object], clock: Clock, tokens: int) -> Timing:
    """By CUDA graph where the host would be what is timed."""
    return replay(run, clock, count=5, calls=5) if tokens <= 1024 else repeat(run, clock, count=7)


def _row(
    what: str,
    name: str,
    problem: Problem,
    timing: Timing,
    roof: Timing,
    least: float,
    chosen: bool,
) -> KernelRow:
    return KernelRow(
        what,
        name,
        problem.mode,
        problem.accumulation,
        problem.tokens,
        problem.out,
        problem.features,
        problem.rank,
        timing.median,
        timing.spread,
        timing.how,
        roof.median / timing.median if what in WITH_W else None,
        least / timing.median,
        chosen,
    )


@dataclass(frozen=True)
class UpdateRow:
    """What brings the adapters of all layers of a model up to date, behind a change of every B.

    ``what`` is "casts" (`falqon::proxy_update`, of each pass) or "rows" (`falqon::proxy_update_`,
    of each step); ``unchanged_seconds`` is a call of the latter that finds nothing to do.
    """

    what: str
    shape: str
    rank: int
    sites: int
    seconds: float
    spread: float
    unchanged_seconds: float | None = None


def measure_casts(name: str, rank: int, clock: Clock) -> UpdateRow:
    """As Inductor compiles them at the head of a layer's graph, for one layer after the other."""
    shape, spec = SHAPES[name], str(SiteSpec.from_config(FalqonConfig()))
    layers = shape.layers if clock.gpu else 1
    scaling = [2.0] * len(shape.sites)

    def parameters() -> tuple[list[Tensor], list[Tensor]]:
        sizes = [(out, features) for out, features in shape.sites]
        lora_a = [torch.randn(rank, features, device=clock.device) for _, features in sizes]
        return lora_a, [torch.randn(out, rank, device=clock.device) for out, _ in sizes]

    def casts(lora_a: list[Tensor], lora_b: list[Tensor]) -> list[Tensor]:
        return gpu.proxy_update(lora_a, lora_b, scaling, [], False, spec)

    # A rehearsal compiles nothing.
    run = torch.compile(casts, fullgraph=True) if clock.gpu else casts
    every = [parameters() for _ in range(layers)]

    def all_layers() -> None:
        for lora_a, lora_b in every:
            run(lora_a, lora_b)

    all_layers()
    timing = replay(all_layers, clock, count=7, calls=1)
    sites = len(shape.sites) * layers
    return UpdateRow("casts", name, rank, sites, timing.median, timing.spread)


def measure_rows(name: str, rank: int, clock: Clock) -> UpdateRow:
    """All layers in one call; their values do not matter for the time."""
    shape = SHAPES[name]
    sites = (shape.sites * shape.layers)[: None if clock.gpu else 1]
    plan = RowsSpec.from_config(FalqonConfig(update="rows"))
    device = torch.device(clock.device)
    states = [allocate(out, features, rank, BF16, 1.0, plan, device) for out, features in sites]
    for state in states:
        state.code.zero_()
        state.scale.fill_(1.0)
        state.applied.zero_()
    # An A of zeros has the fingerprint that an empty state holds: it is not taken for a new one.
    lora_a = [torch.zeros(rank, features, device=device) for _, features in sites]
    lora_b = [torch.zeros(out, rank, device=device) for out, _ in sites]
    columns: list[Any] = [[*column] for column in zip(*(s.tensors for s in states), strict=True)]
    columns += [lora_b, lora_a, [None] * len(sites), [1.0] * len(sites)]

    def update() -> None:
        rows_cuda.proxy_update_(columns, str(plan))

    update()
    seconds = []
    for _ in range(7 if clock.gpu else 1):
        for b in lora_b:
            b.add_(torch.randn_like(b))
        seconds.append(clock.of(update))
    written = sum(int(state.writes.sum()) for state in states)
    assert written == sum(plan.rows(out) for out, _ in sites) * len(seconds), "nothing was written"
    changed, same = Timing(tuple(seconds)), repeat(update, clock, count=5, warm=1)
    return UpdateRow("rows", name, rank, len(sites), changed.median, changed.spread, same.median)


def all_rows(
    tiny: bool, clock: Clock, ceiling: Ceilings, budget: Budget
) -> tuple[list[KernelRow], list[UpdateRow]]:
    updates = [
        budget.run(f"{kind} {name} r{rank}", f"{kind} r{rank}", work, guess=10.0)
        for name, rank in ([("tiny", 8)] if tiny else [("llama-7b", 16), ("llama-7b", 64)])
        for kind, measure_one in (("casts", measure_casts), ("rows", measure_rows))
        for work in [lambda f=measure_one, name=name, rank=rank: f(name, rank, clock)]
    ]
    rows: list[KernelRow] = []
    for problem in problems(tiny):
        rows += _within(budget, problem, clock, ceiling, guess=5.0)
    return rows, [row for row in updates if row is not None]


def rows_with_templates(
    tiny: bool, clock: Clock, ceiling: Ceilings, budget: Budget
) -> list[KernelRow]:
    """One shape with Inductor's templates among the candidates: it tries dozens of each product."""
    shape = (17, 48, 64, 16) if tiny else (4096, 4096, 4096, 16)
    rows: list[KernelRow] = []
    for mode in ("tensor", "row") if has_row_scales(clock.device) else ("tensor",):
        problem = Problem(*shape, mode, templates=True)
        rows += _within(budget, problem, clock, ceiling, guess=90.0)
    return rows


def _within(
    budget: Budget, problem: Problem, clock: Clock, ceiling: Ceilings, guess: float
) -> list[KernelRow]:
    """What `measure` finds; nothing where there is no time for it."""
    what = "templates" if problem.templates else "kernels"
    kind = what if problem.templates else f"{what} {problem.mode} {problem.accumulation}"

    def work() -> list[KernelRow]:
        return [*measure(problem, clock, ceiling)]

    return budget.run(f"{what} {problem}", kind, work, guess) or []
