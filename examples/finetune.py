"""Fine-tune SmolLM2-135M-Instruct five ways on the same batches and compare.

    python examples/finetune.py                      # the packaged model and data
    python examples/finetune.py --model DIR --data FILE.jsonl --steps 200

The runs: LoRA and falqon, each with A and B trained and with A frozen; and falqon as the method's
public code updates, row by row. Writes metrics.json, run.json, loss.png and the trained adapter
under ``--out``. The data file has one ``{"prompt": ..., "response": ...}`` or ``{"messages":
[{"role": ..., "content": ...}, ...]}`` a line; about 120 of them, at most a fifth, are held out,
whole questions at a time.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from smollm import (
    Batch,
    DataError,
    Split,
    batches,
    chatterbot_pairs,
    fixed_length,
    load_model,
    read_jsonl,
    split,
    training_batches,
)
from torch import nn
from training import (
    PUBLIC_CODE,
    Trained,
    Trainee,
    Variant,
    answers,
    build,
    mean_nll,
    progress_bar,
    release,
    run,
    site_count,
    site_weight_bytes,
)

# Each at the best of a short list on seed 0 (benchmarks/nll.py).
LEARNING_RATES = {
    "lora": 1e-3,
    "falqon": 1e-3,
    "lora_frozen_a": 3e-3,
    "falqon_frozen_a": 3e-3,
    "falqon_public_code": 1e-1,
}
# Over so few steps on 2 cores compiling costs more than it saves, for all of them.
BASELINE = INNER = "eager"


@dataclass(frozen=True)
class Work:
    """The model and the batches that every run shares."""

    base: nn.Module
    tokenizer: Any
    train: list[Batch]
    held_out: list[Batch]
    questions: list[str]  # two held-out ones


@dataclass(frozen=True)
class Outcome:
    """What is reported of one run."""

    variant: Variant
    trained: Trained
    sites: int
    site_weight_bytes: int
    answers: list[str]

    def metrics(self) -> dict[str, float]:
        """The run's entry in metrics.json."""
        return {
            "nll_before": self.trained.nll_before,
            "nll_after": self.trained.nll_after,
            "seconds_per_step": self.trained.seconds_per_step,
            "first_step_seconds": self.trained.first_step_seconds,
            "site_weight_bytes": self.site_weight_bytes,
            "learning_rate": self.variant.learning_rate,
        }


def variants(args: argparse.Namespace) -> dict[str, Variant]:
    """The five runs, by the name they have in metrics.json."""
    rate = {name: args.learning_rate or rate for name, rate in LEARNING_RATES.items()}
    plain, inner = args.baseline, {"inner": args.inner}
    runs = (
        Variant("lora", "LoRA", rate["lora"], plain),
        Variant("falqon", "falqon", rate["falqon"], "falqon", inner),
        Variant("lora_frozen_a", "LoRA, A frozen", rate["lora_frozen_a"], plain, train_a=False),
        Variant(
            "falqon_frozen_a",
            "falqon, A frozen",
            rate["falqon_frozen_a"],
            "falqon",
            inner,
            train_a=False,
        ),
        Variant(
            "falqon_public_code",
            "falqon, public code",
            rate["falqon_public_code"],
            "falqon",
            PUBLIC_CODE | inner,
            train_a=False,
        ),
    )
    return {variant.name: variant for variant in runs}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(LEARNING_RATES)
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, help="JSON lines to train on")
    parser.add_argument("--steps", type=_positive, default=16)
    parser.add_argument("--batch-size", type=_positive, default=8)
    parser.add_argument(
        "--evaluate", type=_positive, default=40, help="held-out pairs to measure the NLL of"
    )
    parser.add_argument("--length", type=_positive, help="tokens a row; default: fits 90%%")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/finetune"))
    parser.add_argument("--runs", nargs="+", choices=names, default=names, metavar="RUN")
    parser.add_argument("--baseline", choices=("eager", "inductor"), default=BASELINE)
    parser.add_argument("--inner", choices=("inductor", "eager"), default=INNER)
    parser.add_argument("--learning-rate", type=float, help="one for all runs")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


# ---------------------------------------------------------------- work


def prepare_work(args: argparse.Namespace, console: Console) -> Work:
    """Load the model and the data, and cut the data into batches of one shape."""
    chats = read_jsonl(args.data) if args.data else chatterbot_pairs()
    parts = split(chats)
    with console.status("loading the model"):
        base, tokenizer = load_model(args.model)
    length = args.length or fixed_length(tokenizer, parts.train, covered=0.9, step=16)
    train = training_batches(tokenizer, parts.train, length, args.batch_size, args.steps, args.seed)
    measured = parts.held_out[: args.evaluate]
    held_out = batches(tokenizer, measured, length, args.batch_size, fill=True)
    if not held_out:
        raise DataError(f"every held-out prompt is longer than {length} tokens: raise --length")
    console.print(
        f"{len(parts.train)} training and {len(measured)} held-out pairs; "
        f"{args.steps} steps of {args.batch_size} x {length} tokens, "
        f"{torch.get_num_threads()} threads"
    )
    return Work(base, tokenizer, train, held_out, pick_questions(parts))


def pick_questions(parts: Split) -> list[str]:
    """The first two held-out questions that begin a conversation."""
    return [*dict.fromkeys(c.question for c in parts.held_out if len(c.messages) == 1)][:2]


