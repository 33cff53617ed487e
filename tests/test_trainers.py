"""Training loops of other libraries: the numbers of a loop written by hand, bit for bit, and what
their own checkpoints bring back. With update="rows": one write per optimizer step, too.

All with inner="eager": what the loops do around a step doesn't depend on the inner compiler.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import datasets
import lightning
import peft
import pytest
import tokenizers
import torch
import transformers
import trl
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.integrations.transformers import FalqonCallback, FalqonTrainer, FalqonTrainerMixin
from falqon_fx.model.fp8_linear import Fp8Linear
from tests.models import Relu, fill_b, tiny_mlp
from tests.parameters import PREPARED_OR_NOT, each_value, slow
from tests.training import steps

CONFIG = FalqonConfig(inner="eager")
ROWS = FalqonConfig(inner="eager", update="rows", topk=10)
STEPS, SAVED = 4, 2  # optimizer steps of a run, and the one after which it is saved


def tiny_base() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
SITES = 2


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", **LORA)


def tiny_lm(config: FalqonConfig = CONFIG) -> nn.Module:
    """One layer of Llama with two sites, always the same."""
    return as_trained(peft.get_peft_model(tiny_base(), lora()), config)


def as_trained(model: nn.Module, config: FalqonConfig) -> nn.Module:
    """With update="rows", A is frozen."""
    for name, parameter in model.named_parameters():
        if config.update == "rows" and "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def token_data(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (count, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """A and B: all that training changes with update="adapter"."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def moved(model: nn.Module, start: dict[str, Tensor]) -> bool:
    """Whether every A and every B is another one now."""
    found = adapter(model)
    return found.keys() == start.keys() and not any(torch.equal(found[n], start[n]) for n in start)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- transformers ----------------------------------------------------------------------------------


def arguments(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "eval_strategy": "steps",
        "eval_steps": SAVED,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **others,
    }


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


def losses(trained: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trained.state.log_history if key in entry]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One uninterrupted run with the callback."""
    torch._dynamo.reset()
    run = trainer(tmp_path_factory.mktemp("trainer"), FalqonCallback(CONFIG))
    run.train()
    return run


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


def all_prepared(model: nn.Module) -> bool:
    sites = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    assert len(sites) == SITES
    return all(isinstance(base, Fp8Linear) for base in sites)


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
    "make", [as_argument, added_later, slow(compile_before), slow(from_model_init)]
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


# -- trl -------------------------------------------------------------------------------------------


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
    """What trl's reference model and the policy say of one batch, at each step and at the end."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.batch: Any = None
        self.reference: list[Tensor] = []
        self.policy: list[Tensor] = []

    def look(self) -> None:
        batch = (
            next(iter(self.trainer.get_train_dataloader())) if not self.reference else self.batch
        )
        self.batch = batch
        model = self.trainer.model
        self.reference.append(torch.cat(self.trainer.compute_ref_log_probs(model, batch)))
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            self.policy.append(model(**inputs, use_cache=False).logits)

    def on_step_begin(self, args, state, control, **kwargs):
        self.look()

    def on_train_end(self, args, state, control, **kwargs):
        self.look()


