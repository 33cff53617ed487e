"""trl's trainers: SFT and DPO save, resume and keep their reference."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
import trl
from torch import Tensor

import falqon_fx
from falqon_fx.integrations.transformers import FalqonCallback, FalqonTrainerMixin
from tests.models import fill_b
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.trainers import (
    CONFIG,
    SAVED,
    SITES,
    STEPS,
    adapter,
    all_prepared,
    arguments,
    lora,
    losses,
    moved,
    same,
    tiny_base,
)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def texts() -> datasets.Dataset:
    """Of 6 to 14 words: batches change their length."""
    chosen = random.Random(0)
    words = [f"w{i}" for i in range(61)]
    lines = [" ".join(chosen.choices(words, k=chosen.randint(6, 14))) for _ in range(16)]
    return datasets.Dataset.from_dict({"text": lines})


class SFTTrainer(FalqonTrainerMixin, trl.SFTTrainer):
    """trl's trainer that takes torch_compile_backend="falqon"."""


@pytest.mark.slow
def test_sft_trainer_trains_evaluates_saves_and_resumes(tmp_path):
    """With trl's defaults: bfloat16 autocast, activation checkpoints, lengths that change."""

    def run(folder: Path) -> trl.SFTTrainer:
        torch._dynamo.reset()
        data, compiled = texts(), {"torch_compile": True, "torch_compile_backend": "falqon"}
        return SFTTrainer(
            tiny_base(),
            trl.SFTConfig(**arguments(folder, **compiled)),
            train_dataset=data,
            eval_dataset=data.select(range(2)),
            processing_class=tokenizer(),
            peft_config=lora(),
            falqon_config=CONFIG,
        )

    whole = run(tmp_path / "whole")
    start = adapter(whole.model)
    assert whole.args.bf16
    assert whole.args.gradient_checkpointing
    whole.train()
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    assert losses(resumed) == losses(whole)
    assert losses(resumed, "eval_loss") == losses(whole, "eval_loss")
    assert same(adapter(resumed.model), adapter(whole.model))
    assert len(falqon_fx.adapters(resumed.model)) == SITES
    assert moved(whole.model, start)


def preferences() -> datasets.Dataset:
    chosen = random.Random(0)
    words = [f"w{i}" for i in range(61)]
    columns = {"prompt": 4, "chosen": 6, "rejected": 6}
    rows = [
        {name: " ".join(chosen.choices(words, k=count)) for name, count in columns.items()}
        for _ in range(8)
    ]
    return datasets.Dataset.from_list(rows)


class WatchReference(transformers.TrainerCallback):
    """What trl's reference model says of one batch, at each step and at the end."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.batch: Any = None
        self.reference: list[Tensor] = []

    def look(self) -> None:
        if self.batch is None:
            self.batch = next(iter(self.trainer.get_train_dataloader()))
        found = self.trainer.compute_ref_log_probs(self.trainer.model, self.batch)
        self.reference.append(torch.cat(found))

    def on_step_begin(self, args, state, control, **kwargs):
        self.look()

    def on_train_end(self, args, state, control, **kwargs):
        self.look()


@pytest.mark.slow
@each_value(reference=["disabled adapter", "ref adapter"], prepare=PREPARED_OR_NOT)
def test_dpos_reference_model_stays_as_it_is(tmp_path, reference, prepare):
    """Its log-probabilities are equal bit for bit from the first to the last step, whether it is
    the model without its adapter or with a copy of the adapter that training began with. The policy
    begins there, with rewards of zero, and goes elsewhere.
    """
    model = tiny_base()
    if reference == "ref adapter":
        model = peft.get_peft_model(model, lora())
        fill_b(model, 0.1)
    watch = WatchReference()
    off = {"bf16": False, "gradient_checkpointing": False, "eval_strategy": "no"}
    run = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**arguments(tmp_path, **off)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=lora() if reference == "disabled adapter" else None,
        callbacks=[FalqonCallback(CONFIG, prepare=prepare), watch],
    )
    assert ("ref" in run.model.peft_config) == (reference == "ref adapter")
    watch.trainer, start = run, adapter(run.model)
    run.train()
    assert len(watch.reference) == STEPS + 1
    assert all(torch.equal(found, watch.reference[0]) for found in watch.reference)
    first, *_, last = losses(run, "rewards/chosen")
    assert first == 0.0
    assert last != 0.0
    assert all_prepared(run.model) == prepare
    assert len(falqon_fx.adapters(run.model)) == SITES
    trained = {n: v for n, v in start.items() if ".ref." not in n}
    assert not any(torch.equal(v, adapter(run.model)[n]) for n, v in trained.items())
    assert all(torch.equal(v, adapter(run.model)[n]) for n, v in start.items() if n not in trained)
