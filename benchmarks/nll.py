"""Held-out NLL of falqon against LoRA, each at its own best learning rate.

    python benchmarks/nll.py
    python benchmarks/nll.py --variants falqon --extra amax:scale=amax

LoRA and falqon, with A and B trained and with A frozen, falqon after a calibration on 128 of the
training chats, the paper's rows and its public code. By name: FP8 adapters, and bases
in other forms (INT8, NVFP4, NF4 as QLoRA has it, blocks of FP8 cast again by row). Each variant's
rates are tried on seed 0 (for ``--rate-steps``), the best is trained on all seeds. Steps, batches
and the start of A are the same for all. Beside them stands what the FP8 casts cost before any
training: the NLL and the mean KL divergence per label of the untrained model. Finished runs are
kept in ``results/nll-<date>-<machine>.json`` and are not repeated: an interrupted benchmark goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import peft
import smollm
import torch
import training
from nll_variants import RATES, extra_variant, known_variants, options_text, published
from records import Finished, Results
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from training import Variant

OTHERS = (1e-3, 3e-3)
BATCH_SIZE = 2  # 300 steps read 600 of the 1,109 training pairs
CALIBRATION = 64  # batches of the training split


@dataclass(frozen=True)
class Record(Finished):
    """One finished run."""

    nll_before: float
    nll_after: float
    seconds_per_step: float
    commit: str
    nll_on_base: float | None = None  # of the adapter on the base as it was, by PEFT

    @property
    def score(self) -> float:
        """The NLL to minimize; a diverged run never wins."""
        after = self.nll_after
        return after if after is not None and math.isfinite(after) else math.inf


@dataclass(frozen=True)
class Data:
    """The base and the data, loaded once."""

    base: nn.Module
    tokenizer: Any
    chats: smollm.Split
    length: int
    held_out: list[smollm.Batch]

    @classmethod
    def load(cls) -> Data:
        base, tokenizer = smollm.load_model()
        chats = smollm.split(smollm.chatterbot_pairs())
        length = smollm.fixed_length(tokenizer, chats.train)
        held_out = smollm.batches(tokenizer, chats.held_out, length, BATCH_SIZE, fill=True)
        return cls(base, tokenizer, chats, length, held_out)

    def train(self, steps: int, seed: int) -> list[smollm.Batch]:
        return smollm.training_batches(
            self.tokenizer, self.chats.train, self.length, BATCH_SIZE, steps, seed
        )


# ---------------------------------------------------------------- runs


class Bench:
    """Runs what the results don't hold yet."""

    def __init__(self, results: Results[Record], progress: Progress) -> None:
        self.results = results
        self.progress = progress
        self.data: Data | None = None
        self.commit = common.versions()["commit"]

    def best_rate(self, variant: Variant, rates: Sequence[float], seed: int, steps: int) -> float:
        """The learning rate with the lowest held-out NLL on ``seed`` after ``steps``."""
        tried = [self.record(replace(variant, learning_rate=rate), seed, steps) for rate in rates]
        return min(tried, key=lambda record: record.score).learning_rate

    def record(self, variant: Variant, seed: int, steps: int) -> Record:
        """The finished run, from the results or made now."""
        key = (variant.name, options_text(variant), variant.learning_rate, seed, steps)
        found = self.results.find(key)
        if found is None:
            found = self._run(variant, seed, steps)
            self.results.add(found)
        return found

    def _run(self, variant: Variant, seed: int, steps: int) -> Record:
        self.data = self.data or Data.load()
        data, show = self.data, self.progress
        title = f"{variant.title} {variant.learning_rate:g} seed {seed}"
        read = data.train(CALIBRATION, seed) if variant.calibrated else ()
        trainee = training.build(variant, published(variant.name, data.base), seed, read)
        optimizer = training.make_optimizer(trainee.model, variant.learning_rate)
        # B is zero: seeds and rates begin with the same model, but for a calibration.
        before = None if variant.calibrated else self._before(variant)
        if before is None:
            before = training.mean_nll(trainee, data.held_out, show, f"{title}: before")
        batches = data.train(steps, seed)
        seconds = training.train_steps(trainee, optimizer, batches, show, title)[1]
        after = training.mean_nll(trainee, data.held_out, show, f"{title}: NLL")
        on_base = self._on_base(trainee, seed, title) if variant.backend == "falqon" else after
        show.console.print(
            f"{title}: {before:.3f} -> {after:.3f} in {steps} steps, {on_base:.3f} on the base"
        )
        for task in show.task_ids:
            show.remove_task(task)
        return Record(
            variant.name,
            options_text(variant),
            variant.learning_rate,
            seed,
            steps,
            before,
            after,
            statistics.median(seconds[1:] or seconds),
            self.commit,
            on_base,
        )

    def _on_base(self, trained: training.Trainee, seed: int, title: str) -> float:
        """What the adapter gives that was trained here, where nothing else is of falqon."""
        assert self.data is not None
        plain = Variant("lora", "LoRA", 0.0, "eager")
        trainee = training.build(plain, self.data.base, seed)
        adapter = peft.get_peft_model_state_dict(trained.model)
        peft.set_peft_model_state_dict(trainee.model, adapter)
        return training.mean_nll(
            trainee, self.data.held_out, self.progress, f"{title}: on the base"
        )

    def _before(self, variant: Variant) -> float | None:
        same = (variant.name, options_text(variant))
        known = (r.nll_before for r in self.results.records if (r.variant, r.options) == same)
        return None if variant.options.get("init") == "svd" else next(known, None)


