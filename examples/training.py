"""One training run of a LoRA model, plain or through falqon; used by examples and benchmarks.

Every run starts from the same base, the same Kaiming A and the same batches, and is measured in the
same way, so that only the thing named by its :class:`Variant` differs.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from smollm import IGNORED, Batch, prompt_ids
from torch import nn

import falqon_fx

LORA = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
# What the method's public code does: as many rows a step as the rank has (its warmup flag is never
# cleared), B as the buffer that each step drops, one scale per tensor. It leaves out alpha / r,
# which is 1 here.
PUBLIC_CODE = {
    "update": "rows",
    "pending": "drop",
    "granularity": "tensor",
    "topk": LORA.r,
    "rounding": "nearest",
    "init": "svd",
    "scale": "amax",
}


@dataclass(frozen=True)
class Variant:
    """What distinguishes one run from another."""

    name: str
    title: str
    learning_rate: float
    backend: str  # "eager", "inductor" or "falqon"
    options: Mapping[str, Any] = field(default_factory=dict)  # of FalqonConfig
    train_a: bool = True
    bf16_adapter: bool = False  # PEFT's default keeps A and B in float32
    by_blocks: bool = False  # falqon_fx.compile_blocks
    calibrated: bool = False  # falqon_fx.prepare(..., calibration=)
    terms: Mapping[str, Any] = field(default_factory=dict)  # its compensate= and outliers=


@dataclass(frozen=True)
class Trainee:
    """A model with its two ways to be called."""

    model: PeftModel
    train_step: Callable[..., Any]
    evaluate: Callable[..., Any]


@dataclass(frozen=True)
class Trained:
    """The measurements of one finished run."""

    nll_before: float
    nll_after: float
    losses: list[float]
    seconds: list[float]  # of each step, the first with compilation

    @property
    def first_step_seconds(self) -> float:
        return self.seconds[0]

    @property
    def seconds_per_step(self) -> float:
        """Median of the steps after the first (of all, if there is only one)."""
        return statistics.median(self.seconds[1:] or self.seconds)


# ---------------------------------------------------------------- build


def build(
    variant: Variant, base: nn.Module, seed: int, calibration: Sequence[Batch] = ()
) -> Trainee:
    """The variant's model on a copy of ``base``, ready to be trained."""
    model = with_adapter(variant, copy.deepcopy(base), seed)
    if variant.backend == "falqon":
        read = [ids for batch in calibration for ids in without_padding(batch)]
        report = falqon_fx.prepare(
            model,
            falqon_fx.FalqonConfig(**variant.options),
            calibration=read if variant.calibrated else None,
            **variant.terms,
        )
        found = {"exclude": report.config.exclude}  # "sensitive:8" has become names
        variant = replace(variant, options={**variant.options, **found})
    return compiled(variant, model)


def without_padding(batch: Batch) -> list[torch.Tensor]:
    """Each row's tokens [1, n]; the last of them has a label."""
    ends = [int((row != IGNORED).nonzero().max()) + 1 for row in batch.labels]
    return [ids[None, :end] for ids, end in zip(batch.input_ids, ends, strict=True)]


def with_adapter(variant: Variant, base: nn.Module, seed: int) -> PeftModel:
    """PEFT's adapter on ``base``, with an A that depends on ``seed`` alone."""
    torch.manual_seed(seed)
    model = get_peft_model(
        base, copy.deepcopy(LORA), autocast_adapter_dtype=not variant.bf16_adapter
    )
    if not variant.train_a:
        freeze_a(model)
    return model


def compiled(variant: Variant, model: PeftModel) -> Trainee:
    """The model with the variant's compiler.

    Evaluation runs op by op: compiling one more graph costs more than it saves here.
    """
    if variant.by_blocks:
        falqon_fx.compile_blocks(model, falqon_fx.FalqonConfig(**variant.options))
        return Trainee(model, model, model)
    if variant.backend == "falqon":
        options = dict(variant.options)
        call = torch.compile(model, backend="falqon", options=options)
        evaluate = torch.compile(model, backend="falqon", options=options | {"inner": "eager"})
        return Trainee(model, call, evaluate)
    if variant.backend == "inductor":
        return Trainee(model, torch.compile(model), model)
    return Trainee(model, model, model)


