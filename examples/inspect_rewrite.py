"""Look before you train: what falqon would rewrite, whether it pays, and what stays constant.

    python examples/inspect_rewrite.py [--model FOLDER] [--card H100] [--out report.html]

1. `falqon_fx.explain` on the model as it is: nothing is compiled, nothing changes.
2. The same with an option changed: what is left out, and why.
3. A few training steps: A and B move, the FP8 base does not.
4. One page with all of it and the history of these steps; one site rebuilt alone and checked
   against exact arithmetic.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import smollm
import torch

import falqon_fx
from falqon_fx.report.repro import arguments, check


def main(argv: Sequence[str] | None = None) -> falqon_fx.RewriteReport:
    """Inspect one model; returns the report that the page shows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="by default SmolLM2-135M from its package")
    parser.add_argument("--card", help="whose times are predicted (default: the one at hand)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    base, _ = smollm.load_model(args.model)
    lora = peft.LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    ids = torch.randint(base.config.vocab_size, (2, args.tokens))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}

    config = falqon_fx.FalqonConfig(card=args.card, inner="eager")
    report = falqon_fx.explain(model, config=config, **batch)
    print(report)

    less = falqon_fx.FalqonConfig(card=args.card, exclude=("*.layers.0.*",))
    left = falqon_fx.explain(model, config=less, **batch).rejected
    print(f"With exclude='*.layers.0.*' {len(left)} sites stay as they are, first: {left[0]}\n")

    falqon_fx.prepare(model)
    compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    first = next(iter(falqon_fx.adapters(model).values()))
    base_before, merged_before = first.base(), first.merged()
    with falqon_fx.watch(model) as seen:
        for step in range(1, args.steps + 1):
            loss = compiled(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            moved = float((first.merged() - merged_before).norm())
            same = torch.equal(first.base(), base_before)
            print(
                f"step {step}: loss {loss.item():.3f}; {report.sites[0].path}: |s·B·A| "
                f"{moved:.4f}, base {'unchanged' if same else 'CHANGED'}"
            )
    args.out.write_text(report.to_html(seen.history), encoding="utf-8")
    print(f"\n{args.out}: {len(report.sites)} sites, open it in a browser")

    site = report.sites[0]
    print(f"{site.path} alone: {check(**arguments(site))}")
    return report


if __name__ == "__main__":
    main()
