"""save_checkpoint and load_checkpoint against safetensors alone on the same bytes, in turns.

    python benchmarks/checkpoint_speed.py --mib 512 --rounds 5 --folder /tmp/speed

safetensors alone: ``save_file`` and an fsync, as a checkpoint needs one; ``load_file`` and a copy
into the model's parameters, as resuming needs one (``load_file`` itself only maps the file). Loads
are timed with the files in the page cache, where checksums cost most, and without ("cold").
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import environment, result_path, write_json
from safetensors.torch import load_file, save_file
from torch import nn

import falqon_fx
from falqon_fx.storage import flush_to_disk


class Bytes(nn.Module):
    """Uint8 parameters of 16 MiB, as large as the FP8 weight of a 4096 x 4096 layer."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(
            nn.Parameter(torch.randint(0, 256, (4096, 4096), dtype=torch.uint8), False)
            for _ in range(mib // 16)
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    arguments = parser.parse_args(argv)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    model, plain = Bytes(arguments.mib), arguments.folder / "plain.safetensors"

    def save_alone() -> None:
        save_file(model.state_dict(), plain)
        flush_to_disk(plain)

    def load_alone() -> None:
        model.load_state_dict(load_file(plain))

    def save_ours() -> None:
        falqon_fx.save_checkpoint(model, arguments.folder / "ours")

    def load_ours() -> None:
        falqon_fx.load_checkpoint(model, arguments.folder / "ours")

    turns: dict[str, Callable[[], None]] = {
        "save_alone": save_alone,
        "save_ours": save_ours,
        "load_alone": load_alone,
        "load_ours": load_ours,
        "cold_load_alone": load_alone,
        "cold_load_ours": load_ours,
    }
    runs: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(arguments.rounds + 1):
        for name, function in turns.items():
            if name.startswith("cold"):
                forget(arguments.folder)
            start = time.perf_counter()
            function()
            runs[name].append(time.perf_counter() - start)
    # The first round warms the page cache.
    best = {name: min(seconds[1:]) for name, seconds in runs.items()}
    middle = {name: statistics.median(seconds[1:]) for name, seconds in runs.items()}
    works = ("save", "load", "cold_load")
    result = {
        **environment(),
        "mib": arguments.mib,
        "mib_per_second": {name: arguments.mib / s for name, s in best.items()},
        "of_safetensors": {w: best[f"{w}_alone"] / best[f"{w}_ours"] for w in works},
        "of_safetensors_median": {w: middle[f"{w}_alone"] / middle[f"{w}_ours"] for w in works},
    }
    write_json(arguments.out or result_path("checkpoint_speed", ".json"), result)
    print(json.dumps(result, indent=1))
    shutil.rmtree(arguments.folder)
    return 0 if min(result["of_safetensors"].values()) >= 0.8 else 1


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for file in folder.rglob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
