"""transformers' `Trainer` on the first layers of SmolLM2, under torchrun or ``accelerate launch``.

trainer_script.py FOLDER          what each rank trains
trainer_script.py FOLDER alone    the loop by hand, of one process
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import compile_regions_fsdp2
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.integrations.transformers import FalqonCallback
from tests.distributed.training import whole

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import smollm

STEPS, LAYERS, RANKS = 4, 2, 2
CONFIG = FalqonConfig(inner="aot_eager")


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    runs = {}
    if sys.argv[2:] == ["alone"]:
        runs["by hand"] = described(model := small_model(), by_hand(model))
    else:
        runs["trainer"] = described(model := small_model(), by_trainer(model, folder))
        if runs["trainer"][2]:
            runs["accelerate"] = described(model := small_model(), by_accelerate(model))
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(runs, folder / "result.pt")


def described(model: nn.Module, losses: list[float]) -> tuple[Any, ...]:
    """Its losses, its adapter, and whether it is sharded."""
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    adapter = {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}
    return losses, adapter, sharded


def small_model() -> nn.Module:
    base, _ = smollm.load_model(None)
    base.model.layers = base.model.layers[:LAYERS]
    base.config.num_hidden_layers = LAYERS
    base.config.use_cache = False
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora)


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1000, (STEPS * RANKS, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def by_trainer(model: nn.Module, folder: Path) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=0.0,  # a norm over shards is a sum in another order
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on accelerators alone: it is told that these processes have one.
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
    callback = FalqonCallback(CONFIG)
    trainer = InOrder(model, arguments, train_dataset=data(), callbacks=[callback])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_accelerate(model: nn.Module) -> list[float]:
    """A loop of one's own under accelerate: its regional compilation, then its FSDP2."""
    torch._dynamo.reset()
    falqon_fx.prepare(model, CONFIG, progress=False)
    compile_regions_fsdp2(model, backend="falqon", options={"config": CONFIG})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for of_step, count in steps():
        batch = of_step[accelerator.process_index]
        loss = model(**batch, num_items_in_batch=count).loss
        accelerator.backward(loss * RANKS)  # FSDP takes the mean of the ranks' gradients
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.gather(loss.detach().double()).sum()))
    return losses


def by_hand(model: nn.Module) -> list[float]:
    """One process that accumulates what the ranks compute, compiled block by block."""
    falqon_fx.prepare(model, CONFIG, progress=False)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="falqon", options={"config": CONFIG})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    losses = []
    for of_step, count in steps():
        total = 0.0
        for batch in of_step:
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def steps() -> Iterator[tuple[list[dict[str, Tensor]], Tensor]]:
    """The batch of each rank, and how many tokens they have to predict together."""
    rows = data()
    for step in range(STEPS):
        of_step = rows[step * RANKS : (step + 1) * RANKS]
        count = sum(len(row["labels"]) - 1 for row in of_step)
        yield (
            [{name: ids[None] for name, ids in row.items()} for row in of_step],
            torch.tensor(count),
        )


if __name__ == "__main__":
    main()