def measure(
    bench: Bench,
    variants: Sequence[Variant],
    rates: Sequence[float] | None,
    seeds: Sequence[int],
    steps: int,
    rate_steps: int,
) -> dict[str, list[Record]]:
    """The records of each variant's best learning rate, one per seed."""
    chosen = {}
    for variant in variants:
        own = rates or RATES.get(variant.name, OTHERS)
        rate = bench.best_rate(variant, own, seeds[0], rate_steps)
        best = replace(variant, learning_rate=rate)
        chosen[variant.name] = [bench.record(best, seed, steps) for seed in seeds]
        training.release()  # runs of one variant share their compiled graphs, others don't
        gc.collect()
    return chosen


# ---------------------------------------------------------------- report

HEADER = (
    *("variant", "options", "best lr", "before", "after: mean", "spread", "each seed"),
    "each, on the base as it was",
)


def summary(chosen: dict[str, list[Record]]) -> list[list[str]]:
    """A row a variant: mean and spread (largest minus smallest) over the seeds."""
    rows = []
    for name, records in chosen.items():
        after = [record.score for record in records]
        rows.append(
            [
                name,
                records[0].options,
                f"{records[0].learning_rate:g}",
                f"{records[0].nll_before:.3f}",
                f"{statistics.fmean(after):.3f}",
                f"{max(after) - min(after):.3f}",
                " ".join(f"{value:.3f}" for value in after),
                " ".join(f"{r.nll_on_base:.3f}" if r.nll_on_base else "-" for r in records),
            ]
        )
    return rows


def claims(chosen: dict[str, list[Record]]) -> list[str]:
    """What falqon loses against the same LoRA, where both are there."""
    mean = {name: statistics.fmean(r.score for r in records) for name, records in chosen.items()}
    pairs = (
        *(("falqon", "lora"), ("falqon_calibrated", "lora"), ("int8_calibrated", "lora")),
        ("falqon_frozen_a", "lora_frozen_a"),
    )
    return [
        f"{ours} - {theirs} = {mean[ours] - mean[theirs]:+.3f}"
        for ours, theirs in pairs
        if {ours, theirs} <= set(mean)
    ]


@dataclass(frozen=True)
class Untrained:
    """What the FP8 casts cost before training, per label of the held-out pairs."""

    labels: int
    nll: float  # of the model as it is
    nll_fp8: float
    kl: float
    kl_standard_error: float

    def __str__(self) -> str:
        return (
            f"untrained, {self.labels} labels: NLL {self.nll:.3f} -> {self.nll_fp8:.3f} in FP8, "
            f"KL {self.kl:.4f} +- {self.kl_standard_error:.4f} per label"
        )


