"""DDP over gloo with two processes: each casts for itself, and all must stay equal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from tests.models import tiny_mlp
from tests.training import trained, weights

STEPS = 3
CONFIGS = {
    "adapter": FalqonConfig(inner="aot_eager"),
    "rows": FalqonConfig(inner="aot_eager", update="rows", topk=5),
}
CASES = [(update, prepared) for update in CONFIGS for prepared in (False, True)]

# Ranks and the process that trains alone run the same code, from this very file.
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests import test_ddp

folder, rank = sys.argv[1], int(sys.argv[2])
store = dist.FileStore(f"{folder}/store", 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
result = []
for case in test_ddp.CASES:
    model = test_ddp.make(*case)
    call = test_ddp.compiled(DistributedDataParallel(model), case[0])
    losses = test_ddp.run(call, model, [x.chunk(2)[rank] for x in test_ddp.data()], 1)
    result.append((losses, test_ddp.weights(model)))
torch.save(result, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def make(update: str, prepared: bool) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_mlp()
    for name, parameter in model.named_parameters():
        if update == "rows" and "lora_A" in name:
            parameter.requires_grad_(False)
    if prepared:
        falqon_fx.prepare(model, CONFIGS[update], progress=False)
    return model


def compiled(model: nn.Module, update: str) -> Any:
    return torch.compile(model, backend="falqon", options=dict[str, Any](config=CONFIGS[update]))


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 32, generator=generator) for _ in range(STEPS)]


def run(call: nn.Module, model: nn.Module, batches: list[Tensor], parts: int) -> list[float]:
    """Train; each batch in ``parts`` whose gradients are averaged."""
    optimizer, losses = torch.optim.AdamW(trained(model), lr=1e-2), []
    for batch in batches:
        for x in batch.chunk(parts):
            loss = (call(x) - x / 2).square().mean()
            (loss / parts).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    call(batches[0].chunk(parts)[0])  # with update="rows" this writes the last step
    return losses


def test_two_processes_train_as_one_that_accumulates(tmp_path: Path):
    """DDP adds halves of the ranks' gradients, as two accumulated halves of a loss do, and a half
    is exact. So A and B (with update="rows": B and W') are equal bit for bit on both ranks and in
    the process alone, and the base is the same everywhere.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), str(i)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    found = [torch.load(tmp_path / f"{i}.pt") for i in range(2)]
    for case, (update, prepared) in enumerate(CASES):
        torch._dynamo.reset()
        model = make(update, prepared)
        start = [p.detach().clone() for p in trained(model)]
        losses = run(compiled(model, update), model, data(), 2)
        assert not any(map(torch.equal, start, trained(model)))
        for i in range(2):
            rank_losses, rank_weights = found[i][case]
            assert rank_losses == losses[i::2]
            # 2 sites: A, B, weight, scale; or A, B and the five parts of the state of "rows"
            assert len(rank_weights) == (2 * 4 if update == "adapter" else 2 * 7)
            assert all(map(torch.equal, rank_weights, weights(model)))
