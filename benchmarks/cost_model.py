"""The cost model against the clock, on the card at hand.

    python benchmarks/cost_model.py [--device cpu] [--size 2048]

Calibrates the card, then times a layer's step (forward, backward to x and the adapter, AdamW) as
PEFT computes it under Inductor and under falqon, and sets each beside `falqon_fx.cost.model`: a
quarter of the step of four such layers with an input each, since what a call costs on the host is a
model's and not a layer's. Medians of ten steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import common
import torch
from torch import Tensor, nn

from falqon_fx.cost import cards, variants
from falqon_fx.cost import model as cost
from falqon_fx.ops.lowering import gemm_dtype

sys.path.insert(0, str(common.ROOT))

LAYERS = ((576, 1536), (1536, 576), (2048, 2048))  # out, in
TOKENS = (256, 1024)
RANK = 16
COPIES, WARM, STEPS = 4, 4, 10
COLUMNS = ["out x in", "tokens", "run", "measured, ms", "predicted, ms", "predicted / measured"]


class Layers(nn.Module):
    """Layers alike, each with an input of its own."""

    def __init__(self, features: int, out: int) -> None:
        from tests.models import LoraLinear

        super().__init__()
        made = (LoraLinear(features, out, RANK, dtype=torch.bfloat16) for _ in range(COPIES))
        self.layers = nn.ModuleList(made)

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


def step_seconds(backend: str, out: int, features: int, tokens: int, device: str) -> float:
    """The median time of one layer's part of a compiled step."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Layers(features, out).to(device)
    compiled = torch.compile(model, backend=backend)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    made: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    xs = [torch.randn(tokens, features, **made, requires_grad=True) for _ in range(COPIES)]
    grads = [torch.randn(tokens, out, **made) for _ in range(COPIES)]
    times = []
    for _ in range(WARM + STEPS):
        _wait(device)
        start = time.perf_counter()
        torch.autograd.backward(compiled(xs), grads)
        optimizer.step()
        _wait(device)
        times.append(time.perf_counter() - start)
        optimizer.zero_grad()
        for x in xs:
            x.grad = None
    return statistics.median(times[WARM:]) / COPIES


def operands(device: str) -> str:
    """The dtype in which what is decoded is multiplied."""
    return str(gemm_dtype(torch.bfloat16, torch.device(device))).removeprefix("torch.")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=2048, help="of the GEMMs that calibrate")
    args = parser.parse_args(argv)
    card = cards.calibrate(torch.device(args.device), size=args.size)
    print(card)
    rows = []
    for out, features in LAYERS:
        shape = variants.Shape(1, features, out, RANK, wide=operands(args.device))
        for tokens in TOKENS:
            for backend, variant in (("inductor", variants.lora), ("falqon", variants.emulated)):
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
