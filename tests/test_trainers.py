"""Training loops of other libraries: the numbers of a loop written by hand, bit for bit, and one
write per optimizer step.

All with inner="eager": what the loops do around a step doesn't depend on the inner compiler.
"""

from __future__ import annotations

import copy
import random
import re
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
from falqon_fx.update import STEP
from tests.models import Relu, lora_b, tiny_mlp

CONFIG = FalqonConfig(inner="eager", topk=10)
STEPS, SAVED = 4, 2  # optimizer steps of a run, and the one after which it is saved


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


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


def tiny_lm() -> nn.Module:
    """One layer of Llama with two sites, always the same."""
    return peft.get_peft_model(tiny_base(), lora())


def token_data(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (count, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def steps(model: nn.Module) -> list[int]:
    """How many steps of B each site has written."""
    return [int(state.counters[STEP]) for state in falqon_fx.adapters(model).values()]


def adapter(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


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
    model.compile(backend="falqon", options={"config": CONFIG})
    trained_parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained_parameters, lr=1e-2, weight_decay=0.0, fused=True)
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
    assert steps(trained.model) == [STEPS] * SITES  # the last is written by the last evaluation


class Remake(transformers.TrainerCallback):
    """Forgets W' after the step of the checkpoint, so that it is made again from W and B."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == SAVED:
            falqon_fx.restore(model)


@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    """The same run, but W' is merged anew after the step of the checkpoint."""
    torch._dynamo.reset()
    run = trainer(tmp_path_factory.mktemp("remade"), FalqonCallback(CONFIG), Remake())
    run.train()
    return run


@pytest.mark.parametrize("prepare", [False, True])
def test_trainer_resumes_as_if_w_had_been_merged_anew_at_the_checkpoint(
    trained, remade, tmp_path, prepare
):
    """A PEFT checkpoint holds the adapter, not W': resuming merges base + s·B·A again. Nothing else
    is lost: the run that merges again at that step without stopping is equal bit for bit.
    """
    checkpoint = Path(trained.args.output_dir) / f"checkpoint-{SAVED}"
    assert losses(remade)[:SAVED] == losses(trained)[:SAVED]
    torch.manual_seed(5)
    other = peft.get_peft_model(tiny_base(), lora())  # another A than the checkpoint's
    resumed = trainer(tmp_path, FalqonCallback(CONFIG, prepare=prepare), model=other)
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
    model.compile(backend="falqon", options={"config": CONFIG})
    return trainer(folder, model=model)


def as_argument(folder: Path) -> Trainer:
    args = {"torch_compile": True, "torch_compile_backend": "falqon"}
    return trainer(folder, kind=FalqonTrainer, args=args, falqon_config=CONFIG)


def from_model_init(folder: Path) -> Trainer:
    return trainer(folder, FalqonCallback(CONFIG), model_init=tiny_lm)


def added_later(folder: Path) -> Trainer:
    run = trainer(folder)
    run.add_callback(FalqonCallback(CONFIG))
    return run


@pytest.mark.parametrize("make", [compile_before, as_argument, from_model_init, added_later])
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

    def run(folder: Path, *callbacks: transformers.TrainerCallback) -> trl.SFTTrainer:
        torch._dynamo.reset()
        data, compiled = texts(), {"torch_compile": True, "torch_compile_backend": "falqon"}
        return SFTTrainer(
            tiny_base(),
            trl.SFTConfig(**arguments(folder, **compiled)),
            train_dataset=data,
            eval_dataset=data.select(range(2)),
            processing_class=tokenizer(),
            peft_config=lora(),
            callbacks=list(callbacks),
            falqon_config=CONFIG,
        )

    whole = run(tmp_path / "whole", Remake())
    assert whole.args.bf16
    assert whole.args.gradient_checkpointing
    whole.train()
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    assert losses(resumed) == losses(whole)
    assert losses(resumed, "eval_loss")[1:] == losses(whole, "eval_loss")[1:]
    assert same(adapter(resumed.model), adapter(whole.model))
    assert steps(resumed.model) == steps(whole.model) == [STEPS - SAVED] * SITES


# -- loops around a small model --------------------------------------------------------------------


def batches(count: int = 2 * STEPS) -> DataLoader[Any]:
    rows = torch.randn(2 * count, 5, 32, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(rows), batch_size=2)


def loss_of(output: Tensor, x: Tensor) -> Tensor:
    return (output - x / 2).float().square().mean()


CLIP = 0.01  # below the gradients' norm, so that it acts


def by_hand(
    make: Callable[[], nn.Module], data: list[Any], autocast: torch.dtype | None = None
) -> tuple[list[float], nn.Module]:
    """The losses of two accumulated batches a step, clipped, with AdamW."""
    torch.manual_seed(0)
    model = make()
    call = torch.compile(model, backend="falqon", options={"config": CONFIG})
    optimizer, found = torch.optim.AdamW(lora_b(model), lr=1e-2), []
    for i, (x,) in enumerate(data, 1):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            output = call(x)
        loss = loss_of(output, x)
        (loss / 2).backward()
        found.append(loss.item())
        if i % 2 == 0:
            assert nn.utils.clip_grad_norm_(lora_b(model), CLIP) > CLIP
            optimizer.step()
            optimizer.zero_grad()
    torch._dynamo.reset()
    return found, model


def accelerated(folder: Path, precision: str, resume: bool) -> tuple[list[float], nn.Module]:
    """Accelerate's own loop; saved after SAVED steps, or resumed from there."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=precision
    )
    torch.manual_seed(0)
    plain = Relu()
    plain.compile(backend="falqon", options={"config": CONFIG})
    model, optimizer, data = accelerator.prepare(
        plain, torch.optim.AdamW(lora_b(plain), lr=1e-2), batches()
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
                accelerator.clip_grad_norm_(lora_b(plain), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
        if i == 2 * SAVED:
            falqon_fx.restore(plain)  # as resuming does
            accelerator.save_state(str(folder))
    return found, plain


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_accumulates_clips_and_resumes(tmp_path, precision):
    found, model = accelerated(tmp_path, precision, resume=False)
    torch._dynamo.reset()
    again, resumed = accelerated(tmp_path, precision, resume=True)
    assert again == found[2 * SAVED :]
    assert same(adapter(resumed), adapter(model))
    torch._dynamo.reset()
    expected, _ = by_hand(Relu, [*batches()], torch.bfloat16 if precision == "bf16" else None)
    assert found[: 2 * SAVED] == expected[: 2 * SAVED]


class Lit(lightning.LightningModule):
    """Lightning compiles nothing by itself: the module compiles its model."""

    def __init__(self, prepare: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = tiny_mlp()
        if prepare:
            falqon_fx.prepare(self.model, CONFIG, progress=False)
        self.model.compile(backend="falqon", options={"config": CONFIG})
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = loss_of(self.model(batch[0]), batch[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lora_b(self.model), lr=1e-2)


def lightning_run(folder: Path, prepare: bool, epochs: int, resume: str | None = None) -> Lit:
    """Epochs of SAVED steps: Lightning resumes at the start of an epoch."""
    torch._dynamo.reset()
    module = Lit(prepare)
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


def test_lightning_resumes_a_prepared_model_exactly(tmp_path):
    """Its checkpoint is the module's whole state, and a prepared model's state holds W'."""
    whole = lightning_run(tmp_path / "whole", prepare=True, epochs=2)
    lightning_run(tmp_path / "first", prepare=True, epochs=1)
    (saved,) = (tmp_path / "first").rglob("*.ckpt")
    resumed = lightning_run(tmp_path, prepare=True, epochs=2, resume=str(saved))
    assert resumed.losses == whole.losses[2 * SAVED :]
    ends = [module.state_dict() for module in (whole, resumed)]
    assert any(name.endswith(".code") for name in ends[0])
    assert same(*ends)


# -- the README ------------------------------------------------------------------------------------


def test_the_readmes_trainer_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme.split("\n## Trainers\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    for code in blocks:
        torch._dynamo.reset()
        model = tiny_lm()
        names: dict[str, Any] = {"model": model, "data": token_data(4), "config": CONFIG}
        exec(code, names)
        assert len(falqon_fx.adapters(model)) == SITES, code
        assert any(b.any() for b in lora_b(model)), code
