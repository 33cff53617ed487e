"""Fixtures of several files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import falqon_fx
from tests.attack import harness
from tests.attack.checkpoints import fp8_of_others, lora, tiny
from tests.attack.crafted import model_and_optimizer


@pytest.fixture(scope="module")
def folders() -> Iterator[Path]:
    """One folder of each kind."""
    with tempfile.TemporaryDirectory() as temporary:
        harness.place_victims(Path(temporary))
        folder = Path(temporary, "folders")
        folder.mkdir()
        for update in ("adapter", "rows"):
            model, optimizer = model_and_optimizer(update)
            falqon_fx.save_checkpoint(model, folder / update, optimizer=optimizer)
        torch.manual_seed(0)
        tiny().save_pretrained(folder / "dense", max_shard_size="12KB")
        falqon_fx.prequantize(
            folder / "dense", folder / "prequantized", lora(), workers=1, progress=False
        )
        fp8_of_others(folder)
        yield folder
