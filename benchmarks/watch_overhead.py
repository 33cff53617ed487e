"""What `falqon_fx.watch` adds to a training step with update="rows" on this machine.

    python benchmarks/watch_overhead.py [--blocks 8] [--steps 120]

Blocks of two linears (576 x 1536 and back, the sizes of SmolLM2-135M's MLP), rank 16, bf16, 768
tokens, AdamW; with the base weights at hand, and prepared, where the drift is looked at too.
Watched and unwatched steps take turns of four in one process, so that both see the same machine;
medians of each. What is added while nobody watches is one truth test a write-back, at most one a
site and step: timed alone, since it drowns in a step's scatter.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import timeit
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import common
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import falqon_fx
from falqon_fx.rows.audit import observers

TURN = 4
COLUMNS = ["weights", "blocks", "sites", "unwatched, ms", "watched, ms", "added", "added when off"]


def measure(blocks: int, steps: int, prepared: bool) -> list[str]:
    """One row: medians over ``steps`` steps of each kind."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    each = [
        (nn.Linear(576, 1536), nn.GELU(), nn.Linear(1536, 576), nn.RMSNorm(576, eps=1e-6))
        for _ in range(blocks)
    ]
    plain = nn.Sequential(*itertools.chain(*each)).to(torch.bfloat16)
    linears = [str(i) for i, layer in enumerate(plain) if isinstance(layer, nn.Linear)]
    model = get_peft_model(plain, LoraConfig(r=16, target_modules=linears))
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
        trained += [parameter] if "lora_B" in name else []
    config = falqon_fx.FalqonConfig(update="rows")
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    x = torch.randn(768, 576, dtype=torch.bfloat16)
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * steps // TURN + 2):
        watched = turn % 2 == 1
        with falqon_fx.watch(model) if watched else nullcontext():
            for _ in range(TURN):
                start = time.perf_counter()
                (compiled(x) - x).float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if turn >= 2:  # the first ones compile
                    times[watched].append(time.perf_counter() - start)
    off, on = (statistics.median(times[kind]) * 1e3 for kind in (False, True))
    tests = min(timeit.repeat(lambda: bool(observers), number=1000)) * 2 * blocks  # ms
    shares = (f"{on / off - 1:+.1%}", f"{tests / off:+.4%}")
    weights = "FP8 alone" if prepared else "bf16 and FP8"
    return [weights, str(blocks), str(2 * blocks), f"{off:.1f}", f"{on:.1f}", *shares]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args(argv)
    rows = []
    for prepared in (False, True):
        rows.append(measure(args.blocks, args.steps, prepared))
        print(dict(zip(COLUMNS, rows[-1], strict=True)))
    page = common.markdown("falqon_fx.watch", common.environment(), COLUMNS, rows)
    file = common.result_path("watch_overhead", ".md")
    file.write_text(page, encoding="utf-8")
    print(f"Written: {file}")


if __name__ == "__main__":
    main()