@each_value(reference=["disabled adapter", "ref adapter"], prepare=PREPARED_OR_NOT)
def test_dpos_reference_model_stays_as_it_is(tmp_path, reference, prepare):
    """Its log-probabilities are equal bit for bit from the first to the last step, whether it is
    the model without its adapter or with a copy of the adapter that training began with. The policy
    begins there, bit for bit, and goes elsewhere.
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
    assert not torch.equal(watch.policy[0], watch.policy[-1])
    first, *_, last = losses(run, "rewards/chosen")
    assert first == 0.0
    assert last != 0.0
    assert all_prepared(run.model) == prepare
    assert len(falqon_fx.adapters(run.model)) == SITES
    trained = {n: v for n, v in start.items() if ".ref." not in n}
    assert not any(torch.equal(v, adapter(run.model)[n]) for n, v in trained.items())
    assert all(torch.equal(v, adapter(run.model)[n]) for n, v in start.items() if n not in trained)


# -- loops around a small model --------------------------------------------------------------------


def batches(count: int = 2 * STEPS) -> DataLoader[Any]:
    rows = torch.randn(2 * count, 5, 32, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(rows), batch_size=2)


def loss_of(output: Tensor, x: Tensor) -> Tensor:
    return (output - x / 2).float().square().mean()


CLIP = 0.01  # below the gradients' norm, so that it acts


def by_hand(
    make: Callable[[], nn.Module],
    data: list[Any],
    autocast: torch.dtype | None = None,
    config: FalqonConfig = CONFIG,
) -> tuple[list[float], nn.Module]:
    """The losses of two accumulated batches a step, clipped, with AdamW."""
    torch.manual_seed(0)
    model = as_trained(make(), config)
    call = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    optimizer, found = torch.optim.AdamW(trainable(model), lr=1e-2), []
    for i, (x,) in enumerate(data, 1):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            output = call(x)
        loss = loss_of(output, x)
        (loss / 2).backward()
        found.append(loss.item())
        if i % 2 == 0:
            assert nn.utils.clip_grad_norm_(trainable(model), CLIP) > CLIP
            optimizer.step()
            optimizer.zero_grad()
    torch._dynamo.reset()
    return found, model


def accelerated(
    folder: Path, precision: str, resume: bool, config: FalqonConfig
) -> tuple[list[float], nn.Module]:
    """Accelerate's own loop; saved after SAVED steps, or resumed from there."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=precision
    )
    torch.manual_seed(0)
    plain = as_trained(Relu(), config)
    plain.compile(backend="falqon", options=dict[str, Any](config=config))
    model, optimizer, data = accelerator.prepare(
        plain, torch.optim.AdamW(trainable(plain), lr=1e-2), batches()
    )
    start = 0
    if resume:
        accelerator.load_state(str(folder))
        start = 2 * SAVED
        data = accelerator.skip_first_batches(data, start)
    found = []
    for i, (x,) in enumerate(data, start + 1):
        with accelerator.accumulate(model):
            loss = loss_of(model(x), x)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trainable(plain), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
        if i == 2 * SAVED:
            if config.update == "rows":
                falqon_fx.restore(plain)  # W' is not in the state dict: resuming merges anew
            accelerator.save_state(str(folder))
    return found, plain


@pytest.mark.parametrize(
    ("precision", "config"),
    [("no", CONFIG), ("bf16", CONFIG), ("no", ROWS)],
    ids=["no", "bf16", "no-rows"],
)
def test_accelerate_accumulates_clips_and_resumes(tmp_path, precision, config):
    found, model = accelerated(tmp_path, precision, False, config)
    torch._dynamo.reset()
    again, resumed = accelerated(tmp_path, precision, True, config)
    assert again == found[2 * SAVED :]
    assert same(adapter(resumed), adapter(model))
    torch._dynamo.reset()
    autocast = torch.bfloat16 if precision == "bf16" else None
    expected, alone = by_hand(Relu, [*batches()], autocast, config)
    if config.update == "rows":
        assert found[: 2 * SAVED] == expected[: 2 * SAVED]
    else:
        assert found == expected
        assert same(adapter(model), adapter(alone))


class Lit(lightning.LightningModule):
    """Lightning compiles nothing by itself: the module compiles its model."""

    def __init__(self, prepare: bool, config: FalqonConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = as_trained(tiny_mlp(), config)
        if prepare:
            falqon_fx.prepare(self.model, config, progress=False)
        self.model.compile(backend="falqon", options=dict[str, Any](config=config))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = loss_of(self.model(batch[0]), batch[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(trainable(self.model), lr=1e-2)


def lightning_run(
    folder: Path,
    prepare: bool,
    epochs: int,
    resume: str | None = None,
    config: FalqonConfig = CONFIG,
) -> Lit:
    """Epochs of SAVED steps: Lightning resumes at the start of an epoch."""
    torch._dynamo.reset()
    module = Lit(prepare, config)
    run = lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=CLIP,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module, batches(2 * SAVED), ckpt_path=resume)
    return module


def test_lightning_trains_as_a_loop_by_hand(tmp_path):
    assert STEPS == 2 * SAVED
    expected, model = by_hand(tiny_mlp, 2 * [*batches(2 * SAVED)])
    run = lightning_run(tmp_path, prepare=False, epochs=2)
    assert run.losses == expected
    assert same(adapter(run.model), adapter(model))


@pytest.mark.parametrize(
    ("prepare", "config"),
    [(False, CONFIG), (True, CONFIG), (True, ROWS)],
    ids=["unprepared", "prepared", "prepared-rows"],
)
def test_lightning_resumes_exactly(tmp_path, prepare, config):
    """Its checkpoint is the module's whole state: a prepared model's holds the FP8 base, with
    update="rows" W'.
    """
    whole = lightning_run(tmp_path / "whole", prepare, epochs=2, config=config)
    lightning_run(tmp_path / "first", prepare, epochs=1, config=config)
    (saved,) = (tmp_path / "first").rglob("*.ckpt")
    resumed = lightning_run(tmp_path, prepare, epochs=2, resume=str(saved), config=config)
    assert resumed.losses == whole.losses[2 * SAVED :]
    ends = [module.state_dict() for module in (whole, resumed)]
    assert any(name.endswith(".code") for name in ends[0]) == prepare
    assert same(*ends)
