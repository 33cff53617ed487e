"""LoRA on several GPUs, each with the whole model in FP8 (34B on 48 GB, 70B on 141 GB).

torchrun --nproc-per-node 2 examples/distributed/ddp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import work
from torch.nn.parallel import DistributedDataParallel

import falqon_fx

args, device = work.arguments(__doc__), work.start()
model = work.lora_model(args.model)
falqon_fx.prepare(model, progress=dist.get_rank() == 0)  # FP8 before it goes to the device
model.to(device)
for layer in work.layers(model):  # block by block: gradients are sent while backward goes on
    layer.compile(backend="falqon")
parallel = DistributedDataParallel(model)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for batch in work.batches(model.config.vocab_size, range(args.steps), device):
    loss = parallel(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"{loss.item():.4f}", flush=True)

if dist.get_rank() == 0:  # all have the same
    model.save_pretrained(args.out / "adapter")
work.stop()
