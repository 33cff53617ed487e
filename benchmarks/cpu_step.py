"""Step time of falqon on CPU against PEFT, eager and with Inductor, on SmolLM2-135M.

    python benchmarks/cpu_step.py

Each contender lives in its own process with its own empty compile cache. They take turns: in a
round every contender runs a few steps, in an order that rotates, while the others sleep; a ratio
is taken within its round. The baseline is whichever bf16 PEFT run (A and B trained, adapter in
float32 or bf16, eager or Inductor) has the lowest median; the peer of a run is the fastest of those
whose adapter has its dtype (PEFT itself makes a bf16 model's adapter float32). All models are in
bf16, but for "float32 model", which is what a CPU without bf16 products is fast at. Such a CPU is
emulated by ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2; with
--runs falqon "eager, float32 model" that model is the baseline. Also measured: the first step, the
memory of the process around ``prepare``, the bytes of the merged weights.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import smollm
import torch
import training
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from training import Trainee, Variant

import falqon_fx

CONTENDERS = {
    "falqon": Variant("falqon", "falqon", 1e-3, "falqon"),
    "falqon, bf16 adapter": Variant(
        "falqon_bf16", "falqon, bf16 adapter", 1e-3, "falqon", bf16_adapter=True
    ),
    "falqon, int8": Variant("falqon_int8", "falqon, int8", 1e-3, "falqon", {"base_dtype": "int8"}),
    "falqon, by blocks": Variant("falqon_blocks", "falqon", 1e-3, "falqon", by_blocks=True),
    "eager": Variant("eager", "eager", 1e-3, "eager"),
    "inductor": Variant("inductor", "inductor", 1e-3, "inductor"),
    "eager, bf16 adapter": Variant("eager_bf16", "eager", 1e-3, "eager", bf16_adapter=True),
    "inductor, bf16 adapter": Variant(
        "inductor_bf16", "inductor", 1e-3, "inductor", bf16_adapter=True
    ),
    "eager, float32 model": Variant("eager_f32", "eager", 1e-3, "eager"),
    # for information: they train less than PEFT does as it is
    "eager, A frozen": Variant("eager_fa", "eager", 1e-3, "eager", train_a=False),
    "inductor, A frozen": Variant("inductor_fa", "inductor", 1e-3, "inductor", train_a=False),
}
FLOAT32 = {"eager, float32 model"}
FEW = ("falqon", "eager", "eager, float32 model")  # where a step in bf16 takes minutes
BASELINES = ("eager", "inductor", "eager, bf16 adapter", "inductor, bf16 adapter")


# ---------------------------------------------------------------- in the contender's process


@dataclass(frozen=True)
class Start:
    """What a contender reports once it is ready."""

    tokens: int
    first_step_seconds: float
    site_bytes: int
    bf16_bytes: int
    rss_before_prepare: int | None = None
    rss_after_prepare: int | None = None
    prepare_seconds: float | None = None


def resident_bytes() -> int:
    """Memory of this process after giving back what is free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # musl and macOS have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


