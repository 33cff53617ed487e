"""A loop as torchtitan has it: a mesh, `parallelize`, accumulation, clipping, a schedule, and
checkpoints in the background.

torchrun --nproc-per-node 2 examples/distributed/titan.py

In torchtitan itself the body of `parallelize` goes into a model's ``parallelize_fn``, and the
checkpointer's ``states`` get ``"falqon": CheckpointState(model, optimizer)``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import work
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import LinearLR

import falqon_fx

ACCUMULATED = 2


def parallelize(model: Any, mesh: DeviceMesh) -> Any:
    """Activation checkpoints, then compile, then shard: from the inside out."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = work.layers(model)
    for i, block in enumerate(blocks):
        blocks[i] = checkpoint_wrapper(block)
        blocks[i].compile(backend="falqon", fullgraph=True)
        last = i == len(blocks) - 1  # backward needs it at once
        fully_shard(blocks[i], mesh=mesh, mp_policy=policy, reshard_after_forward=not last)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def main() -> None:
    """Train; every rank runs this."""
    args, device = work.arguments(__doc__), work.start()
    mesh = dist.init_device_mesh(
        device.type, (1, dist.get_world_size()), mesh_dim_names=("dp_replicate", "dp_shard")
    )
    model = work.lora_model(args.model)
    falqon_fx.prepare(model, progress=dist.get_rank() == 0)
    model = parallelize(model, mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    schedule = LinearLR(optimizer, start_factor=0.1, total_iters=10)
    saving: Any = None
    apart = dist.new_group(backend="gloo")  # for saves, beside training
    data = work.batches(model.config.vocab_size, range(args.steps * ACCUMULATED), device)
    for step in range(args.steps):
        for part in range(ACCUMULATED):
            model.set_requires_gradient_sync(part == ACCUMULATED - 1)
            loss = model(**next(data)).loss
            (loss / ACCUMULATED).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"{loss.item():.4f}", flush=True)
        if (step + 1) % 10 == 0:
            if saving is not None:
                saving.result()
            state = {"falqon": falqon_fx.CheckpointState(model, optimizer), "schedule": schedule}
            folder = args.out / "steps" / str(step + 1)
            saving = dcp.async_save(state, checkpoint_id=folder, process_group=apart)
    if saving is not None:
        saving.result()
    work.stop()


if __name__ == "__main__":
    main()
