"""init="svd" of one layer: seconds, and the error energy captured against a full SVD.

    python benchmarks/svd_init.py --out 4096 --in 11008 --rank 64

A random bfloat16 weight: its FP8 error is nearly white noise, the hardest spectrum. Energies are
‖E·P‖² with P the projection onto A's rows before their own cast. The full SVD's are eigenvalues of
E·Eᵀ in float64; the result file keeps them, so that later runs of the same shape need none.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from common import environment, latest_or_new, read_json, result_path, write_json
from torch import Tensor

from falqon_fx import FalqonConfig
from falqon_fx.rows.state import create
from falqon_fx.site.numerics import E4M3, amax_to_scale, round_to_fp8
from falqon_fx.site.svd import low_rank_rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--in", type=int, default=11008, dest="features")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    shape, rank = (arguments.out, arguments.features), arguments.rank
    weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
    lora_a, lora_b = torch.randn(rank, shape[1]), torch.zeros(shape[0], rank)

    def merge(init: Literal["keep", "svd"]) -> Callable[[], object]:
        config = FalqonConfig(update="rows", init=init)
        return lambda: create("layer", weight, lora_a.clone(), lora_b, 1.0, config)

    scale = amax_to_scale(weight.abs().amax(1, keepdim=True).float(), E4M3, "pow2")
    wide = weight.float()
    error = wide - round_to_fp8(wide / scale, E4M3) * scale
    times = {
        "keep": best(merge("keep"), arguments.rounds),
        "svd": best(merge("svd"), arguments.rounds),
        "low_rank_rows": best(lambda: low_rank_rows(error, rank, 0), arguments.rounds),
    }
    rows = low_rank_rows(error, rank, 0)
    projected = error @ torch.linalg.qr(rows.t()).Q
    captured = float(projected.double().square().sum())
    full = known_energy(shape, rank) or full_energy(error, rank)
    added = {unit: times["svd"][unit] - times["keep"][unit] for unit in times["svd"]}
    result = {
        **environment(),
        "threads": torch.get_num_threads(),
        "shape": list(shape),
        "rank": rank,
        "merge_with_init_keep": times["keep"],
        "merge_with_init_svd": times["svd"],
        "svd_init": added,
        "low_rank_rows": times["low_rank_rows"],
        "captured": captured,
        "full": full,
        "share": captured / full["energy"],
    }
    write_json(arguments.result or result_path("svd_init", ".json"), result)
    print(
        f"svd init {added['seconds']:.2f} s ({added['cpu_seconds']:.2f} CPU-s) on "
        f"{result['threads']} threads, {result['share']:.4f} of the full SVD's energy"
    )
    return 0 if added["seconds"] <= 2 and result["share"] >= 0.95 else 1


def best(function: Callable[[], object], rounds: int) -> dict[str, float]:
    """The fastest of several runs, wall and CPU seconds each."""
    wall, cpu = [], []
    for _ in range(rounds):
        start = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return {"seconds": min(wall), "cpu_seconds": min(cpu)}


def full_energy(error: Tensor, rank: int) -> dict[str, Any]:
    start = time.perf_counter()
    wide = error.double()
    values = torch.linalg.eigvalsh(wide @ wide.t())
    return {"energy": float(values[-rank:].sum()), "seconds": time.perf_counter() - start}


def known_energy(shape: tuple[int, int], rank: int) -> dict[str, Any] | None:
    file = latest_or_new("svd_init")
    if not file.exists():
        return None
    content = read_json(file)
    if (content["shape"], content["rank"]) != (list(shape), rank):
        return None
    full: dict[str, Any] = content["full"]
    return full


if __name__ == "__main__":
    sys.exit(main())
