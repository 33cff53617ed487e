"""Training loops of other libraries: the numbers of a loop written by hand, bit for bit, and what
their own checkpoints bring back. With update="rows": one write per optimizer step, too.

All with inner="eager": what the loops do around a step doesn't depend on the inner compiler.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.integrations import transformers as integration
from falqon_fx.integrations.transformers import FalqonCallback, FalqonTrainer, WatchCallback
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.watching import summary
from falqon_fx.site import sharded
from tests.parameters import slow
from tests.trainers import (
    CONFIG,
    ROWS,
    SAVED,
    SITES,
    STEPS,
    adapter,
    all_prepared,
    arguments,
    as_trained,
    lora,
    losses,
    moved,
    same,
    tiny_base,
    trainable,
)
from tests.training import steps


def tiny_lm(config: FalqonConfig = CONFIG) -> nn.Module:
    """One layer of Llama with two sites, always the same."""
    return as_trained(peft.get_peft_model(tiny_base(), lora()), config)


def token_data(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (count, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(
    folder: Path,
    *callbacks: transformers.TrainerCallback,
    model: nn.Module | None = None,
    kind: type[Trainer] = Trainer,
    args: dict[str, Any] | None = None,
    **others: Any,
) -> Trainer:
    data = token_data()
    if model is None and "model_init" not in others:
        model = tiny_lm()
    return kind(
        model,
        TrainingArguments(**arguments(folder, **(args or {}))),
        train_dataset=data,
        eval_dataset=data[:2],
        callbacks=list(callbacks),
        **others,
    )


class Tracker(transformers.TrainerCallback):
    """Keeps what a tracker behind the other callbacks is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


WATCH, TRACKER = WatchCallback(), Tracker()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One uninterrupted run with the callback, watched."""
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("trainer")
    run = trainer(folder, FalqonCallback(CONFIG), WATCH, TRACKER)
    run.train()
    return run


def test_the_trainers_logs_and_trackers_get_what_watch_sees(trained):
    assert WATCH.seen is not None
    audits: dict[int, list[Any]] = {item.step: [] for item in WATCH.seen.history}
    for item in WATCH.seen.history:
        audits[item.step].append(item)
    wanted = [{f"falqon/{k}": v for k, v in summary(step).items()} for step in audits.values()]
    assert len(wanted) == STEPS
    assert all(len(step) == SITES for step in audits.values())
    for logs in (trained.state.log_history, TRACKER.logs):
        steps = [{k: v for k, v in log.items() if k.startswith("falqon/")} for log in logs]
        assert [step for step in steps if step] == wanted
        assert all("loss" in log for log, step in zip(logs, steps) if step)


def test_trainer_gives_the_losses_of_a_loop_written_by_hand(trained, tmp_path):
    """The same batches, accumulation, clipping, AdamW and evaluation in between."""
    plain = trainer(tmp_path)
    model = plain.model
    model.compile(backend="falqon", options=dict[str, Any](config=CONFIG))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    transformers.set_seed(0)
    batches = iter(plain.get_train_dataloader())
    expected, evaluated = [], []
    for step in range(1, STEPS + 1):
        window = [next(batches) for _ in range(2)]
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
        total = torch.zeros(())
        for batch in window:
            loss = model.train()(**batch, num_items_in_batch=torch.tensor(items)).loss
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(total.item())
        if step % SAVED == 0:
            with torch.no_grad():
                (batch,) = plain.get_eval_dataloader()
                evaluated.append(model.eval()(**batch).loss.item())
    assert losses(trained) == expected
    assert losses(trained, "eval_loss") == evaluated
    assert same(adapter(trained.model), adapter(model))
    assert moved(model, adapter(tiny_lm()))


@pytest.mark.parametrize("prepare", [slow(False), True])
def test_trainer_resumes_bit_for_bit_from_its_own_checkpoint(trained, tmp_path, prepare):
    """A, B and the optimizer are all that training changes; the base comes from the model."""
    checkpoint = Path(trained.args.output_dir) / f"checkpoint-{SAVED}"
    assert not (checkpoint / "falqon").exists()
    torch.manual_seed(5)
    other = peft.get_peft_model(tiny_base(), lora())  # another A than the checkpoint's
    resumed = trainer(tmp_path, FalqonCallback(CONFIG, prepare=prepare), model=other)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(trained)
    assert losses(resumed, "eval_loss") == losses(trained, "eval_loss")
    assert same(adapter(resumed.model), adapter(trained.model))
    assert all_prepared(resumed.model) == prepare


class Remake(transformers.TrainerCallback):
    """Forgets W' after the step of the checkpoint, so that it is made again from W and B."""

    def __init__(self, prepare: bool) -> None:
        self.prepare = prepare

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == SAVED:
            falqon_fx.restore(model)
            if self.prepare:
                falqon_fx.prepare(model, ROWS, progress=False)


@pytest.fixture(scope="module")
def trained_by_rows(tmp_path_factory):
    """One uninterrupted run with update="rows"."""
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("rows")
    run = trainer(folder, FalqonCallback(ROWS), model=tiny_lm(ROWS))
    run.train()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [False, True])
