"""Where A starts: PEFT's Kaiming, what layers read, or the gradient; held-out NLL after few steps.

    python benchmarks/init_a.py
    python benchmarks/init_a.py --starts keep activations --seeds 0 --steps 60 300
    python benchmarks/init_a.py --a frozen --rate 0.001

SmolLM2-135M-Instruct with LoRA, B zero at first, without falqon: what differs is where A starts,
and a step in eager mode costs no compiler. ``activations``: the rows of A are the first r
eigenvectors of E[x · xᵀ] of what the layer reads (EVA, arXiv 2410.07170). ``gradient``: the first r
right singular vectors of ΣdL/dW (LoRA-GA, arXiv 2407.05000, which starts with B too). Both from the
first 32 training batches of the seed. Each row is scaled so that its share of x · Aᵀ is as large as
of a row of Kaiming's, so that a learning rate means the same, but for a tenth of the mean of all
directions in that share: one in which a single token is large would get a row ten times as long.
Seeds have their own batches and their own Kaiming A; differences are paired by seed, with Kaiming's
at the same rate. The rate is constant, so that one run is evaluated at several steps. Finished runs
are kept and not repeated.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import smollm
import torch
import training
from nll import BATCH_SIZE, Data
from records import Finished, Results
from rich.console import Console
from torch import Tensor, nn
from training import Variant
from weighted import Kept, keep_outputs

STARTS = ("keep", "activations", "gradient")
RATES = {True: 1e-3, False: 3e-3}  # with A trained, and frozen
READ = 32  # batches
DAMPING = 0.1


@dataclass(frozen=True)
class Record(Finished):
    """One finished run; ``options`` names the start of A, ``variant`` whether it is trained."""

    nll_after: float
    loss: float  # mean of all steps, before each

    @property
    def score(self) -> float:
        return self.nll_after


Rows = Callable[[Tensor, Tensor, int], Tensor]  # E[x · xᵀ], ΣdL/dW, r


def of_inputs(moment: Tensor, grad: Tensor, rank: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(moment.double()).eigenvectors
    return vectors[:, -rank:].t().float()


def of_gradient(moment: Tensor, grad: Tensor, rank: int) -> Tensor:
    vectors: Tensor = torch.linalg.svd(grad, full_matrices=False).Vh
    return vectors[:rank]


ROWS: dict[str, Rows] = {"activations": of_inputs, "gradient": of_gradient}


def read(layers: dict[str, Any], call: Any, batches: Sequence[smollm.Batch]) -> Any:
    """E[x · xᵀ] and ΣdL/dW of the layers under the adapters."""
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    moments = {n: torch.zeros(m.weight.shape[1], m.weight.shape[1]) for n, m in bases.items()}
    grads = {name: torch.zeros_like(m.weight, dtype=torch.float32) for name, m in bases.items()}
    kept: Kept = []
    tokens = 0
    hooks = keep_outputs(bases, kept)
    for batch in batches:
        for row, labels in zip(batch.input_ids, batch.labels, strict=True):
            kept.clear()
            end = int((labels != smollm.IGNORED).nonzero().max()) + 1
            loss = call(input_ids=row[None, :end], labels=labels[None, :end]).loss
            found = torch.autograd.grad(loss, [out for *_, out in kept])
            for (name, x, _), grad in zip(kept, found, strict=True):
                x, grad = x[0].float(), grad[0].float()
                moments[name].addmm_(x.t(), x)
                grads[name].addmm_(grad.t(), x)
            tokens += end
    for of_layer in hooks:
        of_layer.remove()
    return {name: (moments[name] / tokens, grads[name]) for name in bases}


Started = dict[str, dict[str, Tensor]]  # A of each layer, by start


def starts(data: Data, seed: int, wanted: Sequence[str]) -> Started:
    """Where A is to start, once for a seed: with B = 0 neither A nor whether it is trained matters
    to what is read. Of PEFT's own nothing.
    """
    model = training.with_adapter(
        Variant("lora", "LoRA", 0.0, "eager"), copy.deepcopy(data.base), seed
    )
    layers = training.lora_layers(model)
    seen = read(layers, model, data.train(READ, seed))
    found: Started = {of: {} for of in wanted if of in ROWS}
    for name, (moment, grad) in seen.items():
        for of, of_layer in found.items():
            of_layer[name] = sized(ROWS[of](moment, grad, training.LORA.r), moment)
    return found


def sized(rows: Tensor, moment: Tensor) -> Tensor:
    """The rows, each with the share of x · Aᵀ that one of Kaiming's has."""
    size = (rows * (rows @ moment)).sum(1, keepdim=True)  # E[(x · rowᵀ)²]
    mean = moment.diagonal().mean()
    return rows * (mean / 3 / (size + DAMPING * mean)).sqrt()  # Kaiming's variance is 1 / 3 in


