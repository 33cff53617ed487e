"""Every family of transformers with stacked experts: what of them is merged, a row each.

    python benchmarks/experts_zoo.py           # ten minutes on two cores

Tiny models with random numbers in float32, PEFT's adapters on all stacks (`tests/experts_zoo.py`).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT))

from tests.experts_zoo import FAMILIES, SIMILAR, Row, measure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--result", type=Path, default=common.RESULTS / "experts_zoo.md")
    given = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in given.families:
        try:
            row = measure(name)
        except Exception as error:  # a family that PEFT, Dynamo or we can't take is a row as well
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            print(name, failed[name], flush=True)
            continue
        if row is not None:
            rows.append(row)
            print(row, flush=True)
    text = page(rows, failed)
    given.result.write_text(text, encoding="utf-8")
    print(text)
    return 0


def page(rows: Sequence[Row], failed: dict[str, str]) -> str:
    """Totals, and a table."""
    done = [row for row in rows if row.merged == row.stacks and row.similar > SIMILAR]
    plain = [row for row in rows if row.layout == "plain"]
    of_plain = [row for row in done if row.layout == "plain"]
    lines = [
        [
            row.family,
            row.layout,
            f"{row.merged} of {row.stacks}",
            row.graphs,
            f"{row.similar:.4f}",
            "; ".join(row.why) if row.merged < row.stacks else "",
        ]
        for row in rows
    ]
    lines += [[name, "", "", "", "", why] for name, why in failed.items()]
    header = ("family", "layout", "merged", "graphs", "least cosine", "reason")
    text = common.markdown("Families with stacked experts", common.environment(), header, lines)
    total = (
        f"\n{len(rows)} families have stacks that transformers' interface runs and PEFT adapts; of "
        f"{len(done)} all are merged, with gradients of A and B whose cosine to PEFT's is "
        f"{SIMILAR} or more. Of the {len(plain)} with the plain layout it is {len(of_plain)}.\n"
    )
    return text + total


if __name__ == "__main__":
    sys.exit(main())