def execute(
    variant: Variant,
    work: Work,
    args: argparse.Namespace,
    nll_before: float | None,
    console: Console,
) -> Outcome:
    """Build, train and question one variant; the default falqon run saves its adapter."""
    with progress_bar(console) as progress:
        trainee = build(variant, work.base, args.seed)
        trained = run(trainee, variant, work.train, work.held_out, progress, nll_before)
        said = answers(trainee, work.tokenizer, work.questions)
    outcome = Outcome(
        variant, trained, site_count(trainee, variant), site_weight_bytes(trainee), said
    )
    if variant.name == "falqon":
        trainee.model.save_pretrained(args.out / "adapter")
    del trainee
    release()
    return outcome


def adapter_in_peft(work: Work, folder: Path, console: Console) -> float:
    """Held-out NLL of the saved adapter on the dense base, in PEFT alone."""
    model = PeftModel.from_pretrained(work.base, folder)
    with progress_bar(console) as progress:
        trainee = Trainee(model, model, model)
        return mean_nll(trainee, work.held_out, progress, "falqon's adapter in plain PEFT")


# ---------------------------------------------------------------- report


def print_table(outcomes: list[Outcome], in_peft: float | None, console: Console) -> None:
    """The comparison, and the answers below it."""
    table = Table(title="Fine-tuning, same batches and seeds")
    table.add_column("run")
    for title in (
        "compiled by",
        "learning rate",
        "NLL before",
        "NLL after",
        "s / step",
        "first step, s",
        "site weights, MB",
    ):
        table.add_column(title, justify="right")
    for outcome in outcomes:
        trained = outcome.trained
        table.add_row(
            outcome.variant.title,
            compiled_by(outcome.variant),
            f"{outcome.variant.learning_rate:g}",
            f"{trained.nll_before:.3f}",
            f"{trained.nll_after:.3f}",
            f"{trained.seconds_per_step:.3f}",
            f"{trained.first_step_seconds:.1f}",
            f"{outcome.site_weight_bytes / 1e6:.1f}",
        )
    console.print(table)
    if in_peft is not None:
        console.print(f"falqon's adapter, loaded into plain PEFT on the dense base: {in_peft:.3f}")


def compiled_by(variant: Variant) -> str:
    """What ran the training steps."""
    inner = variant.options.get("inner")
    return f"{variant.backend} + {inner}" if inner else variant.backend


def print_answers(outcomes: list[Outcome], questions: list[str], console: Console) -> None:
    """What each model says to the held-out questions."""
    for index, question in enumerate(questions):
        console.print(f"\n[bold]{question}[/bold]", highlight=False)
        for outcome in outcomes:
            console.print(f"  {outcome.variant.title}: {outcome.answers[index]}", highlight=False)


def write_files(
    outcomes: list[Outcome], in_peft: float | None, work: Work, args: argparse.Namespace
) -> None:
    """metrics.json for machines, run.json with all that was seen, loss.png for people."""
    falqon = [outcome for outcome in outcomes if outcome.variant.backend == "falqon"]
    metrics = {
        "sites": (falqon or outcomes)[0].sites,
        "runs": {outcome.variant.name: outcome.metrics() for outcome in outcomes},
        "adapter_in_peft_nll": in_peft,
    }
    _write_json(args.out / "metrics.json", metrics)
    details = {
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens_per_step": work.train[0].input_ids.numel(),
        "questions": work.questions,
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    _write_json(args.out / "run.json", details)
    plot_losses(outcomes, args.out / "loss.png")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def plot_losses(outcomes: list[Outcome], file: Path, window: int = 5) -> None:
    """Training loss of each run: every step thin, the mean of the last ``window`` bold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for index, outcome in enumerate(outcomes):
        losses = outcome.trained.losses
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=f"C{index}", linewidth=0.7, alpha=0.35)
        label = f"{outcome.variant.title} (lr {outcome.variant.learning_rate:g})"
        axes.plot(steps, _running_mean(losses, window), color=f"C{index}", label=label)
    axes.set(xlabel="step", ylabel="training loss (NLL of an answer token)")
    axes.set_title(f"Same batches; bold: mean of the last {window} steps", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=140)
    pyplot.close(figure)


def _running_mean(values: list[float], window: int) -> list[float]:
    ends = range(1, len(values) + 1)
    return [sum(values[max(0, end - window) : end]) / min(end, window) for end in ends]


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 when it went well, 2 when the model or data can't be used."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 110)  # a log has room for the table
    try:
        work = prepare_work(args, console)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    base_nll: float | None = None
    for name, variant in variants(args).items():
        if name not in args.runs:
            continue
        plain = variant.backend != "falqon"
        outcomes.append(execute(variant, work, args, base_nll if plain else None, console))
        base_nll = outcomes[-1].trained.nll_before if plain else base_nll
    in_peft = None
    if "falqon" in args.runs:
        in_peft = adapter_in_peft(work, args.out / "adapter", console)
    print_table(outcomes, in_peft, console)
    print_answers(outcomes, work.questions, console)
    write_files(outcomes, in_peft, work, args)
    console.print(f"\nWritten: {args.out}/metrics.json, run.json, loss.png", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