@torch.no_grad()
def start(model: nn.Module, rows: dict[str, Tensor]) -> None:
    """Overwrite A."""
    for name, layer in training.lora_layers(model).items():
        a: Any = layer.lora_A["default"]
        a.weight.copy_(rows[name])


def cut(batch: smollm.Batch) -> smollm.Batch:
    """The batch up to its last label: what is behind can't be seen, and nothing is compiled."""
    end = int((batch.labels != smollm.IGNORED).any(0).nonzero().max()) + 1
    return smollm.Batch(batch.input_ids[:, :end], batch.labels[:, :end])


def run(
    data: Data,
    of: str,
    train_a: bool,
    rate: float,
    seed: int,
    steps: Sequence[int],
    started: Started,
) -> Iterator[Record]:
    """A record at each of the steps."""
    variant = Variant(of, of, rate, "eager", train_a=train_a)
    model = training.with_adapter(variant, copy.deepcopy(data.base), seed)
    batches = [cut(batch) for batch in data.train(max(steps), seed)]
    held_out = [cut(batch) for batch in data.held_out]
    if of in started:
        start(model, started[of])
    trainee = training.compiled(variant, model)
    optimizer = training.make_optimizer(model, rate)
    name = "A trained" if train_a else "A frozen"
    losses: list[float] = []
    with training.progress_bar(Console(quiet=True)) as quiet:
        for begin, end in pairwise([0, *sorted(steps)]):
            losses += training.train_steps(trainee, optimizer, batches[begin:end], quiet, of)[0]
            after = training.mean_nll(trainee, held_out, quiet, of)
            yield Record(name, of, rate, seed, end, after, statistics.fmean(losses))


def key_of(record: Record) -> tuple[int, str, float, str]:
    return record.steps, record.variant, record.learning_rate, record.options


def paired(records: Sequence[Record]) -> list[list[str]]:
    """A row of steps, variant, rate and start: the mean after training, and how much that is more
    than of the default start with the same seed and rate, with the standard error over seeds.
    """

    def of_seeds(*key: Any) -> dict[int, Record]:
        return {r.seed: r for r in records if key_of(r) == key}

    rows = []
    for steps, name, rate, of in sorted({key_of(record) for record in records}):
        own, kept = of_seeds(steps, name, rate, of), of_seeds(steps, name, rate, "keep")
        seeds = sorted(own.keys() & kept.keys())
        differences = [own[s].nll_after - kept[s].nll_after for s in seeds]
        of_loss = [own[s].loss - kept[s].loss for s in seeds]
        rows.append(
            [
                str(steps),
                name,
                of,
                f"{rate:g}",
                f"{statistics.fmean(r.nll_after for r in own.values()):.3f}",
                with_error(differences),
                with_error(of_loss),
                " ".join(f"{d:+.3f}" for d in differences),
            ]
        )
    return rows


def with_error(values: Sequence[float]) -> str:
    if len(values) < 2:
        return " ".join(f"{v:+.3f}" for v in values) or "-"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.3f} ± {error:.3f}"


HEADER = (
    "steps",
    "variant",
    "start of A",
    "lr",
    "held out",
    "against keep",
    "loss while training",
    "seeds",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS)
    parser.add_argument("--a", nargs="+", default=("frozen", "trained"))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--steps", type=int, nargs="+", default=(60, 300))
    parser.add_argument("--rate", type=float, help="by default 0.001 with A trained, 0.003 frozen")
    parser.add_argument("--results", type=Path, help="a JSON file to write to, and to go on with")
    args = parser.parse_args(argv)
    protocol = {"batch_size": BATCH_SIZE, "read": READ, "damping": DAMPING}
    results = Results(args.results or common.latest_or_new("init_a"), Record, protocol)
    data: Data | None = None
    for seed in args.seeds:
        started: Started | None = None
        for train_a, of in itertools.product([a == "trained" for a in args.a], args.starts):
            of_a = "A trained" if train_a else "A frozen"
            rate = args.rate or RATES[train_a]
            keys = [(of_a, of, rate, seed, steps) for steps in args.steps]
            if all(results.find(key) for key in keys):
                continue
            data = data or Data.load()
            if started is None:
                started = starts(data, seed, args.starts)
            for record in run(data, of, train_a, rate, seed, args.steps, started):
                if not results.find(record.key):
                    results.add(record)
                    print(record, flush=True)
            training.release()
    title = f"Held-out NLL after steps of batch {BATCH_SIZE}, by where A starts"
    page = common.markdown(title, common.environment(), HEADER, paired(results.records))
    results.file.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