class Contender:
    """One model, trained on command."""

    def __init__(self, variant: Variant, batch_size: int, dtype: torch.dtype) -> None:
        self.variant = variant
        base, tokenizer = smollm.load_model()
        base.to(dtype)
        train = smollm.split(smollm.chatterbot_pairs()).train
        length = smollm.fixed_length(tokenizer, train)
        self.batches = smollm.training_batches(tokenizer, train, length, batch_size, 16, seed=0)
        self.model = training.with_adapter(variant, base, seed=0)
        self.done = 0

    def start(self) -> Start:
        """Merge if falqon, compile, take the first step."""
        layers: Any = training.lora_layers(self.model).values()
        bf16 = sum(int(layer.get_base_layer().weight.nbytes) for layer in layers)
        memory = self._prepare() if self.variant.backend == "falqon" else {}
        self.trainee: Trainee = training.compiled(self.variant, self.model)
        self.optimizer = training.make_optimizer(self.model, self.variant.learning_rate)
        self.model.train()
        (first,) = self.steps(1)
        sites = training.site_weight_bytes(self.trainee)
        return Start(self.batches[0].input_ids.numel(), first, sites, bf16, **memory)

    def _prepare(self) -> dict[str, Any]:
        before, start = resident_bytes(), time.perf_counter()
        falqon_fx.prepare(self.model, falqon_fx.FalqonConfig(**self.variant.options))
        seconds = time.perf_counter() - start
        return {
            "rss_before_prepare": before,
            "rss_after_prepare": resident_bytes(),
            "prepare_seconds": seconds,
        }

    def steps(self, count: int) -> list[float]:
        """Seconds of each of the next steps."""
        seconds = []
        for _ in range(count):
            batch = self.batches[self.done % len(self.batches)]
            start = time.perf_counter()
            training.train_step(self.trainee, self.optimizer, batch)
            seconds.append(time.perf_counter() - start)
            self.done += 1
        return seconds


