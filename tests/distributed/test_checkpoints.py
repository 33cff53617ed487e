"""torch's distributed checkpoints: saved by some ranks, loaded by others, through deaths too."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import falqon_fx
from falqon_fx import CheckpointState, FalqonConfig
from falqon_fx.files import storage
from tests.distributed import elastic_script, ranks
from tests.distributed.training import compile_blocks, make, shard, whole

pytestmark = pytest.mark.slow
CONFIG = FalqonConfig(inner="aot_eager")
WORLDS, EACH = (4, 2, 1, 4), 2  # steps of each world


def test_four_two_one_four(tmp_path: Path):
    """A mean of two halves is exact in any order, so the others of four ranks count nothing. The
    second world saves in the background, the last holds two copies of two shards.
    """
    found = [
        ranks.run(go_on, world, tmp_path / f"world{i}", 600)[0] for i, world in enumerate(WORLDS)
    ]
    model = compile_blocks(make(CONFIG, prepared=True), CONFIG)
    optimizer = adam(model)
    for i, state in enumerate(found):
        steps(model, optimizer, i, [(0, 0.5), (1, 0.5)])
        expected = tensors(model, optimizer)
        assert state.keys() == expected.keys()
        assert [n for n in state if not torch.equal(state[n], expected[n])] == [], WORLDS[: i + 1]


def go_on() -> dict[str, Tensor]:
    """Load the last checkpoint, train, save the next."""
    world, rank = dist.get_world_size(), dist.get_rank()
    before = len([*Path("..").glob("checkpoint*")])
    model, optimizer = copies_of_shards() if before == 3 else one_mesh()
    if before:
        load(model, optimizer, f"../checkpoint{before - 1}")
    if world == 1:
        parts = [(0, 0.5), (1, 0.5)]
    else:
        parts = [(rank % 2, world / 2 if rank < 2 else 0.0)]
    steps(model, optimizer, before, parts)
    state, folder = {"falqon": CheckpointState(model, optimizer)}, f"../checkpoint{before}"
    if before == 1:
        apart = dist.new_group(backend="gloo")  # or its messages meet those of training
        saving = dcp.async_save(state, checkpoint_id=folder, process_group=apart)
        found = tensors(model, optimizer)
        steps(model, optimizer, 7, parts)  # changes nothing of what is being saved
        saving.result()
        return found
    dcp.save(state, checkpoint_id=folder)
    if before == 3:
        falqon_fx.save_checkpoint(model, "../whole", optimizer=optimizer)
        model, optimizer = copies_of_shards()
        falqon_fx.load_checkpoint(model, "../whole", optimizer=optimizer)
    return tensors(model, optimizer)


def one_mesh() -> tuple[Any, torch.optim.AdamW]:
    model = shard(compile_blocks(make(CONFIG, prepared=True), CONFIG))
    return model, adam(model)


def copies_of_shards() -> tuple[Any, torch.optim.AdamW]:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    model = shard(compile_blocks(make(CONFIG, prepared=True), CONFIG), mesh=mesh)
    return model, adam(model)


def load(model: Any, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    dcp.load({"falqon": CheckpointState(model, optimizer)}, checkpoint_id=folder)


def adam(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def steps(model: Any, optimizer: torch.optim.Optimizer, seed: int, parts: Any) -> None:
    """Two steps on the halves of batches that are named in ``parts``, with the weight of each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EACH):
        halves = torch.randn(8, 64, generator=generator).chunk(2)
        for number, weight in parts:
            x = halves[number]
            ((model(x) - x / 2).float().square().mean() * weight).backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": whole(slot) for name, slot in slots.items()}
    return found


# -- deaths ----------------------------------------------------------------------------------------

SAVES = ("dcp, first", "dcp, second", "save_checkpoint")


@pytest.mark.parametrize("what", SAVES)
def test_a_rank_killed_in_a_save(tmp_path: Path, what: str):
    """The other ends with an error of its own, and the checkpoint before loads."""
    (tmp_path / "what").write_text(what)
    start = time.monotonic()
    codes, errors = ranks.start(killed, 2, tmp_path / "ranks", 200)
    print(f"{what}: {time.monotonic() - start:.0f} s")
    dead = 0 if what == "dcp, first" or what == "save_checkpoint" else 1
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] == 1, errors[1 - dead]
    shutil.rmtree(tmp_path / "ranks")
    for before, after in ranks.run(loaded, 2, tmp_path / "ranks"):
        assert [n for n in before if not torch.equal(before[n], after[n])] == []


def killed() -> None:
    what = Path("../what").read_text()
    model = shard(make(CONFIG, prepared=True))
    optimizer = adam(model)
    steps(model, optimizer, 0, [(dist.get_rank(), 1.0)])
    torch.save(tensors(model, optimizer), f"../before{dist.get_rank()}.pt")
    save(what, model, optimizer, 1)
    steps(model, optimizer, 1, [(dist.get_rank(), 1.0)])
    if what == "save_checkpoint":
        die(storage, "write_manifest", 0)
    else:
        die(dcp.FileSystemWriter, "write_data", 0 if what == "dcp, first" else 1)
    save(what, model, optimizer, 2)


def die(place: Any, name: str, rank: int) -> None:
    """Kill this process where it would have written half of a save."""

    def kill(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == rank:
        setattr(place, name, kill)


def save(what: str, model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
    if what == "save_checkpoint":
        falqon_fx.save_checkpoint(model, "../saved", optimizer=optimizer)
    else:
        state = {"falqon": CheckpointState(model, optimizer)}
        dcp.save(state, checkpoint_id=f"../dcp{number}")


def loaded() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = shard(make(CONFIG, prepared=True))
    optimizer = adam(model)
    if Path("../saved").exists():
        falqon_fx.load_checkpoint(model, "../saved", optimizer=optimizer)
        report = falqon_fx.save_checkpoint(model, "../saved", optimizer=optimizer)
        left = {path.name for path in Path("../saved").iterdir()}
        assert left == {"checkpoint.json", *report.files}
    else:
        whole_ones = [p.parent for p in Path("..").glob("dcp*/.metadata")]
        assert [folder.name for folder in whole_ones] == ["dcp1"]
        load(model, optimizer, whole_ones[0])
    return torch.load(f"../before{dist.get_rank()}.pt"), tensors(model, optimizer)


def test_a_rank_that_dies_is_started_again(tmp_path: Path):
    """torchrun starts all ranks anew, which go on from the last checkpoint, bit for bit. They need
    a store of their own: in that of the launcher they find the addresses of those before.
    """
    start = time.monotonic()
    results = []
    for dies in (False, True):
        folder = tmp_path / str(dies)
        folder.mkdir()
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "1", str(Path(elastic_script.__file__)), str(folder)]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command, *(["dies"] if dies else [])],
            env={**os.environ, **ranks.ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-20000:]
        results.append(torch.load(folder / "result.pt"))
    print(f"{time.monotonic() - start:.0f} s")
    (_, straight), (first, interrupted) = results
    assert first == elastic_script.DIES_AT - 1  # of the second start
    assert straight.keys() == interrupted.keys()
    assert [n for n in straight if not torch.equal(straight[n], interrupted[n])] == []
