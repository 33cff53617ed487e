"""Full training steps of `benchmarks/gpu.py`: which, in what order, and what is kept of each."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace

import gpu_models
import torch
from gpu_measure import (
    Budget,
    Ceilings,
    Clock,
    Timing,
    free,
    has_row_scales,
    peak_gib,
    repeat,
)
from gpu_models import BEHIND, CONTENDERS, IN_K, NVFP4, SHAPES, Phases, Shape, Trainer, Unavailable

LAUNCH_BOUND = 1024  # tokens up to which a step is replayed as a CUDA graph too


@dataclass(frozen=True)
class Case:
    """One model in one form; measured without checkpointing and, if ``checkpointing``, with it."""

    shape: str
    batch: int
    length: int
    rank: int
    contender: str
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def __str__(self) -> str:
        return f"{self.shape} {self.batch}x{self.length} r{self.rank} {self.contender}"


@dataclass(frozen=True)
class StepRow:
    """Seconds of a training step: medians, and the spread of the whole.

    The ``layer_`` fields are what one more layer costs: the step of all layers less that of half of
    them. ``whole_seconds`` is the step of a model with all its layers, measured ones and those that
    did not fit alike. ``of_ceiling`` is the least time that this step's FLOPs take at the ceilings
    measured on this card, linears in FP8 where the contender has them so, as a fraction of the time
    taken.
    """

    shape: str
    batch: int
    length: int
    rank: int
    contender: str
    checkpointing: bool
    layers: int
    seconds: float
    spread: float
    forward: float
    backward: float
    optimizer: float
    layer_forward: float
    layer_backward: float
    whole_seconds: float
    graph_seconds: float | None
    of_ceiling: float
    first_step_seconds: float
    peak_gib: float
    linear_bytes_ratio: float | None
    attention: str
    note: str = ""

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.whole_seconds


def cases(tiny: bool) -> list[Case]:
    """The most important first: the budget drops from the end."""
    if tiny:
        names = ["falqon", IN_K, NVFP4, "falqon, A frozen", "falqon, rows", "peft + inductor"]
        names += ["nf4", "torchao + lora"]
        names += ["fp8 + lora"] * has_row_scales("cpu")
        return [Case("tiny", 2, 16, 8, name, checkpointing=name == "falqon") for name in names]
    faster = ("peft + inductor", "peft + inductor, fp32 adapter")
    listed: list[Case] = []

    def add(
        shape: str, batch: int, length: int, rank: int, *names: str, ckpt: bool = False
    ) -> None:
        listed.extend(Case(shape, batch, length, rank, name, ckpt) for name in names)

    add("llama-7b", 1, 4096, 16, "falqon", BEHIND, NVFP4, *faster, "nf4 + inductor", "nf4")
    add("llama-7b", 16, 512, 16, "falqon", BEHIND, "peft + inductor")
    graphs = ("falqon, reduce-overhead", "peft + inductor, reduce-overhead")
    add("llama-7b", 1, 512, 16, "falqon", BEHIND, "peft + inductor", *graphs)
    add("llama-3-8b", 1, 4096, 16, "falqon", "peft + inductor", ckpt=True)
    add("llama-7b", 8, 1024, 16, "falqon", NVFP4, *faster, "nf4 + inductor", "nf4")
    add("llama-7b", 1, 4096, 64, "falqon", "peft + inductor")
    add("qwen-2.5-7b", 1, 4096, 16, "falqon", "peft + inductor")
    add("llama-13b", 1, 4096, 16, "falqon", "peft + inductor")
    add("llama-7b", 1, 4096, 16, "falqon, A frozen", "peft + inductor, A frozen")
    add("llama-7b", 1, 4096, 16, "fp8 + lora", "peft")
    add("llama-7b", 1, 4096, 16, "fp8linear + lora")
    add("llama-7b", 1, 4096, 16, "torchao + lora", "falqon, kernel=scaled_mm", "falqon, tensorwise")
    add("llama-7b", 4, 4096, 16, "falqon", "peft + inductor")
    add("llama-13b", 8, 1024, 64, "falqon", "peft + inductor")
    add("qwen-2.5-7b", 8, 1024, 64, "falqon", "peft + inductor")
    add("llama-3-8b", 8, 1024, 64, "falqon", "peft + inductor")
    add("llama-7b", 1, 4096, 16, "falqon, rows", "falqon, bf16 adapter", "peft, fp32 adapter")
    return listed


def layers_that_fit(shape: Shape, tokens: int, clock: Clock) -> int:
    """How many layers of bf16 PEFT, the largest contender, fit into this card.

    Bytes of a layer: its bf16 weights, and per token about 40 · hidden + 12 · inner of activations
    (with float32 adapters). The head keeps bf16 and float32 logits and their gradients.
    """
    if not clock.gpu:
        return shape.layers
    linears = 2 * sum(out * features for out, features in shape.sites)
    layer = linears + tokens * (40 * shape.hidden + 12 * shape.inner)
    head = 4 * shape.vocabulary * shape.hidden + 14 * tokens * shape.vocabulary
    room = 0.85 * torch.cuda.get_device_properties(0).total_memory - head
    return max(2, min(shape.layers, int(room // layer)))


def measure(case: Case, clock: Clock, ceiling: Ceilings) -> list[StepRow]:
    """A row, or two with ``checkpointing``.

    Raises `Unavailable` where a package is missing, torch.OutOfMemoryError where two layers are too
    many.
    """
    shape = SHAPES[case.shape]
    layers = layers_that_fit(shape, case.tokens, clock)
    while True:
        try:
            return [*_rows(case, shape, layers, clock, ceiling)]
        except torch.OutOfMemoryError:
            if layers <= 2:
                raise
            layers = max(2, layers // 2)


def _rows(
    case: Case, shape: Shape, layers: int, clock: Clock, ceiling: Ceilings
) -> Iterator[StepRow]:
    free(clock)
    contender = CONTENDERS[case.contender]
    if not clock.gpu:  # a rehearsal: compiling would take most of its time
        quick = {"inductor": "eager"}.get(contender.backend, contender.backend)
        options = (("inner", "eager"),) if quick == "falqon" else ()
        contender = replace(contender, backend=quick, options=(*contender.options, *options))
    attention = gpu_models.attention_backend(shape, clock.device)
    model = gpu_models.build(contender, shape, layers, case.rank, clock.device)
    trainer = Trainer(model, contender, (case.batch, case.length), clock, attention)
    start = time.perf_counter()
    trainer.step()
    first = time.perf_counter() - start
    if clock.gpu:
        torch.cuda.reset_peak_memory_stats()
    ratio = None
    if contender.base == "falqon":
        whole = sum(2 * out * features for out, features in shape.sites) * layers
        ratio = gpu_models.linear_bytes(model) / whole
    for checkpointing in (False, True) if case.checkpointing else (False,):
        trainer.checkpointing = checkpointing
        phases = _steps(trainer, clock)
        with gpu_models.some_layers(trainer, layers // 2):
            half = _steps(trainer, clock)
        forward, backward = (
            max(0.0, (_median(phases, name) - _median(half, name)) / (layers - layers // 2))
            for name in ("forward", "backward")
        )
        seconds = _median(phases, "whole")
        replayed = None
        if case.tokens <= LAUNCH_BOUND and clock.gpu and not checkpointing:
            replayed = _replayed(trainer, clock)
        yield StepRow(
            case.shape,
            case.batch,
            case.length,
            case.rank,
            case.contender,
            checkpointing,
            layers,
            seconds,
            max(p.whole for p in phases) - min(p.whole for p in phases),
            _median(phases, "forward"),
            _median(phases, "backward"),
            _median(phases, "optimizer"),
            forward,
            backward,
            seconds + (forward + backward) * (shape.layers - layers),
            None if replayed is None else replayed.median,
            _least(case, shape, layers, ceiling) / seconds,
            first,
            peak_gib(clock),
            ratio,
            attention.name.lower(),
        )
    del model, trainer


def _steps(trainer: Trainer, clock: Clock) -> list[Phases]:
    for _ in range(2 if clock.gpu else 0):
        trainer.step()
    return [trainer.step() for _ in range(7 if clock.gpu else 1)]


def _median(phases: list[Phases], name: str) -> float:
    return float(statistics.median(getattr(p, name) for p in phases))


def _replayed(trainer: Trainer, clock: Clock) -> Timing | None:
    """Forward and backward from a CUDA graph; None where they can't be captured."""
    try:
        return repeat(trainer.graphed(), clock)
    except RuntimeError as error:
        print(f"no CUDA graph: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.synchronize()
        return None


def _least(case: Case, shape: Shape, layers: int, ceiling: Ceilings) -> float:
    linears, attention = shape.layer_flops(case.tokens, case.length)
    rest = attention * layers + shape.head_flops(case.tokens)
    in_fp8 = CONTENDERS[case.contender].base in ("falqon", "fp8", "fp8linear", "torchao")
    if in_fp8 and case.contender != NVFP4:
        return ceiling.seconds(bf16=rest, fp8=linears * layers)
    return ceiling.seconds(bf16=rest + linears * layers, fp8=0.0)


def all_rows(
    tiny: bool, clock: Clock, ceiling: Ceilings, budget: Budget
) -> tuple[list[StepRow], list[str]]:
    """(rows, what could not run and why)."""
    rows: list[StepRow] = []
    failures: list[str] = []
    for case in cases(tiny):

        def work(case: Case = case) -> list[StepRow]:
            return measure(case, clock, ceiling)

        try:
            found = budget.run(f"step {case}", case.contender, work, guess=40.0)
        except Unavailable as error:
            failures.append(f"{case.contender}, {case}: {error}")
            continue
        except Exception as error:  # one contender's failure must not cost the others their rows
            failures.append(f"{case.contender}, {case}: {_cause(error)}")
            if CONTENDERS[case.contender].base == "falqon":
                traceback.print_exc()
            continue
        for row in found or ():
            rows.append(row)
            print(f"{case} checkpointing={row.checkpointing}: {row.seconds:.4f} s", flush=True)
    free(clock)
    return rows, failures


def _cause(error: BaseException) -> str:
    """The lines of an error, as far as Dynamo did not add them, as one."""
    text = str(error).split("from user code")[0].split("Hint:")[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"
