"""transformers' own `Trainer` resumes bit for bit from its own checkpoint folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig
from tests.models import tiny_llama
from tests.sites import same, snapshot

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from falqon_fx.integrations.transformers import FalqonCallback  # noqa: E402
from falqon_fx.trainer_checkpoints import FOLDER, TrainerCheckpoints  # noqa: E402

CONFIG = FalqonConfig(inner="eager", topk=5)


def trainer_of(
    folder: Path, prepared: bool, last: int, seed: int = 0, own: bool = True
) -> transformers.Trainer:
    """With ``own``, compiled by hand; else by `FalqonCallback`, which saves by itself."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = tiny_llama(target_modules=["q_proj", "down_proj"])
    callback = TrainerCheckpoints() if own else FalqonCallback(CONFIG, prepare=prepared)
    if own:
        if prepared:
            falqon_fx.prepare(model, CONFIG, progress=False)
        model.compile(backend="falqon", options={"config": CONFIG})
    if seed:  # what a checkpoint must bring
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    data = [{"input_ids": row, "labels": row} for row in torch.arange(96).remainder(64).view(16, 6)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=last, save_steps=3, per_device_train_batch_size=2,
        learning_rate=0.02, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=100,
        lr_scheduler_type="constant",
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])


def assert_same(one: nn.Module, other: nn.Module) -> None:
    named = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, named[name]), name
    states, others = falqon_fx.adapters(one), falqon_fx.adapters(other)
    assert len(states) == 4
    for path, state in states.items():
        assert same(snapshot(state), snapshot(others[path])), path
        assert state.writes.any()


@pytest.mark.parametrize(
    "own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["FalqonCallback", "own"]
)
@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_the_trainer_resumes_bit_for_bit(tmp_path, prepared, own):
    whole = trainer_of(tmp_path / "whole", prepared, 6, own=own)
    whole.train()
    trainer_of(tmp_path / "run", prepared, 3, own=own).train()
    assert (tmp_path / "run/checkpoint-3" / FOLDER / "checkpoint.json").is_file()
    resumed = trainer_of(tmp_path / "run", prepared, 6, seed=1, own=own)
    resumed.train(resume_from_checkpoint=True)
    assert_same(whole.model, resumed.model)


@pytest.mark.slow
def test_without_the_callback_it_would_not(tmp_path):
    whole = trainer_of(tmp_path / "whole", True, 6)
    whole.train()
    trainer_of(tmp_path / "run", True, 3).train()
    resumed = trainer_of(tmp_path / "run", True, 6)
    resumed.remove_callback(TrainerCheckpoints)
    resumed.train(resume_from_checkpoint=True)
    with pytest.raises(AssertionError):
        assert_same(whole.model, resumed.model)


@pytest.mark.slow
def test_a_checkpoint_elsewhere_is_found_by_its_argument_or_missed_loudly(tmp_path):
    trainer_of(tmp_path / "run", True, 3).train()
    (tmp_path / "run").rename(tmp_path / "moved")
    folder = str(tmp_path / "moved/checkpoint-3")
    resumed = trainer_of(tmp_path / "run", True, 4)
    with pytest.warns(UserWarning, match="no FP8 state of that step was found"):
        resumed.train(resume_from_checkpoint=folder)
    resumed = trainer_of(tmp_path / "other", True, 5)
    resumed.args.resume_from_checkpoint = folder
    resumed.train(resume_from_checkpoint=folder)
    expected = trainer_of(tmp_path / "again", True, 5)
    expected.train()
    assert_same(expected.model, resumed.model)
