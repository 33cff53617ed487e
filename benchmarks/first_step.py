"""The first step with the whole model compiled, and block by block.

    python benchmarks/first_step.py

SmolLM2-135M, A and B trained, each first step in a new process with empty caches; the runs take
turns, and a ratio is taken within its round. Then the two of the last round take steps in turns, as
in `cpu_step.py`: what compiling block by block costs a step.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import common
import cpu_step
import training
from rich.console import Console
from rich.table import Table

WHOLE, BLOCKS = "falqon", "falqon, by blocks"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 96 tokens")
    parser.add_argument("--starts", type=int, default=2, help="first steps of each run")
    parser.add_argument("--rounds", type=int, default=5, help="of steps after that")
    parser.add_argument("--steps", type=int, default=3, help="of each run in a round")
    args = parser.parse_args(argv)
    console = Console(width=110)
    first: dict[str, list[float]] = {WHOLE: [], BLOCKS: []}
    seconds: dict[str, list[float]] = {}
    with training.progress_bar(console) as progress:
        for start in range(args.starts):
            with cpu_step.processes(tuple(first), args.batch_size, progress) as running:
                for name, (_, measured) in running.items():
                    first[name].append(measured.first_step_seconds)
                    console.print(f"{name}: first step {measured.first_step_seconds:.1f} s")
                if start == args.starts - 1:
                    seconds = cpu_step.take_rounds(running, args.rounds, args.steps, progress)
    report(first, seconds, console)


def ratios(values: dict[str, list[float]], name: str) -> str:
    """Median and range of a run's seconds to those of the whole model, round by round."""
    pairs = zip(values[name], values[WHOLE], strict=True)
    found = sorted(mine / whole for mine, whole in pairs)
    return f"{statistics.median(found):.3f} ({found[0]:.3f} .. {found[-1]:.3f})"


def report(
    first: dict[str, list[float]], seconds: dict[str, list[float]], console: Console
) -> None:
    """Print, and write JSON and Markdown."""
    header = ("run", "first step, s", "to the whole", "s / step", "to the whole")
    rows = [
        [
            name,
            f"{statistics.median(first[name]):.1f}",
            ratios(first, name),
            f"{statistics.median(seconds[name]):.3f}",
            ratios(seconds, name),
        ]
        for name in first
    ]
    starts = len(first[WHOLE])
    title = f"First step, SmolLM2-135M, {starts} cold starts of each"
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    about = common.environment()
    content = {"environment": about, "first_step_seconds": first, "step_seconds": seconds}
    common.write_json(common.result_path("first_step", ".json"), content)
    page = common.markdown(title, about, header, rows)
    common.result_path("first_step", ".md").write_text(page, encoding="utf-8")
    console.print(f"Written: {common.result_path('first_step', '')}.json, .md", highlight=False)


if __name__ == "__main__":
    main()