@torch.no_grad()
def untrained(data: Data, inner: str) -> Untrained:
    """The model as it is against the same model in FP8."""
    variant = Variant("falqon", "falqon", 0.0, "falqon", {"inner": inner})
    fp8, plain = training.build(variant, data.base, 0), data.base.eval()
    fp8.model.eval()
    kl, before, after = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    for batch in data.held_out:
        wanted = batch.labels[:, 1:] != smollm.IGNORED
        labels = batch.labels[:, 1:][wanted]
        log_p, log_q = (
            call(input_ids=batch.input_ids).logits[:, :-1][wanted].float().log_softmax(-1)
            for call in (plain, fp8.evaluate)
        )
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        for of, values in ((log_p, before), (log_q, after)):
            values.append(-of.gather(-1, labels[:, None])[:, 0])
    every = torch.cat(kl)
    nll, nll_fp8 = (float(torch.cat(values).mean()) for values in (before, after))
    error = float(every.std() / len(every) ** 0.5)
    return Untrained(len(every), nll, nll_fp8, float(every.mean()), error)


def sweep(records: Sequence[Record], seed: int, steps: int) -> list[list[str]]:
    """Every learning rate that was tried on ``seed``."""
    tried = [r for r in records if r.seed == seed and r.steps == steps]
    tried.sort(key=lambda r: (r.variant, r.options, r.learning_rate))
    groups = itertools.groupby(tried, key=lambda r: (r.variant, r.options))
    return [
        [name, options, "; ".join(f"{r.learning_rate:g}: {r.score:.3f}" for r in group)]
        for (name, options), group in groups
    ]


def report(
    chosen: dict[str, list[Record]],
    at_start: Untrained,
    results: Results[Record],
    rate_steps: int,
    console: Console,
) -> None:
    """Print the table and write it as Markdown beside the JSON."""
    rows = summary(chosen)
    first = next(iter(chosen.values()))
    steps, seeds = first[0].steps, len(first)
    title = f"Held-out NLL after {steps} steps of batch {BATCH_SIZE}, {seeds} seeds"
    table = Table(*HEADER, title=title)
    for row in rows:
        table.add_row(*row)
    lines = [*claims(chosen), str(at_start)]
    console.print(table, *lines, sep="\n")
    page = common.markdown(title, common.environment(), HEADER, rows)
    page += "".join(f"\n- {line}" for line in lines)
    page += f"\n\nEvery learning rate, {rate_steps} steps, seed {first[0].seed}:\n\n"
    tried = sweep(results.records, first[0].seed, rate_steps)
    page += "\n".join(common.markdown_table(("variant", "options", "NLL"), tried)) + "\n"
    file = results.file.with_suffix("")
    file.with_name(f"{file.name}-{steps}-steps.md").write_text(page, encoding="utf-8")
    console.print(f"Written: {file}.json, .csv, -{steps}-steps.md", highlight=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="*", default=list(RATES))
    parser.add_argument("--extra", nargs="*", default=[], metavar="NAME:KEY=VALUE,...")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate-steps", type=int, help="to choose a rate by; default: --steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--rates", type=float, nargs="+", help="for all; default: a list each")
    parser.add_argument("--baseline", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--inner", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--results", type=Path, help="default: this machine's newest")
    args = parser.parse_args(argv)
    known = known_variants(args.baseline, args.inner)
    for name in args.variants:
        if name not in known:
            parser.error(f"unknown variant {name!r}; known: {', '.join(known)}")
    args.chosen = [known[name] for name in args.variants]
    args.chosen += [extra_variant(text, args.inner) for text in args.extra]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    console = Console()
    file = args.results or common.latest_or_new("nll")
    results = Results(file, Record, protocol={"batch_size": BATCH_SIZE})
    with training.progress_bar(console) as progress:
        bench = Bench(results, progress)
        rate_steps = args.rate_steps or args.steps
        chosen = measure(bench, args.chosen, args.rates, args.seeds, args.steps, rate_steps)
        at_start = untrained(bench.data or Data.load(), args.inner)
    report(chosen, at_start, results, rate_steps, console)


if __name__ == "__main__":
    main()
