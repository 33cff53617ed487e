"""``falqon-fx cost --step``: the arithmetic of a whole training step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from falqon_fx.cost.step.decoder import decoder_of
from falqon_fx.cost.step.figures import Attention, Figure, Figures, figures_for
from falqon_fx.cost.step.layer import AdapterDtype, Step, Transpose
from falqon_fx.cost.step.whole import BASELINE, NOTES, PARTS, RUNS, Run, arithmetic
from falqon_fx_cli.exit_codes import DONE
from falqon_fx_cli.output import print_json

ARITHMETIC = (
    "Arithmetic from published and assumed rates, not a measurement: nothing here ran on a GPU."
)


@dataclass(frozen=True)
class WholeStep:
    """What ``falqon-fx cost --step`` was given, and the defaults of the rest."""

    card: str
    model: str
    batch: int
    tokens: list[int]
    rank: int
    adapter_dtype: AdapterDtype
    transpose: Transpose
    attention: Attention
    cuda_graphs: bool
    given: list[str]
    as_json: bool

    def run(self) -> int:
        """Print a table for each number of tokens, and every figure with its source."""
        decoder = decoder_of(self.model)
        how = self.rank, self.adapter_dtype, self.transpose
        steps = [Step(decoder, self.batch, tokens, *how) for tokens in self.tokens]
        figures = figures_for(self.card, self.attention).given(self.given)
        seen = [(step, arithmetic(step, figures, self.cuda_graphs)) for step in steps]
        if self.as_json:
            head = {
                "note": ARITHMETIC,
                "card": self.card,
                "attention": self.attention,
                "cuda_graphs": self.cuda_graphs,
                "baseline": BASELINE,
            }
            print_json({**head, **_as_data(seen, figures)})
            return DONE
        console = Console(width=120)
        console.print(ARITHMETIC)
        for step, runs in seen:
            console.print(_table(runs, escape(self._title(step))))
        console.print(_sources(figures, steps[0]))
        return DONE

    def _title(self, step: Step) -> str:
        how = f"adapter {step.adapter_dtype}, transpose {step.transpose}"
        how += f", attention {self.attention}{', CUDA graphs' if self.cuda_graphs else ''}"
        what = f"{step.decoder.name} on {self.card}, {step.batch} x {step.tokens} tokens"
        return f"{what}, rank {step.rank}; {how}: ms a step"


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