def freeze_a(model: nn.Module) -> None:
    """Train B alone, as LoRA-FA does."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers that PEFT put an adapter on, by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def site_weight_bytes(trainee: Trainee) -> int:
    """Bytes of the base weights under the adapters: dense, or FP8 with all that belongs to it."""
    bases = [layer.get_base_layer() for layer in lora_layers(trainee.model).values()]
    return sum(
        parameter.nbytes
        for base in bases
        for name, parameter in base.named_parameters(recurse=False)
        if name != "bias"
    )


def site_count(trainee: Trainee, variant: Variant) -> int:
    """How many layers train an adapter; for falqon, how many of them it runs in FP8."""
    if variant.backend == "falqon":
        return len(falqon_fx.adapters(trainee.model))
    return len(lora_layers(trainee.model))


def release() -> None:
    """Drop compiled code and what it keeps alive, before the next model comes."""
    torch._dynamo.reset()
    gc.collect()


# ---------------------------------------------------------------- run


class LineProgress(Progress):
    """Progress for log files: a line when a phase begins, and five more until it ends."""

    def add_task(self, description: str, *args: Any, **kwargs: Any) -> TaskID:
        task = super().add_task(description, *args, **kwargs)
        self.console.print(f"{description} ...", highlight=False)
        return task

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        super().update(task_id, **kwargs)
        task = self._tasks[task_id]
        every = max(1, int(task.total or 1) // 5)
        if kwargs.get("advance") and (task.completed % every == 0 or task.finished):
            done = f"{task.completed:.0f}/{task.total:.0f}"
            text = (
                f"{task.description}: {done}, {task.elapsed:.0f} s  {task.fields.get('note', '')}"
            )
            self.console.print(text.rstrip(), highlight=False)


def progress_bar(console: Console) -> Progress:
    """The bars of one run; lines where the console is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<44}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:>3}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    if console.is_terminal:
        return Progress(*columns, console=console)
    return LineProgress(*columns, console=console, disable=True)


def run(
    trainee: Trainee,
    variant: Variant,
    train: list[Batch],
    held_out: list[Batch],
    progress: Progress,
    nll_before: float | None = None,
) -> Trained:
    """Evaluate, train on every batch of ``train``, evaluate again.

    ``nll_before`` is measured unless it is given: with B = 0 every bf16 run starts as the base.
    """
    if nll_before is None:
        nll_before = mean_nll(trainee, held_out, progress, f"{variant.title}: held-out before")
    optimizer = make_optimizer(trainee.model, variant.learning_rate)
    title = f"{variant.title}: training"
    losses, seconds = train_steps(trainee, optimizer, train, progress, title)
    nll_after = mean_nll(trainee, held_out, progress, f"{variant.title}: held-out after")
    return Trained(nll_before, nll_after, losses, seconds)


def train_steps(
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    progress: Progress,
    title: str,
) -> tuple[list[float], list[float]]:
    """Loss and seconds of one step a batch."""
    trainee.model.train()
    task = progress.add_task(title, total=len(batches), note="first step")
    losses: list[float] = []
    seconds: list[float] = []
    for batch in batches:
        start = time.perf_counter()
        loss = train_step(trainee, optimizer, batch)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        progress.update(task, advance=1, note=f"loss {loss:.3f}  {seconds[-1]:.2f} s")
    return losses, seconds


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Fused AdamW on what is trainable, at a constant rate and without weight decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0, fused=True)


def train_step(trainee: Trainee, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Forward, backward, step; the loss before the step."""
    loss = trainee.train_step(input_ids=batch.input_ids, labels=batch.labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


@torch.no_grad()
def mean_nll(trainee: Trainee, batches: list[Batch], progress: Progress, title: str) -> float:
    """Mean negative log-likelihood of an answer token, over all batches."""
    trainee.model.eval()
    task = progress.add_task(title, total=len(batches), note="")
    total = 0.0
    for batch in batches:
        loss = trainee.evaluate(input_ids=batch.input_ids, labels=batch.labels).loss
        total += loss.item() * batch.targets
        progress.update(task, advance=1)
    return total / sum(batch.targets for batch in batches)


def answers(trainee: Trainee, tokenizer: Any, questions: list[str], tokens: int = 24) -> list[str]:
    """A short greedy answer to each question."""
    if not questions:
        return []
    prompts = [prompt_ids(tokenizer, (("user", question),)) for question in questions]
    given = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    settings = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True}
    model: Any = trainee.model.eval()  # PEFT's generate has no types
    said = model.generate(**given, **settings, pad_token_id=tokenizer.pad_token_id)
    new = said[:, given["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
