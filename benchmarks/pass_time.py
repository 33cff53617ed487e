"""Time of the passes: how it grows with the number of layers, and its share of a first step.

    python benchmarks/pass_time.py                  # growth; writes a plot
    python benchmarks/pass_time.py --first-step     # also compiles SmolLM2-135M from an empty cache

Growth is measured on Llama decoders of 2 to 128 layers (seven sites each): Dynamo traces one
training step, and each pass is timed on the graph that comes out, three times; the median counts.
A straight line is fitted to time against layers; the passes are linear where no point lies far off.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import common
import smollm
import torch
import training
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import fx, nn
from transformers import LlamaConfig, LlamaForCausalLM

import falqon_fx
from falqon_fx.passes.pipeline import PASSES
from falqon_fx.report.data import GraphReport

LAYERS = (2, 4, 8, 16, 32, 64, 128)
ROUNDS = 3
STEPS = tuple(PASSES)


def model(layers: int) -> nn.Module:
    """A narrow Llama with LoRA on all linear layers: the passes don't see how wide it is."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        num_hidden_layers=layers,
    )
    # PEFT writes the names that it found into the config it is given.
    return get_peft_model(LlamaForCausalLM(config), copy.deepcopy(training.LORA))


def measure(layers: int) -> list[GraphReport]:
    """What the passes did to one training graph, ROUNDS times."""
    reports: list[GraphReport] = []

    def look(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        for _ in range(ROUNDS):
            reports.extend(falqon_fx.rewrite(gm, inputs).report.graphs)
        return gm.forward

    torch._dynamo.reset()
    ids = torch.randint(0, 256, (2, 16))
    torch.compile(model(layers), backend=look)(input_ids=ids, labels=ids)
    return reports


def first_step() -> tuple[float, float]:
    """(seconds of the passes, seconds of the whole first step) of SmolLM2-135M."""
    base, _ = smollm.load_model()
    variant = training.Variant("falqon", "falqon", 1e-3, "falqon")
    model = training.with_adapter(variant, base, seed=0)
    falqon_fx.prepare(model)
    spent: list[float] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        start = time.perf_counter()
        falqon_fx.rewrite(gm, inputs)  # once more than the backend does, to time it apart
        spent.append(time.perf_counter() - start)
        return falqon_fx.falqon(gm, inputs)

    call = torch.compile(model, backend=backend)
    trainee = training.Trainee(model, call, call)
    optimizer = training.make_optimizer(model, 1e-3)
    model.train()
    ids = torch.randint(0, 40000, (8, 96))
    start = time.perf_counter()
    training.train_step(trainee, optimizer, smollm.Batch(ids, ids.clone()))
    return sum(spent), time.perf_counter() - start - sum(spent)


def fit(layers: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
    """(slope, intercept, largest relative distance from the line) by least squares."""
    slope, intercept = statistics.linear_regression(layers, seconds)
    off = max(abs(s - slope * n - intercept) / s for n, s in zip(layers, seconds, strict=True))
    return slope, intercept, off


def plot(layers: Sequence[int], seconds: Sequence[float], line: tuple[float, float, float]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(layers, [line[0] * n + line[1] for n in layers], color="0.7", label="fitted line")
    axes.plot(layers, seconds, "o", label=f"measured, median of {ROUNDS}")
    axes.set(xlabel="decoder layers (seven sites each)", ylabel="all passes, s")
    axes.set_title("Pass time grows linearly with the model", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first-step", action="store_true")
    args = parser.parse_args(argv)
    rows, totals = [], []
    table = Table("layers", "sites", *STEPS, "all, s", title="Seconds of each pass")
    for layers in LAYERS:
        reports = measure(layers)
        spent = {s: statistics.median(r.pass_seconds[s] for r in reports) for s in STEPS}
        totals.append(statistics.median(sum(r.pass_seconds.values()) for r in reports))
        assert len(reports[0].sites) == 7 * layers
        row = [str(layers), str(len(reports[0].sites))]
        rows.append([*row, *(f"{spent[s]:.4f}" for s in STEPS), f"{totals[-1]:.3f}"])
        table.add_row(*rows[-1])
    line = fit(LAYERS, totals)
    lines = [f"fitted: {line[0] * 1e3:.2f} ms a layer, largest distance {line[2]:.0%} of a point"]
    if args.first_step:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            passes, whole = first_step()
        lines.append(
            f"SmolLM2-135M, 210 sites, empty cache: passes {passes:.2f} s of a first step of "
            f"{whole:.1f} s = {passes / whole:.1%} (wanted: at most 5%)"
        )
    console = Console(width=110)
    console.print(table, *lines, sep="\n")
    page = common.markdown(
        "Time of the passes", common.environment(), ["layers", "sites", *STEPS, "all, s"], rows
    )
    page += "".join(f"\n- {text}" for text in lines) + "\n"
    file = common.result_path("pass_time", ".md")
    file.write_text(page, encoding="utf-8")
    plot(LAYERS, totals, line).savefig(file.with_suffix(".png"), dpi=140)
    console.print(f"Written: {file.with_suffix('')}.md, .png", highlight=False)


if __name__ == "__main__":
    main()