def test_with_rows_it_resumes_as_if_w_had_been_merged_anew_at_the_checkpoint(
    trained_by_rows, tmp_path, prepare
):
    """A PEFT checkpoint holds the adapter, not W': resuming from it alone merges base + s·B·A anew.
    Nothing else is lost: the run that merges again at that step without stopping is equal bit for
    bit.
    """
    assert steps(trained_by_rows.model) == [STEPS] * SITES  # the last evaluation writes the last
    checkpoint = Path(trained_by_rows.args.output_dir) / f"checkpoint-{SAVED}"
    callbacks = FalqonCallback(ROWS), Remake(prepare)
    remade = trainer(tmp_path / "remade", *callbacks, model=tiny_lm(ROWS))
    remade.train()
    torch._dynamo.reset()
    assert losses(remade)[:SAVED] == losses(trained_by_rows)[:SAVED]
    torch.manual_seed(5)
    other = as_trained(peft.get_peft_model(tiny_base(), lora()), ROWS)
    resumed = trainer(tmp_path / "resumed", FalqonCallback(ROWS, prepare=prepare), model=other)
    with pytest.warns(UserWarning, match="no FP8 state of that step was found"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(remade)
    assert losses(resumed, "eval_loss")[1:] == losses(remade, "eval_loss")[1:]
    assert same(adapter(resumed.model), adapter(remade.model))
    assert steps(resumed.model) == [STEPS - SAVED] * SITES


def test_a_trainer_checkpoint_is_a_peft_adapter(trained):
    folder = Path(trained.args.output_dir) / f"checkpoint-{STEPS}"
    loaded = peft.PeftModel.from_pretrained(tiny_base(), folder)
    assert same(adapter(loaded), adapter(trained.model))


def compile_before(folder: Path) -> Trainer:
    model = tiny_lm()
    model.compile(backend="falqon", options=dict[str, Any](config=CONFIG))
    return trainer(folder, model=model)


def as_argument(folder: Path) -> Trainer:
    args = {"torch_compile": True, "torch_compile_backend": "falqon"}
    return trainer(folder, kind=FalqonTrainer, args=args, falqon_config=CONFIG)


def from_model_init(folder: Path) -> Trainer:
    return trainer(folder, FalqonCallback(CONFIG), model_init=lambda: tiny_lm())


def added_later(folder: Path) -> Trainer:
    run = trainer(folder)
    run.add_callback(FalqonCallback(CONFIG))
    return run


@pytest.mark.parametrize(
    "make", [as_argument, slow(added_later), slow(compile_before), slow(from_model_init)]
)
def test_every_way_into_the_trainer_trains_alike(trained, tmp_path, make):
    run = make(tmp_path)
    run.train()
    assert losses(run) == losses(trained)
    assert len(falqon_fx.adapters(run.model)) == SITES
    assert same(adapter(run.model), adapter(trained.model))


def test_the_arguments_of_the_user_stay_as_they_are(tmp_path):
    args = TrainingArguments(
        **arguments(tmp_path), torch_compile_backend="falqon", torch_compile_mode="max-autotune"
    )
    before = copy.deepcopy(args.to_dict())
    run = FalqonTrainer(tiny_lm(), args, train_dataset=token_data(), eval_dataset=token_data(2))
    assert args.to_dict() == before
    (callback,) = (c for c in run.callback_handler.callbacks if isinstance(c, FalqonCallback))
    assert callback.config == FalqonConfig(mode="max-autotune")


def test_compiling_twice_is_refused(tmp_path):
    with pytest.raises(FalqonError, match="around what FalqonCallback compiles") as no:
        trainer(tmp_path, FalqonCallback(CONFIG), args={"torch_compile": True})
    assert "Leave torch_compile" in str(no.value)


def test_an_fsdp2_that_shards_no_integers_is_refused_at_once(tmp_path, monkeypatch):
    """Before the weights of the model are cast and freed."""
    monkeypatch.setattr(integration, "_fsdp", lambda: True)
    monkeypatch.setattr(sharded, "FSDP2_TAKES_INTEGERS", False)
    model = tiny_lm()
    with pytest.raises(FalqonError, match=r"shards no integers.*Use torch 2\.12 or newer"):
        trainer(tmp_path, FalqonCallback(CONFIG), model=model)
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())


def test_what_torch_compile_returned_is_refused_at_once(tmp_path):
    """transformers says that no column of the data fits, once training begins."""
    for model in (torch.compile(tiny_lm()), torch.compile(tiny_lm(), backend="falqon")):
        with pytest.raises(FalqonError, match=r"what torch\.compile returned"):
            trainer(tmp_path, FalqonCallback(CONFIG), model=model)


def test_generation_of_a_prepared_model_is_on_its_fp8_weights(tmp_path, graphs):
    """Rollouts are of the model that is trained, and no token makes a graph."""
    model = tiny_lm()
    own = trainer(tmp_path, FalqonCallback(CONFIG, prepare=True), model=model)
    own.train()
    made = len(graphs)
    dense = falqon_fx.restore(copy.deepcopy(model))
    ids = token_data(1)[0]["input_ids"][None]
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    said = model.eval().generate(input_ids=ids, **options)
    assert torch.equal(said, dense.eval().generate(input_ids=ids, **options))
    assert len(graphs) == made


@pytest.mark.parametrize("prepare", [slow(False, id="unprepared"), True])
def test_the_best_model_loaded_at_the_end_evaluates_as_it_did(tmp_path, prepare):
    """Bit for bit: nothing of the steps behind it is left. The highest loss is taken for the best,
    so that it is not the last one.
    """
    args = {
        "learning_rate": 0.1,
        "save_steps": 1,
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    run = trainer(tmp_path, FalqonCallback(CONFIG, prepare=prepare), args=args)
    run.train()
    evaluated = losses(run, "eval_loss")
    assert len(evaluated) == STEPS
    assert max(evaluated) > evaluated[-1]
    assert run.state.best_metric == max(evaluated)
    assert run.evaluate()["eval_loss"] == max(evaluated)
    assert all_prepared(run.model) == prepare
    assert len(falqon_fx.adapters(run.model)) == SITES