def serve(name: str, batch_size: int) -> None:
    """Answer the commands on stdin, one JSON line each; everything else printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    dtype = torch.float32 if name in FLOAT32 else torch.bfloat16
    contender = Contender(CONTENDERS[name], batch_size, dtype)
    print(json.dumps(asdict(contender.start())), file=answers)
    for line in sys.stdin:
        print(json.dumps(contender.steps(int(line))), file=answers)


# ---------------------------------------------------------------- in the main process


class Process:
    """A contender's process, seen from outside."""

    def __init__(self, name: str, batch_size: int, cache: Path, log: Path) -> None:
        self.name = name
        self.log = log
        own = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "FALQON_CACHE": str(cache / "falqon")}
        environment = os.environ | own
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--contender", name, "--batch-size", str(batch_size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=environment,
            )

    def started(self) -> Start:
        """Wait for the first step to be over."""
        return Start(**self._read())

    def steps(self, count: int) -> list[float]:
        """Have it take steps, and wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        seconds: list[float] = self._read()
        return seconds

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-20:])
            raise RuntimeError(f"contender {self.name!r} ended:\n{tail}")
        return json.loads(line)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


@contextlib.contextmanager
def processes(
    names: Sequence[str], batch_size: int, progress: Progress
) -> Iterator[dict[str, tuple[Process, Start]]]:
    """The contenders, started one after the other."""
    task = progress.add_task("first steps", total=len(names), note="")
    running: dict[str, tuple[Process, Start]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for index, name in enumerate(names):
                progress.update(task, note=name)
                place = Path(folder) / str(index)
                process = Process(name, batch_size, place, place.with_suffix(".log"))
                running[name] = (process, process.started())
                progress.update(task, advance=1, note="")
            yield running
        finally:
            for process, _ in running.values():
                process.stop()


def take_rounds(
    running: dict[str, tuple[Process, Start]], rounds: int, steps: int, progress: Progress
) -> dict[str, list[float]]:
    """Median step time of every contender in each round; one more round before is discarded."""
    names = list(running)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    task = progress.add_task("rounds", total=rounds + 1, note="")
    for index in range(rounds + 1):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            median = statistics.median(running[name][0].steps(steps))
            if index:
                seconds[name].append(median)
        progress.update(task, advance=1)
    return seconds


# ---------------------------------------------------------------- report


@dataclass(frozen=True)
class Comparison:
    """All that was measured."""

    starts: dict[str, Start]
    seconds: dict[str, list[float]]  # a number a round

    @property
    def baseline(self) -> str:
        """The fastest of the runs that count."""
        there = [name for name in BASELINES if name in self.seconds]
        there = there or [name for name in self.seconds if name in FLOAT32]
        return min(there, key=lambda name: statistics.median(self.seconds[name]))

    def peer(self, name: str) -> str | None:
        """The fastest of the runs that count and train an adapter of the same dtype."""
        same = [
            other
            for other in BASELINES
            if other in self.seconds
            and CONTENDERS[other].bf16_adapter == CONTENDERS[name].bf16_adapter
        ]
        return min(same, key=lambda other: statistics.median(self.seconds[other]), default=None)

    def ratios(self, name: str, base: str | None = None) -> list[float]:
        """Its step time over that of ``base`` (the baseline), round by round."""
        pairs = zip(self.seconds[name], self.seconds[base or self.baseline], strict=True)
        return [mine / other for mine, other in pairs]

    def rows(self) -> list[list[str]]:
        return [self._row(name) for name in self.seconds]

    def _row(self, name: str) -> list[str]:
        start, ratios = self.starts[name], self.ratios(name)
        memory = "-"
        if start.rss_before_prepare is not None and start.rss_after_prepare is not None:
            memory = f"{start.rss_before_prepare / 1e6:.0f} -> {start.rss_after_prepare / 1e6:.0f}"
        peer = self.peer(name)
        return [
            name + (" (baseline)" if name == self.baseline else ""),
            f"{statistics.median(self.seconds[name]):.3f}",
            f"{statistics.median(self.ratios(name, peer)):.3f}" if peer else "-",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} .. {max(ratios):.3f}",
            f"{start.first_step_seconds:.1f}",
            f"{start.site_bytes / start.bf16_bytes:.3f}",
            memory,
        ]


HEADER = (
    "run",
    "s / step",
    "to its peer",
    "to the baseline",
    "over the rounds",
    "first step, s",
    "weights / bf16",
    "RSS around prepare, MB",
)


def report(comparison: Comparison, console: Console) -> None:
    """Print, and write JSON, CSV and Markdown."""
    tokens = next(iter(comparison.starts.values())).tokens
    rounds = len(next(iter(comparison.seconds.values())))
    title = f"CPU step, SmolLM2-135M, {tokens} tokens, {rounds} rounds"
    table = Table(*HEADER, title=title)
    for row in comparison.rows():
        table.add_row(*row)
    console.print(table)
    about = common.environment()
    content = {
        "environment": about,
        "baseline": comparison.baseline,
        "starts": {name: asdict(start) for name, start in comparison.starts.items()},
        "seconds": comparison.seconds,
        "ratios": {name: comparison.ratios(name) for name in comparison.seconds},
    }
    name = f"cpu_step_{tokens}" + ("_float32" if comparison.baseline in FLOAT32 else "")
    common.write_json(common.result_path(name, ".json"), content)
    rows = [
        {"run": run, "round": index, "seconds": value}
        for run, values in comparison.seconds.items()
        for index, value in enumerate(values)
    ]
    common.write_csv(common.result_path(name, ".csv"), rows)
    page = common.markdown(title, about, HEADER, comparison.rows())
    common.result_path(name, ".md").write_text(page, encoding="utf-8")
    console.print(f"Written: {common.result_path(name, '')}.json, .csv, .md", highlight=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 96 tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of each contender in a round")
    usual = [name for name in CONTENDERS if name not in FLOAT32]
    default = usual if smollm.native_dtype() == torch.bfloat16 else list(FEW)
    parser.add_argument("--runs", nargs="+", choices=CONTENDERS, default=default)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not set(args.runs) & {*BASELINES, *FLOAT32}:
        parser.error(f"--runs needs one of {', '.join([*BASELINES, *FLOAT32])}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.contender:
        serve(args.contender, args.batch_size)
        return
    console = Console()
    with (
        training.progress_bar(console) as progress,
        processes(args.runs, args.batch_size, progress) as running,
    ):
        seconds = take_rounds(running, args.rounds, args.steps, progress)
        starts = {name: start for name, (_, start) in running.items()}
    report(Comparison(starts, seconds), console)


if __name__ == "__main__":
    main()
