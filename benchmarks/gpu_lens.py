"""What a GPU would be told to do in a decoder layer's step, seen without a GPU.

    python benchmarks/gpu_lens.py [--model llama-7b] [--tokens 4096] [--layers 1] [--json FILE]

Inductor writes its code for an H100 that is made of properties alone: nothing is compiled for it or
run there. (It takes a CPU build of torch: autograd of one for GPUs asks the driver for the card.)
Launches in order, the bytes of each by the shapes of its arguments, which of them only carry
activations from one place to another ("passes" over what a product stored, "casts" of anything
else; `lens.passes` says how they are told), what is kept for backward, and which inputs stay in
place, for LoRA by falqon with A trained and A frozen, beside PEFT + Inductor.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import common
from lens import lens, page
from lens.models import SHAPES


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="llama-7b")
    parser.add_argument("--tokens", type=int, default=4096, help="in each sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--layers", type=int, default=1, help="in one graph")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--kernel", default="auto", help="FalqonConfig's: triton, scaled_mm, ...")
    parser.add_argument("--runs", nargs="*", help="some of them: falqon falqon_frozen_a inductor")
    parser.add_argument("--no-host", action="store_true", help="leave host times out")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--text", type=Path, help="write the page there")
    parser.add_argument("--results", action="store_true", help="both, in benchmarks/results/")
    parser.add_argument("--code", type=Path, help="a folder for the generated code")
    args = parser.parse_args(argv)
    if args.results:
        name = f"gpu_lens-{args.model}-{args.layers}"
        name += "" if args.kernel == "auto" else f"-{args.kernel}"
        args.json, args.text = (common.RESULTS / f"{name}{suffix}" for suffix in (".json", ".md"))
    wanted = lens.runs(args.rank, args.kernel)
    seen = {
        name: lens.look(
            SHAPES[args.model], args.batch, args.tokens, args.layers, run, not args.no_host
        )
        for name, run in wanted.items()
        if name in (args.runs or wanted)
    }
    summary = page.summary(seen)
    listings = [line for name, run in seen.items() for line in ("", *page.listing(name, run))]
    print("\n".join(summary))
    if args.text:
        args.text.write_text("\n".join([*summary, *listings]) + "\n", encoding="utf-8")
    else:
        print("\n".join(listings))
    if args.json:
        content = {
            "environment": common.environment(),
            "shape": {"model": args.model, **dataclasses.asdict(SHAPES[args.model])},
            "batch": args.batch,
            "tokens": args.tokens,
            "layers": args.layers,
            "rank": args.rank,
            "kernel": args.kernel,
            "runs": {name: run.numbers() for name, run in seen.items()},
        }
        common.write_json(args.json, content)
    if args.code:
        args.code.mkdir(parents=True, exist_ok=True)
        for name, run in seen.items():
            for what, source in run.code.items():
                (args.code / f"{name}_{what}.py").write_text(source, encoding="utf-8")


if __name__ == "__main__":
    main()
