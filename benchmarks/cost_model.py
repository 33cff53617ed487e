"""The cost model against the clock, on the card at hand.

    python benchmarks/cost_model.py [--device cpu] [--size 1024]

Calibrates the card, then times one layer's step (forward, backward to x and the adapter, AdamW) as
PEFT computes it under Inductor and under falqon, and sets each beside `falqon_fx.passes.cost`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import common
import torch

import falqon_fx
from falqon_fx.passes import cards, cost

sys.path.insert(0, str(common.ROOT))

LAYERS = ((576, 1536), (1536, 576), (2048, 2048))  # out, in
TOKENS = (256, 1024)
RANK = 16
COLUMNS = ["out x in", "tokens", "run", "measured, ms", "predicted, ms", "predicted / measured"]


def step_seconds(backend: str, out: int, features: int, tokens: int, device: str) -> float:
    """The median time of one compiled step."""
    from tests.models import LoraLinear

    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = LoraLinear(features, out, RANK, dtype=torch.bfloat16).to(device)
    compiled = torch.compile(layer, backend=backend)
    trained = [layer.lora_B.weight]
    if backend == "inductor":
        trained.append(layer.lora_A.weight)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    x = torch.randn(tokens, features, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, out, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(24):
        _wait(device)
        start = time.perf_counter()
        compiled(x).backward(grad)
        optimizer.step()
        _wait(device)
        times.append(time.perf_counter() - start)
        optimizer.zero_grad()
        x.grad = None
    return statistics.median(times[4:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=1024, help="of the GEMMs that calibrate")
    args = parser.parse_args(argv)
    card = cards.calibrate(torch.device(args.device), size=args.size)
    print(card)
    rows = []
    for out, features in LAYERS:
        shape = cost.Shape(
            features=features, out=out, rank=RANK, rows=falqon_fx.FalqonConfig().rows(out)
        )
        for tokens in TOKENS:
            for backend, variant in (("inductor", cost.lora), ("falqon", cost.emulated)):
                measured = step_seconds(backend, out, features, tokens, args.device) * 1e3
                predicted = float(cost.seconds(variant(replace(shape, n=tokens)), card)) * 1e3
                numbers = (f"{measured:.2f}", f"{predicted:.2f}", f"{predicted / measured:.2f}")
                rows.append([f"{out} x {features}", str(tokens), backend, *numbers])
                print(dict(zip(COLUMNS, rows[-1], strict=True)), flush=True)
    page = common.markdown(f"Cost model, {card.name}", common.environment(), COLUMNS, rows)
    file = common.result_path("cost_model", ".md")
    file.write_text(page, encoding="utf-8")
    print(f"Written: {file}")


if __name__ == "__main__":
    main()
