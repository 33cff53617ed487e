"""Run one function in several processes that form a gloo group.

None outlives the call: when one fails or the time is up, the others are killed.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import fresh

ROOT = Path(__file__).parents[2]
_GRACE = 15  # seconds that the other ranks get to say what they saw of one that failed
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
    name = f"{function.__module__}:{function.__name__}"
    processes = []
    for rank in range(ranks):
        place = (name, str(folder), rank, ranks, patience)
        code = f"from tests.distributed.ranks import main; main(*{place})"
        options: dict[str, Any] = {"cwd": folder, "warnings": "ignore", "timeout": 0}
        processes.append(fresh.start(code, environment=ENVIRONMENT, **options))
    try:
        _wait(processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
        done = [process.wait() for process in processes]
    return [d.returncode for d in done], [d.stderr[-4000:] for d in done]


def _wait(processes: list[fresh.Process], deadline: float) -> None:
    """Until all have ended, one has failed and the others had their time, or the time is up."""
    failed = False
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return
        if not failed and any(codes):
            failed, deadline = True, min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.05)


def main(name: str, folder: str, rank: int, ranks: int, patience: float) -> None:
    """What each process runs."""
    module, _, function = name.partition(":")
    torch.set_num_threads(1)
    limit = timedelta(seconds=patience)
    store = dist.FileStore(f"{folder}/store", ranks)
    store.set_timeout(limit)
    dist.init_process_group("gloo", store=store, timeout=limit, rank=rank, world_size=ranks)
    result = getattr(importlib.import_module(module), function)()
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
