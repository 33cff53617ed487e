"""LoRA on several GPUs that share the model: FSDP2 gathers a layer at a time, in FP8.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun --nproc-per-node 2 --max-restarts 3 examples/distributed/fsdp2.py

It goes on from its last checkpoint, on as many GPUs as there are then. (Without the variable
torchrun 2.13 keeps its store over restarts, and ranks may find the addresses of those before.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import work
from torch.distributed.fsdp import fully_shard

import falqon_fx

args, device = work.arguments(__doc__), work.start()
mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
model = work.lora_model(args.model)  # or falqon_fx.load(folder): mapped, in no rank's memory
falqon_fx.prepare(model, progress=dist.get_rank() == 0)  # before it is sharded
for layer in work.layers(model):
    layer.compile(backend="falqon")
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
state = {"falqon": falqon_fx.CheckpointState(model, optimizer)}
saved = sorted(int(file.parent.name) for file in args.out.glob("steps/*/.metadata"))
if saved:
    dcp.load(state, checkpoint_id=args.out / "steps" / str(saved[-1]))
steps = range(saved[-1] if saved else 0, args.steps)
for step, batch in zip(steps, work.batches(model.config.vocab_size, steps, device), strict=True):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"{loss.item():.4f}", flush=True)
    if (step + 1) % 10 == 0:
        dcp.save(state, checkpoint_id=args.out / "steps" / str(step + 1))

# PEFT's adapter, gathered without the base; then FP8 for serving, layer by layer. On every rank.
falqon_fx.save_adapter(model, args.out / "adapter")
falqon_fx.save_fp8(model, args.out / "fp8", progress=False)
work.stop()
