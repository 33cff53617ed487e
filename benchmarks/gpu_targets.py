"""The targets of a run of `benchmarks/gpu.py` on an H100: what was wanted, what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_kernels import LIBRARY, KernelRow, UpdateRow
from gpu_measure import geometric_mean
from gpu_steps import StepRow

# What a layer with an adapter runs in forward.
PLAN = ("O_A", "O with the adapter")


@dataclass(frozen=True)
class Target:
    """``found`` is None where the run did not measure it."""

    what: str
    wanted: float
    found: float | None
    at_least: bool = True

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        met = self.found >= self.wanted if self.at_least else self.found <= self.wanted
        return "met" if met else "missed"


def targets(
    steps: Sequence[StepRow], kernels: Sequence[KernelRow], updates: Sequence[UpdateRow]
) -> list[Target]:
    return [*_step_targets(steps), *_kernel_targets(kernels), *_small_targets(steps, updates)]


def _step_targets(steps: Sequence[StepRow]) -> list[Target]:
    long = [s for s in steps if s.shape == "llama-7b" and (s.batch, s.length) == (1, 4096)]
    short = [s for s in steps if s.shape == "llama-7b" and s.tokens == 8192 and s.length <= 1024]
    plain = [s for s in steps if s.shape == "llama-3-8b" and s.length == 4096 and s.rank == 16]
    bf16 = ("peft + inductor", "peft + inductor, fp32 adapter")
    return [
        Target("7B, sequence 4096: speed against bf16 PEFT + inductor", 1.65, _ratio(long, bf16)),
        Target("7B, 8k tokens of sequence <= 1024: the same", 1.8, _ratio(short, bf16)),
        Target("7B: speed against NF4, compiled", 1.6, _ratio(long + short, ("nf4 + inductor",))),
        Target("7B: speed against NF4 as bitsandbytes runs", 2.2, _ratio(long + short, ("nf4",))),
        Target("Llama-3-8B, rank 16, 4096: tokens/s", 20_000, _rate(plain, False)),
        Target("the same with checkpointing: tokens/s", 15_500, _rate(plain, True)),
    ]


def _ratio(steps: Sequence[StepRow], others: Sequence[str]) -> float | None:
    """The least of: seconds of the fastest of ``others`` / seconds of falqon, in each setting that
    has both; of whole models.
    """
    found = []
    for mine in steps:
        if mine.contender != "falqon" or mine.checkpointing:
            continue
        setting = (mine.batch, mine.length, mine.rank)
        theirs = [
            s.whole_seconds
            for s in steps
            if s.contender in others
            and not s.checkpointing
            and (s.batch, s.length, s.rank) == setting
        ]
        if theirs:
            found.append(min(theirs) / mine.whole_seconds)
    return min(found, default=None)


def _rate(steps: Sequence[StepRow], checkpointing: bool) -> float | None:
    mine = [s for s in steps if s.contender == "falqon" and s.checkpointing == checkpointing]
    return max((s.tokens_per_second for s in mine), default=None)


def _kernel_targets(kernels: Sequence[KernelRow]) -> list[Target]:
    large = [k for k in kernels if k.out >= 4096 and k.tokens >= 2048]
    plan = [*_plan_of_library(large).values()]

    def own(mode: str) -> float | None:
        best: dict[object, float] = {}
        for k in large:
            if k.what == "O alone" and k.candidate.startswith("triton") and k.mode == mode:
                assert k.of_library is not None
                best[_problem(k)] = max(best.get(_problem(k), 0.0), k.of_library)
        return geometric_mean([*best.values()]) if best else None

    return [
        Target(
            "forward: the chosen plan against _scaled_mm, geometric mean",
            0.95,
            geometric_mean(plan) if plan else None,
        ),
        Target("the same, the least", 0.88, min(plan, default=None)),
        Target("our own kernel against _scaled_mm, tensorwise", 0.85, own("tensor")),
        Target("the same, rowwise", 1.0, own("row")),
    ]


def _problem(k: KernelRow) -> tuple[object, ...]:
    return k.mode, k.accumulation, k.tokens, k.out, k.features, k.rank


def _plan_of_library(rows: Sequence[KernelRow]) -> dict[object, float]:
    """By problem: the time of the library on W alone / that of `PLAN`."""
    fastest = {(_problem(k), k.what): k.seconds for k in rows if k.chosen}
    found: dict[object, float] = {}
    for k in rows:
        if k.candidate == LIBRARY:
            parts = [fastest.get((_problem(k), what)) for what in PLAN]
            if None not in parts:
                found[_problem(k)] = k.seconds / sum(part for part in parts if part)
    return found


def _small_targets(steps: Sequence[StepRow], updates: Sequence[UpdateRow]) -> list[Target]:
    def update(what: str, rank: int) -> UpdateRow | None:
        found: UpdateRow | None = _first(
            updates, lambda u: (u.what, u.shape, u.rank) == (what, "llama-7b", rank)
        )
        return found

    def milliseconds(row: UpdateRow | None) -> float | None:
        return None if row is None else 1e3 * row.seconds

    step = _first(
        steps,
        lambda s: (
            (s.shape, s.contender, s.tokens, s.rank) == ("llama-7b", "falqon", 4096, 16)
            and not s.checkpointing
        ),
    )
    casts = update("casts", 16)
    share = None
    if casts is not None and step is not None:
        share = casts.seconds / step.whole_seconds
    found = [
        Target("casts of all adapters / step, 7B, 4k tokens", 0.003, share, at_least=False),
        Target(
            "casts of all adapters, 7B, rank 64, ms",
            0.5,
            milliseconds(update("casts", 64)),
            at_least=False,
        ),
        Target(
            'update="rows": update of all sites, 7B, ms',
            0.5,
            milliseconds(update("rows", 16)),
            at_least=False,
        ),
    ]
    for rank, wanted in ((16, 0.51), (64, 0.52)):
        falqon = (s for s in steps if s.shape == "llama-7b" and s.contender == "falqon")
        row = next((s for s in falqon if s.rank == rank), None)
        ratio = None if row is None else row.linear_bytes_ratio
        found.append(
            Target(f"FP8 linears / their bf16 bytes, 7B, rank {rank}", wanted, ratio, False)
        )
    return found


def _first(rows: Sequence[Any], test: Callable[[Any], bool]) -> Any:
    return next((row for row in rows if test(row)), None)


def table(found: Sequence[Target]) -> list[list[str]]:
    """Rows for a page: what, wanted, found, verdict."""
    return [
        [
            t.what,
            f"{'>=' if t.at_least else '<='} {t.wanted:g}",
            "" if t.found is None else f"{t.found:.4g}",
            t.verdict,
        ]
        for t in found
    ]
