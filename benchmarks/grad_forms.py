"""What rounding dL/dO costs the gradients of adapters: FP8, INT8 to nearest and stochastic.

    python benchmarks/grad_forms.py [--batches 16]

SmolLM2-135M-Instruct in float32 with adapters of rank 16 on all linear layers, B zero. In each
base layer dL/dx = r(dL/dO ⊙ s_W) ⊘ s_W · W, with the scales s_W of W's rows in INT8 and a rounding
r with one power of two a token; all else is exact. Of the gradient of all B together, set against
the one without any rounding:

- error: |g - g*| / |g*| of a batch, mean over batches;
- of the sum: the same of all batches' gradients added up, where what has no bias averages out;
- share: Σ g · g* / |g*|² of the sum, 1 where nothing of its length is lost.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import common
import smollm
import torch
import training
from nll import Data
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from falqon_fx.site.numerics import E4M3, E5M2, INT8, LARGEST, amax_to_scale, round_to_fp8

Rounding = Callable[[Tensor], Tensor]


def nearest(dtype: torch.dtype) -> Rounding:
    def rounded(g: Tensor) -> Tensor:
        scale = amax_to_scale(g.abs().amax(-1, keepdim=True), dtype, "pow2")
        return round_to_fp8(g / scale, dtype) * scale

    return rounded


def stochastic(g: Tensor) -> Tensor:
    """To INT8, up with a probability of the distance from the number below."""
    scale = amax_to_scale(g.abs().amax(-1, keepdim=True), INT8, "pow2")
    steps = (g / scale + torch.rand_like(g)).floor()
    return steps.clamp(-LARGEST[INT8], LARGEST[INT8]) * scale


ROUNDINGS: dict[str, Rounding] = {
    "exact": lambda g: g,
    "bfloat16": lambda g: g.bfloat16().float(),
    "E5M2": nearest(E5M2),
    "E4M3": nearest(E4M3),
    "INT8, nearest": nearest(INT8),
    "INT8, stochastic": stochastic,
}


class _Product(torch.autograd.Function):
    """x · Wᵀ, whose dL/dx is that of the head of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.rounding = rounding
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weight, scale = ctx.saved_tensors
        return (ctx.rounding(grads[0] * scale) / scale) @ weight, None, None, None


class Base(nn.Module):
    """A base layer of an adapter with the rounding of the moment."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        amax = weight.detach().abs().amax(1)
        self.register_buffer("scale", amax_to_scale(amax, INT8, "pow2"))
        self.rounding: Rounding = ROUNDINGS["exact"]

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = _Product.apply(x, self.weight, self.scale, self.rounding)  # type: ignore
        return made


@dataclass(frozen=True)
class Row:
    """One rounding."""

    rounding: str
    error: float
    of_sum: float
    share: float


def gradient(model: nn.Module, batch: smollm.Batch) -> Tensor:
    """Of all B, in one."""
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, factors)])


def measure(batches: int) -> list[Row]:
    """All roundings on the same batches."""
    data = Data.load()
    variant = training.Variant("lora", "LoRA", 1e-3, "eager")
    model = training.with_adapter(variant, copy.deepcopy(data.base).float(), 0)
    bases = []
    for layer in training.lora_layers(model).values():
        weight: Any = layer.get_base_layer().weight
        bases.append(Base(weight))
        layer.base_layer = bases[-1]
    torch.manual_seed(0)
    given = data.train(batches, 0)
    found: dict[str, list[Tensor]] = {}
    for name, rounding in ROUNDINGS.items():
        for base in bases:
            base.rounding = rounding
        found[name] = [gradient(model, batch) for batch in given]
    exact = found["exact"]
    whole = torch.stack(exact).sum(0)
    rows = []
    for name, own in found.items():
        total = torch.stack(own).sum(0)
        error = fmean(float((g - e).norm() / e.norm()) for g, e in zip(own, exact, strict=True))
        of_sum = float((total - whole).norm() / whole.norm())
        rows.append(Row(name, error, of_sum, float(total @ whole / (whole @ whole))))
    return rows


HEADER = ("rounding of dL/dO", "error", "of the sum", "share")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=16)
    args = parser.parse_args(argv)
    rows = measure(args.batches)
    lines = [[r.rounding, f"{r.error:.4f}", f"{r.of_sum:.4f}", f"{r.share:.4f}"] for r in rows]
    table = Table(*HEADER)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    file, about = common.result_path("grad_forms", ".json"), common.environment()
    common.write_json(file, {"environment": about, "rows": [asdict(row) for row in rows]})
    title = f"The gradient of all B by what dL/dO is rounded to, {args.batches} batches"
    page = common.markdown(title, about, HEADER, lines)
    file.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
