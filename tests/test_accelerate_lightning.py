"""Accelerate and Lightning train as a loop written by hand, bit for bit, and resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import falqon_fx
from falqon_fx import FalqonConfig
from tests.models import Relu, tiny_mlp
from tests.trainers import CONFIG, ROWS, SAVED, STEPS, adapter, as_trained, same, trainable


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
