"""save_checkpoint and load_checkpoint against safetensors alone on the same bytes, in turns.

    python benchmarks/checkpoint_speed.py --rounds 7 --folder /tmp/speed

The bytes are the FP8 weights of decoder layers of LLaMA-7B (16 and 43 MiB each), LLaMA-13B (25 and
68 MiB) and SmolLM2-135M. safetensors alone: ``save_file`` over the file before it, with fsyncs of
file and folder, as a checkpoint needs them; ``load_file`` and a copy into the model's parameters,
as resuming needs one (``load_file`` itself only maps the file). Loads are timed with the files in
the page cache, where checksums cost most, and without ("cold"). Before each save the disk is
synced, or it would wait for what the one before left to be discarded. Who goes first changes from
round to round: a disk that grants bursts is slower for the second.

In memory the bound is the memory: a checked load reads each byte twice, since nothing of the model
may change before all is checked, and writes it around the cache; an unchecked one reads it once,
and its target before it is overwritten. Copies around the cache are compiled code, which is loaded
beforehand, as `falqon_fx.prepare` or a step would have done; without it they are ATen's.
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
from typing import Any

import torch
from common import environment, result_path, write_json
from safetensors.torch import load_file, save_file
from torch import nn

import falqon_fx
from falqon_fx.files.disk import flush_to_disk
from falqon_fx.kernels.cpu import native as cpu

# hidden, intermediate and key-value size, layers
MODELS = {
    "LLaMA-7B": (4096, 11008, 4096, 3),
    "LLaMA-13B": (5120, 13824, 5120, 2),
    "SmolLM2-135M": (576, 1536, 192, 30),
}


class Bytes(nn.Module):
    """Uint8 parameters of the sizes of a model's FP8 weights."""

    def __init__(self, hidden: int, intermediate: int, kv: int, layers: int) -> None:
        super().__init__()
        attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        mlp = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
        self.layers = nn.ParameterList(
            nn.Parameter(torch.randint(0, 256, shape, dtype=torch.uint8), False)
            for _ in range(layers)
            for shape in attention + mlp
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    arguments = parser.parse_args(argv)
    cpu.library()
    found = {}
    for name, sizes in MODELS.items():
        shutil.rmtree(arguments.folder, ignore_errors=True)
        arguments.folder.mkdir(parents=True)
        found[name] = measure(Bytes(*sizes), arguments.folder, arguments.rounds)
        print(name, json.dumps(found[name], indent=1), flush=True)
    shutil.rmtree(arguments.folder)
    result = {**environment(), "models": found}
    write_json(arguments.out or result_path("checkpoint_speed", ".json"), result)
    ratios = [ratio for one in found.values() for ratio in one["of_safetensors"].values()]
    return 0 if min(ratios) >= 0.8 else 1


def measure(model: Bytes, folder: Path, rounds: int) -> dict[str, Any]:
    """MiB a second, and the shares of what safetensors alone reaches."""
    mib = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    plain = folder / "plain.safetensors"

    def save_alone() -> None:
        save_file(model.state_dict(), plain)
        flush_to_disk(plain)
        flush_to_disk(folder)

    def load_alone() -> None:
        model.load_state_dict(load_file(plain))

    def save_ours() -> None:
        falqon_fx.save_checkpoint(model, folder / "ours")

    def load_ours() -> None:
        falqon_fx.load_checkpoint(model, folder / "ours")

    turns: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "save": (save_alone, save_ours),
        "load": (load_alone, load_ours),
        "cold_load": (load_alone, load_ours),
    }
    runs: dict[str, list[float]] = {f"{w}_{who}": [] for w in turns for who in ("alone", "ours")}
    for work, (alone, ours) in turns.items():
        for i in range(rounds * (4 if work == "load" else 1) + 1):  # loads from memory are quick
            pair = [("alone", alone), ("ours", ours)]
            for who, function in pair if i % 2 else reversed(pair):
                if work == "cold_load":
                    forget(folder)
                elif work == "save":
                    os.sync()
                start = time.perf_counter()
                function()
                runs[f"{work}_{who}"].append(time.perf_counter() - start)
    # The first round warms the page cache. Ratios are taken within a round.
    seconds = {name: found[1:] for name, found in runs.items()}
    ratios = {
        work: [
            a / b for a, b in zip(seconds[f"{work}_alone"], seconds[f"{work}_ours"], strict=True)
        ]
        for work in turns
    }
    return {
        "mib": mib,
        "mib_per_second": {name: mib / statistics.median(s) for name, s in seconds.items()},
        "of_safetensors": {work: statistics.median(found) for work, found in ratios.items()},
        "rounds": ratios,
    }


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for file in folder.rglob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
