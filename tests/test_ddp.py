"""DDP over gloo with two processes: each holds a state of its own, and all must stay equal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from tests.models import lora_b, tiny_mlp

STEPS = 3
CONFIG = FalqonConfig(inner="aot_eager", topk=5)

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
for prepared in (False, True):
    model = test_ddp.make(prepared)
    call = torch.compile(DistributedDataParallel(model), backend="falqon", options=test_ddp.OPTIONS)
    losses = test_ddp.run(call, model, [x.chunk(2)[rank] for x in test_ddp.data()], 1)
    result.append((losses, test_ddp.weights(model)))
torch.save(result, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""

OPTIONS = {"config": CONFIG}


def make(prepared: bool) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_mlp()
    if prepared:
        falqon_fx.prepare(model, CONFIG, progress=False)
    return model


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 32, generator=generator) for _ in range(STEPS)]


def run(call: nn.Module, model: nn.Module, batches: list[Tensor], parts: int) -> list[float]:
    """Train; each batch in ``parts`` whose gradients are averaged."""
    optimizer, losses = torch.optim.AdamW(lora_b(model), lr=1e-2), []
    for batch in batches:
        for x in batch.chunk(parts):
            loss = (call(x) - x / 2).square().mean()
            (loss / parts).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    call(batches[0].chunk(parts)[0])  # writes the last step
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    """Everything that training changes."""
    states = [tensor for s in falqon_fx.adapters(model).values() for tensor in s.tensors]
    live = [t.view(torch.uint8) if t.element_size() == 1 else t for t in states]
    return [t.detach().clone() for t in (*lora_b(model), *live)]


def test_two_processes_train_as_one_that_accumulates(tmp_path: Path):
    """DDP adds halves of the ranks' gradients, as two accumulated halves of a loss do, and a half
    is exact. So B and W' are equal bit for bit on both ranks and in the process alone.
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
    for prepared in (False, True):
        torch._dynamo.reset()
        model = make(prepared)
        losses = run(torch.compile(model, backend="falqon", options=OPTIONS), model, data(), 2)
        for i in range(2):
            rank_losses, rank_weights = found[i][prepared]
            assert rank_losses == losses[i::2]
            assert len(rank_weights) == 2 + 10
            assert all(map(torch.equal, rank_weights, weights(model)))
