"""Run one function in several processes that form a gloo group.

None outlives the call: when one fails or the time is up, the others are killed.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
_GRACE = 15  # seconds that the other ranks get to say what they saw of one that failed
_SCRIPT = "from tests.distributed.ranks import main; main()"
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def run(function: Callable[[], Any], ranks: int, folder: Path, timeout: float = 300) -> list[Any]:
    """What ``function``, of a module's top level, returns on each rank."""
    codes, errors = start(function, ranks, folder, timeout)
    assert codes == [0] * ranks, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def start(
    function: Callable[[], Any],
    ranks: int,
    folder: Path,
    timeout: float = 300,
    patience: float = 120,
) -> tuple[list[int], list[str]]:
    """The exit code of each rank, and the end of what it wrote to stderr. A collective and
    the store wait ``patience`` seconds.
    """
    folder.mkdir(exist_ok=True)
    logs = [folder / f"{rank}.log" for rank in range(ranks)]
    name = f"{function.__module__}:{function.__name__}"
    processes = []
    for rank, log in enumerate(logs):
        arguments = [name, str(folder), str(rank), str(ranks), str(patience)]
        with log.open("w") as stderr:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-c", _SCRIPT, *arguments],
                    env={**os.environ, **ENVIRONMENT},
                    cwd=folder,
                    stderr=stderr,
                )
            )
    try:
        _wait(processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes], [log.read_text()[-4000:] for log in logs]


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended, one has failed and the others had their time, or the time is up."""
    failed = False
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return
        if not failed and any(codes):
            failed, deadline = True, min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.05)


def main() -> None:
    """What each process runs."""
    name, folder, rank, ranks, patience = sys.argv[1:]
    module, _, function = name.partition(":")
    torch.set_num_threads(1)
    limit = timedelta(seconds=float(patience))
    store = dist.FileStore(f"{folder}/store", int(ranks))
    store.set_timeout(limit)
    place = {"rank": int(rank), "world_size": int(ranks)}
    dist.init_process_group("gloo", store=store, timeout=limit, **place)
    result = getattr(importlib.import_module(module), function)()
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
