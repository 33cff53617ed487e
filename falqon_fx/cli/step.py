"""``falqon-fx cost --step``: the arithmetic of a whole training step."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from falqon_fx.cost.step.decoder import decoder_of
from falqon_fx.cost.step.figures import Attention, Figure, Figures, figures_for
from falqon_fx.cost.step.layer import AdapterDtype, Step, Transpose
from falqon_fx.cost.step.whole import BASELINE, NOTES, PARTS, RUNS, Run, arithmetic
from falqon_fx.errors import FalqonError
from falqon_fx_cli.exit_codes import DONE

ARITHMETIC = (
    "Arithmetic from published and assumed rates, not a measurement: nothing here ran on a GPU."
)
_OWN = ("model", "batch", "transpose", "attention", "cuda_graphs", "figure")


def refuse_without_step(arguments: argparse.Namespace) -> None:
    """Words that only ``--step`` understands are an error without it.

    Raises:
        FalqonError: there is such a word.
    """
    given = [name for name in _OWN if getattr(arguments, name) is not None]
    if given:
        word = f"--{given[0].replace('_', '-')}"
        raise FalqonError(word, "it is of a whole step", "Add --step")
    if arguments.adapter_dtype == "fp8":
        problem = "it is of a whole step"
        raise FalqonError("--adapter-dtype fp8", problem, "Add --step, or give a dtype of A and B")


def run(arguments: argparse.Namespace, card: str) -> int:
    """Print a table for each number of tokens, and every figure with its source."""
    steps = _steps(arguments)
    attention: Attention = "flash2" if arguments.attention is None else arguments.attention
    figures = figures_for(card, attention).given(arguments.figure or [])
    graphs = bool(arguments.cuda_graphs)
    seen = [(step, arithmetic(step, figures, graphs)) for step in steps]
    if arguments.json:
        head = {
            "note": ARITHMETIC,
            "card": card,
            "attention": attention,
            "cuda_graphs": graphs,
            "baseline": BASELINE,
        }
        print(json.dumps({**head, **_as_data(seen, figures)}, indent=1))
        return DONE
    console = Console(width=120)
    console.print(ARITHMETIC)
    for step, runs in seen:
        how = f"adapter {step.adapter_dtype}, transpose {step.transpose}, attention {attention}"
        title = f"{step.decoder.name} on {card}, {step.batch} x {step.tokens} tokens, rank "
        title += f"{step.rank}; {how}{', CUDA graphs' if graphs else ''}: ms a step"
        console.print(_table(runs, escape(title)))
    console.print(_sources(figures, steps[0]))
    return DONE


def _steps(arguments: argparse.Namespace) -> list[Step]:
    given = arguments.adapter_dtype, arguments.transpose
    dtype: AdapterDtype = "bfloat16" if given[0] is None else given[0]
    transpose: Transpose = "transient" if given[1] is None else given[1]
    if given[0] == "float32":
        problem = "with --step it is how falqon adds the adapter"
        raise FalqonError("--adapter-dtype float32", problem, "Give bfloat16 or fp8")
    batch = 1 if arguments.batch is None else arguments.batch
    tokens = [4096] if arguments.tokens is None else arguments.tokens
    for name, value in (
        ("batch", batch),
        ("rank", arguments.rank),
        *(("tokens", n) for n in tokens),
    ):
        if value < 1:
            raise FalqonError(f"--{name} {value}", "there must be one at least", "Give more")
    decoder = decoder_of(arguments.model or "llama-7b")
    return [Step(decoder, batch, n, arguments.rank, dtype, transpose) for n in tokens]


def _as_data(seen: list[tuple[Step, dict[str, Run]]], figures: Figures) -> dict[str, Any]:
    first = seen[0][0]
    return {
        "model": asdict(first.decoder),
        "batch": first.batch,
        "rank": first.rank,
        "adapter_dtype": first.adapter_dtype,
        "transpose": first.transpose,
        "steps": [{"tokens": step.tokens, "runs": _runs(runs)} for step, runs in seen],
        "figures": {name: asdict(figure) for name, figure in figures.listed().items()},
        "notes": NOTES,
    }


def _runs(runs: dict[str, Run]) -> dict[str, Any]:
    return {
        name: {
            "ms": {part: 1e3 * seconds for part, seconds in one.seconds.items()},
            "total_ms": 1e3 * one.total,
            "speedup": runs[BASELINE].total / one.total,
            "host_ms": 1e3 * one.host,
            "launches": one.launches,
            "kept_bytes": one.kept,
            "weight_bytes": int(one.weights),
            "library_products": one.library,
        }
        for name, one in runs.items()
    }


def _table(runs: dict[str, Run], title: str) -> Table:
    table = Table("", title=title, title_justify="left")
    for name in runs:
        table.add_column(RUNS[name], justify="right")

    def row(name: str, cells: list[str]) -> None:
        table.add_row(name, *cells)

    for part in PARTS:
        of_each = [one.seconds[part] for one in runs.values()]
        if any(of_each):
            row("waiting for the host" if part == "host" else part, [_ms(t) for t in of_each])
    table.add_section()
    row("in all", [_ms(one.total) for one in runs.values()])
    row(
        f"of {RUNS[BASELINE]}", [f"{runs[BASELINE].total / one.total:.2f}" for one in runs.values()]
    )
    table.add_section()
    row("the host's time", [_ms(one.host) for one in runs.values()])
    row("launches of a layer", [str(one.launches) for one in runs.values()])
    row("products by the library", [str(one.library or "") for one in runs.values()])
    row("kept for backward, GiB", [f"{one.kept / 2**30:.2f}" for one in runs.values()])
    row("layers' weights, GiB", [f"{one.weights / 2**30:.2f}" for one in runs.values()])
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _sources(figures: Figures, step: Step) -> Table:
    table = Table("figure", "value", title="Figures", title_justify="left")
    table.add_column("source", overflow="fold")
    for name, figure in figures.listed().items():
        if not name.startswith("attention_"):
            table.add_row(name, f"{figure.value:.4g} {figure.unit}".strip(), escape(figure.source))
    for name in ("forward", "backward"):
        by_length: dict[int, Figure] = getattr(figures, name)
        values = [f"{length}: {one.value:.4g}" for length, one in by_length.items()]
        source = next(iter(by_length.values())).source
        table.add_row(f"attention {name}, FLOP/s", "\n".join(values), escape(source))
    table.add_section()
    table.add_row("sizes", "", escape(step.decoder.source))
    for name, note in NOTES.items():
        table.add_row(name, "", escape(note))
    return table
