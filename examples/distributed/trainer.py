"""transformers' `Trainer` under accelerate. Which kind of parallelism is the config's choice:

accelerate launch --config_file examples/distributed/ddp.yaml examples/distributed/trainer.py
accelerate launch --config_file examples/distributed/fsdp2.yaml examples/distributed/trainer.py
"""

from __future__ import annotations

import torch
import work
from transformers import Trainer, TrainingArguments

from falqon_fx.integrations.transformers import FalqonCallback

args = work.arguments(__doc__)
model = work.lora_model(args.model)
ids = torch.randint(model.config.vocab_size, (256, 64))
arguments = TrainingArguments(
    output_dir=str(args.out),
    max_steps=args.steps,
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    logging_steps=1,
    save_steps=10,
    report_to=[],
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    callbacks=[FalqonCallback(prepare=True)],  # compiles block by block, prepares before sharding
)
trainer.train()
trainer.save_model(str(args.out / "adapter"))
