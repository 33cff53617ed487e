"""save_checkpoint and load_checkpoint against safetensors alone on the same bytes, in turns.

    python benchmarks/checkpoint_speed.py --mib 512 --rounds 5 --folder /tmp/speed

safetensors alone: ``save_file`` and an fsync, as a checkpoint needs one; ``load_file`` and a copy
into the model's parameters, as resuming needs one (``load_file`` itself only maps the file).
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

    runs: dict[str, tuple[Callable[[], None], list[float]]] = {
        f.__name__: (f, []) for f in (save_alone, save_ours, load_alone, load_ours)
    }
    for _ in range(arguments.rounds + 1):
        for function, seconds in runs.values():
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    # The first round warms the page cache.
    best = {name: min(seconds[1:]) for name, (_, seconds) in runs.items()}
    middle = {name: statistics.median(seconds[1:]) for name, (_, seconds) in runs.items()}
    result = {
        "cores": len(os.sched_getaffinity(0)),
        "mib": arguments.mib,
        "mib_per_second": {name: arguments.mib / s for name, s in best.items()},
        "save_of_safetensors": best["save_alone"] / best["save_ours"],
        "load_of_safetensors": best["load_alone"] / best["load_ours"],
        "save_of_safetensors_median": middle["save_alone"] / middle["save_ours"],
        "load_of_safetensors_median": middle["load_alone"] / middle["load_ours"],
    }
    print(json.dumps(result, indent=1))
    shutil.rmtree(arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
