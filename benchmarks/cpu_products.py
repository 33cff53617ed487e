"""The products of SmolLM2-135M's layers on a CPU, base in FP8 and in INT8, by the ops alone.

    OMP_NUM_THREADS=1 python benchmarks/cpu_products.py
    OMP_NUM_THREADS=1 python benchmarks/cpu_products.py --kinds fp8 fp8_calibrated

For each group of layers that share x: the forward op (casts, O of all, O_A) and dL/dx of a LoRA of
rank 16, at 768 tokens, in bfloat16 where the CPU multiplies it, else in float32. What is compared
takes turns, each is first in every other round; medians of times and of the quotients of a round
count. A calibrated base has the 16 ranks and the 16 channels of x that `falqon_fx.prepare` adds.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import common
import smollm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from falqon_fx.config import BaseDtype, FalqonConfig
from falqon_fx.ops import adapter_casts, grad_x, merged_linear
from falqon_fx.site.base import cast_base
from falqon_fx.site.spec import SiteSpec

TOKENS, RANK, BOUGHT = 768, 16, 16
# in, and out of each layer
GROUPS: dict[str, tuple[int, tuple[int, ...]]] = {
    "q, k, v": (576, (576, 192, 192)),
    "o": (576, (576,)),
    "gate, up": (576, (1536, 1536)),
    "down": (1536, (576,)),
}
# The base's dtype, and whether it is calibrated.
KINDS: dict[str, tuple[BaseDtype, bool]] = {
    "fp8": ("fp8", False),
    "int8": ("int8", False),
    "fp8_calibrated": ("fp8", True),
    "int8_calibrated": ("int8", True),
}


@dataclass(frozen=True)
class Row:
    """Milliseconds of one group, and how many times FP8's that is."""

    group: str
    base: str
    forward: float
    backward: float
    forward_of_fp8: float
    backward_of_fp8: float


def calls(kind: str, group: str, dtype: torch.dtype) -> list[Callable[[], Any]]:
    """The forward op, and that of dL/dx."""
    torch.manual_seed(0)
    features, outs = GROUPS[group]
    base, calibrated = KINDS[kind]
    spec, sites = SiteSpec.from_config(FalqonConfig(base_dtype=base)), range(len(outs))

    def draw(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape) / math.sqrt(shape[-1])).to(like)

    x, grads = draw(TOKENS, features), [draw(TOKENS, out) for out in outs]
    bases = [cast_base(draw(out, features), spec) for out in outs]
    lora_a = [draw(RANK, features, like=torch.float32) for _ in sites]
    lora_b = [draw(out, RANK, like=torch.float32) for out in outs]
    wide, factors = dtype == torch.float32, [1.0] * len(sites)
    # What a calibration has made: A_c, B_c and W_S, as rows of A and columns of B.
    shapes = [[(BOUGHT, features)] * len(outs), *[[(out, BOUGHT) for out in outs]] * 2]
    fixed = [[draw(*shape, like=torch.bfloat16) for shape in of if calibrated] for of in shapes]
    casts = adapter_casts.proxy_update(lora_a, lora_b, factors, [], *fixed, wide, str(spec))
    weight, scale = [b.weight for b in bases], [b.scale for b in bases]
    a, a_scale, b = casts[0::3], casts[1::3], casts[2::3]
    d = [draw(TOKENS, len(code)) for code in a]
    none: list[Tensor] = []
    picked = [torch.randperm(features)[:BOUGHT].to(torch.int32)] * len(outs) * calibrated

    def forward() -> Any:
        given = (x, weight, scale, none, a, a_scale, b, none, none, lora_a, lora_b, none)
        rest = sites, factors, True, none, none, picked, dtype, str(spec)
        return merged_linear.merged_linear(*given, *rest)

    def backward() -> Any:
        given = (grads, weight, scale, d, a, a_scale, none)
        return grad_x.merged_linear_grad_x(*given, dtype, str(spec))

    return [forward, backward]


@torch.no_grad()
def measure(kinds: Sequence[str], group: str, dtype: torch.dtype, rounds: int) -> list[Row]:
    """All bases in turns."""
    of = {base: calls(base, group, dtype) for base in kinds}
    times: dict[str, list[list[float]]] = {base: [[], []] for base in kinds}
    for turn in range(rounds):
        for base in kinds if turn % 2 else reversed(kinds):
            for i, call in enumerate(of[base]):
                start = time.perf_counter()
                call()
                times[base][i].append((time.perf_counter() - start) * 1e3)
    return [
        Row(group, base, *map(median, each), *map(_quotient, each, times["fp8"]))
        for base, each in times.items()
    ]


def _quotient(own: list[float], of_fp8: list[float]) -> float:
    return median(a / b for a, b in zip(own, of_fp8, strict=True))


HEADER = ("layers", "base", "forward, ms", "dL/dx, ms", "forward / FP8's", "dL/dx / FP8's")


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """A line a group and base, and all of them, whose quotient is that of FP8's times as they are
    and times the groups' quotients.
    """
    of_fp8 = [row for row in rows if row.base == "fp8"]
    ahead, back = (sum(getattr(row, name) for row in of_fp8) for name in ("forward", "backward"))
    every = []
    for kind in dict.fromkeys(row.base for row in rows):
        own = [row for row in rows if row.base == kind]
        pairs = list(zip(own, of_fp8, strict=True))
        forward = sum(row.forward_of_fp8 * fp8.forward for row, fp8 in pairs)
        backward = sum(row.backward_of_fp8 * fp8.backward for row, fp8 in pairs)
        every.append(Row("all", kind, forward, backward, forward / ahead, backward / back))
    return [
        [
            row.group,
            row.base,
            f"{row.forward:.2f}",
            f"{row.backward:.2f}",
            f"{row.forward_of_fp8:.2f}",
            f"{row.backward_of_fp8:.2f}",
        ]
        for row in (*rows, *every)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=["fp8", "int8"])
    args = parser.parse_args(argv)
    dtype = smollm.native_dtype()
    rows = [row for group in GROUPS for row in measure(args.kinds, group, dtype, args.rounds)]
    table = Table(*HEADER)
    for line in summary(rows):
        table.add_row(*line)
    Console().print(table)
    name = "cpu_products" + "_calibrated" * ("fp8_calibrated" in args.kinds)
    file, about = common.result_path(name, ".json"), common.environment()
    content = {"dtype": str(dtype), "threads": torch.get_num_threads(), "environment": about}
    common.write_json(file, {**content, "rows": [asdict(row) for row in rows]})
    page = common.markdown("Products of SmolLM2-135M on a CPU", about, HEADER, summary(rows))
    page += f"\n{TOKENS} tokens, rank {RANK}, {dtype}, {torch.get_num_threads()} thread.\n"
    file.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
