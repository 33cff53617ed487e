"""What `falqon-fx cost --step` says of LLaMA-7B on an H100: arithmetic, of which nothing ran.

    python benchmarks/cost_step.py [--model llama-7b] [--card H100] [--rank 64] [--results]

For three steps how much faster than PEFT bf16 + Inductor falqon is, with A trained and with A
frozen, as it is lowered today and as is planned, and what that hangs on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import common

from falqon_fx.cost.step.decoder import decoder_of
from falqon_fx.cost.step.figures import Attention, figures_for
from falqon_fx.cost.step.layer import AdapterDtype, Step, Transpose
from falqon_fx.cost.step.whole import BASELINE, PARTS, RUNS, Run, arithmetic

STEPS = {
    "1 x 4096": (1, 4096, False),
    "16 x 512": (16, 512, False),
    "1 x 512, CUDA graphs": (1, 512, True),
}
OWN = ("own_gemm=1.05e15", "summed_gemm=1.05e15")
SAME_SOURCE = "fp8_gemm=1.402e15"  # 1359 TFLOP/s at 0.97 of full waves: FBGEMM#2766, as bf16 is
Choice = tuple[AdapterDtype, Transpose, Attention, tuple[str, ...]]
CHOICES: dict[str, Choice] = {
    "today": ("bfloat16", "store", "flash2", ()),
    "today, W transposed in each step": ("bfloat16", "transient", "flash2", ()),
    "today, our products at 1050 TFLOP/s": ("bfloat16", "store", "flash2", OWN),
    "adapter in K": ("fp8", "store", "flash2", ()),
    "adapter in K, no copies of W": ("fp8", "transient", "flash2", ()),
    "adapter in K, cuDNN attention": ("fp8", "store", "cudnn", ()),
    "adapter in K, FP8 by the source of bf16": ("fp8", "store", "flash2", (SAME_SOURCE,)),
    "adapter in K, cuDNN, FP8 by the source of bf16": ("fp8", "store", "cudnn", (SAME_SOURCE,)),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--card", default="H100")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--results", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(argv)

    def runs(choice: Choice, shape: tuple[int, int, bool]) -> dict[str, Run]:
        dtype, transpose, attention, given = choice
        figures = figures_for(args.card, attention).given(list(given))
        step = Step(decoder_of(args.model), *shape[:2], args.rank, dtype, transpose)
        return arithmetic(step, figures, shape[2])

    mixture = decoder_of(args.model).mixture is not None
    seen = {
        name: {shape: runs(choice, sizes) for shape, sizes in STEPS.items()}
        for name, choice in CHOICES.items()
        if choice[0] == "bfloat16" or not mixture  # all that is built for experts
    }
    rows = [
        [name, *(_ratios(runs) for runs in by_shape.values())] for name, by_shape in seen.items()
    ]
    text = "\n".join(
        [
            common.markdown(
                f"{args.model} on {args.card}, rank {args.rank}: how much faster than PEFT bf16 + "
                "Inductor, A trained / A frozen. Arithmetic, not a measurement",
                common.environment(),
                ["", *STEPS],
                rows,
            ),
            *(_parts(f"{n}, {s}", seen[n][s]) for n, s in _shown() if n in seen),
        ]
    )
    print(text)
    if args.results:
        file = common.RESULTS / f"cost_step-{args.model}-{args.card.lower()}.md"
        file.write_text(text, encoding="utf-8")
        content: dict[str, Any] = {
            "environment": common.environment(),
            "figures": {n: asdict(f) for n, f in figures_for(args.card).listed().items()},
            "runs": {
                name: {s: {k: asdict(r) for k, r in runs.items()} for s, runs in shapes.items()}
                for name, shapes in seen.items()
            },
        }
        common.write_json(file.with_suffix(".json"), content)


def _shown() -> list[tuple[str, str]]:
    return [(name, shape) for name in ("today", "adapter in K") for shape in STEPS]


def _ratios(runs: dict[str, Run]) -> str:
    base = runs[BASELINE].total
    return " / ".join(f"{base / runs[k].total:.2f}" for k in ("falqon", "falqon_frozen_a"))


def _parts(title: str, runs: dict[str, Run]) -> str:
    rows = [
        [part, *(f"{1e3 * run.seconds[part]:.1f}" for run in runs.values())]
        for part in PARTS
        if any(run.seconds[part] for run in runs.values())
    ]
    rows.append(["in all", *(f"{1e3 * run.total:.1f}" for run in runs.values())])
    header = ["ms", *(RUNS[name] for name in runs)]
    return "\n".join([f"## {title}", "", *common.markdown_table(header, rows), ""])


if __name__ == "__main__":
    main()
