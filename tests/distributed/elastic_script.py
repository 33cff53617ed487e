"""Training under torchrun that goes on from its last checkpoint.

elastic_script.py FOLDER [dies]    with "dies", rank 1 kills itself in its first life
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from falqon_fx import CheckpointState, FalqonConfig
from tests.distributed.training import compile_blocks, make, shard, whole

CONFIG = FalqonConfig(inner="aot_eager")
STEPS, DIES_AT = 5, 3


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = shard(compile_blocks(make(CONFIG, prepared=True), CONFIG))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    state = {"falqon": CheckpointState(model, optimizer)}
    first = len([*folder.glob("step*/.metadata")])
    if first:
        dcp.load(state, checkpoint_id=folder / f"step{first - 1}")
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 64, generator=generator).chunk(2)[dist.get_rank()]
        loss = (model(x) - x / 2).float().square().mean()
        if step == DIES_AT - 1 and first == 0 and sys.argv[2:] and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dcp.save(state, checkpoint_id=folder / f"step{step}")
    result = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save((first, result), folder / "result.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
