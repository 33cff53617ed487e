"""transformers' own `Trainer` resumes bit for bit from its own checkpoint folders: by itself, and
where its files are not enough with what the callback adds.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from tests.models import LoraLinear, freeze_a, tiny_llama
from tests.parameters import PREPARED_OR_NOT, each_value, slow

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from falqon_fx.integrations.trainer_checkpoints import FOLDER, TrainerCheckpoints  # noqa: E402
from falqon_fx.integrations.transformers import FalqonCallback  # noqa: E402

CONFIGS = {
    "adapter": FalqonConfig(inner="eager"),
    "rows": FalqonConfig(update="rows", inner="eager", topk=5),
}
OWN = pytest.mark.parametrize(
    "own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["FalqonCallback", "own"]
)


def trainer_of(
    folder: Path,
    prepared: bool,
    last: int,
    seed: int = 0,
    own: bool = True,
    update: str = "rows",
    model: nn.Module | None = None,
) -> Any:
    """With ``own``, compiled by hand; else by `FalqonCallback`, which saves by itself."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = tiny_llama(layers=1, target_modules=["q_proj", "down_proj"]) if model is None else model
    config = CONFIGS[update]
    if update == "rows":
        freeze_a(model)
    callback = TrainerCheckpoints() if own else FalqonCallback(config, prepare=prepared)
    if own:
        if prepared:
            falqon_fx.prepare(model, config, progress=False)
        model.compile(backend="falqon", options=dict[str, Any](config=config))
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
        assert torch.equal(parameter.nan_to_num(), named[name].nan_to_num()), name
    sites, others = falqon_fx.adapters(one), falqon_fx.adapters(other)
    assert sites.keys() == others.keys()
    assert sites
    for path, site in sites.items():
        assert torch.equal(site.weight.view(torch.uint8), others[path].weight.view(torch.uint8))
        assert torch.equal(site.scale, others[path].scale)
        if isinstance(site, falqon_fx.MergedAdapter):
            assert site.writes.any()
            assert torch.equal(site.applied, others[path].applied)
            assert torch.equal(site.counters, others[path].counters)


@OWN
@each_value(update=list(CONFIGS), prepared=PREPARED_OR_NOT)
def test_the_trainer_resumes_bit_for_bit(tmp_path, prepared, update, own):
    """By its own files; with update="rows" by what the callback adds, and there alone."""
    whole = trainer_of(tmp_path / "whole", prepared, 6, own=own, update=update)
    whole.train()
    trainer_of(tmp_path / "run", prepared, 3, own=own, update=update).train()
    added = (tmp_path / "run/checkpoint-3" / FOLDER / "checkpoint.json").is_file()
    assert added is (update == "rows")
    resumed = trainer_of(tmp_path / "run", prepared, 6, seed=1, own=own, update=update)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="falqon: training resumes")
        resumed.train(resume_from_checkpoint=True)
    assert_same(whole.model, resumed.model)


@pytest.mark.parametrize("other", [0, 1, None], ids=["same batches", "other batches", "none"])
def test_a_run_that_resumes_on_another_calibration_is_warned(tmp_path, other):
    """The adapter and the optimizer are in the trainer's files, and the base is not."""

    def calibrated_trainer(folder: str, last: int, batches: int | None) -> Any:
        torch.manual_seed(0)
        model = tiny_llama(layers=1, target_modules=["q_proj", "down_proj"])
        if batches is not None:
            ids = torch.randint(64, (4, 6), generator=torch.Generator().manual_seed(batches))
            asked: dict[str, Any] = {"calibration": [{"input_ids": ids}], "progress": False}
            falqon_fx.prepare(model, CONFIGS["adapter"], **asked)
        prepared = batches is None
        folder_of = tmp_path / folder
        return trainer_of(folder_of, prepared, last, own=False, update="adapter", model=model)

    calibrated_trainer("run", 3, 0).train()
    resumed = calibrated_trainer("run", 6, other)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.train(resume_from_checkpoint=True)
    said = [str(w.message) for w in caught if "falqon: training resumes" in str(w.message)]
    if other != 0:
        assert len(said) == 1
        assert "on another base than it was saved on" in said[0]
        return
    assert not said
    whole = calibrated_trainer("whole", 6, 0)
    whole.train()
    assert_same(whole.model, resumed.model)


class HandWritten(nn.Module):
    """A prepared layer in a model that is not PEFT's, of which the trainer saves all tensors."""

    _keys_to_ignore_on_save = None  # the trainer asks transformers' models for it

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32).requires_grad_(False)
        self.layer = LoraLinear(32, 64)
        self.wide = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.wide(self.layer(self.embedding(input_ids)))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("prepared", [slow(False, id="unprepared"), True])
def test_a_model_that_is_not_pefts_resumes_bit_for_bit(tmp_path, prepared):
    def run(folder: str, last: int, seed: int) -> Any:
        torch.manual_seed(0)
        model = HandWritten()
        if seed:  # what a checkpoint must bring
            nn.init.normal_(model.wide.weight)
        trainer = trainer_of(
            tmp_path / folder, prepared, last, seed, own=False, update="adapter", model=model
        )
        trainer.train(resume_from_checkpoint=bool(seed))
        return trainer

    whole = run("whole", 6, 0)
    run("run", 3, 0)
    assert (tmp_path / "run/checkpoint-3" / FOLDER).is_dir() is prepared
    resumed = run("run", 6, 1)
    named = dict(whole.model.named_parameters())
    assert named.keys() == dict(resumed.model.named_parameters()).keys()
    assert ("wide.code" in named) is prepared
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, named[name]), name


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
