"""What is wrong is an error on every rank, with its remedy; a rank that dies ends the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import falqon_fx
from falqon_fx import FalqonConfig
from tests.distributed import ranks
from tests.distributed.training import compile_blocks, make, shard
from tests.models import freeze_a, tiny_mlp

pytestmark = pytest.mark.slow
CONFIG = FalqonConfig(inner="eager")
REMEDIES = {
    "not prepared": "Call falqon_fx.prepare(model) before fully_shard",
    "one layer not prepared": "Call falqon_fx.prepare(model) before fully_shard",
    "prepared after": "Call falqon_fx.prepare(model) before fully_shard",
    "another config": "Give prepare() and torch.compile() the same config",
    "ranks differ": "Call falqon_fx.prepare with the same config on every rank",
    "rows": 'Use update="adapter"',
    "transpose kept": 'Set transpose="auto"',
}


def test_two_ranks(tmp_path: Path):
    for result in ranks.run(work, 2, tmp_path):
        assert result.keys() == REMEDIES.keys()
        for name, remedy in REMEDIES.items():
            assert remedy in result[name], name


def work() -> dict[str, str]:
    return {name: refusal(call) for name, call in CALLS.items()}


def refusal(call: Callable[[], Any]) -> str:
    torch._dynamo.reset()
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


def not_prepared() -> None:
    shard(compile_blocks(make(CONFIG, prepared=False), CONFIG))(torch.randn(2, 64))


def one_layer_not_prepared() -> None:
    model = make(CONFIG, prepared=False)
    most = FalqonConfig(inner="eager", exclude=["blocks.1.down*"])
    falqon_fx.prepare(model, most, progress=False)
    shard(compile_blocks(model, CONFIG))(torch.randn(2, 64))


def prepared_after() -> None:
    falqon_fx.prepare(shard(make(CONFIG, prepared=False)), CONFIG)


def another_config() -> None:
    model = make(CONFIG, prepared=True)
    other = FalqonConfig(inner="eager", granularity="tensor")
    shard(compile_blocks(model, other))(torch.randn(2, 64))


def ranks_differ() -> None:
    make(FalqonConfig(scale=("pow2", "amax")[dist.get_rank()]), prepared=True)


def rows() -> None:
    config = FalqonConfig(inner="eager", update="rows")
    model = freeze_a(tiny_mlp())
    falqon_fx.prepare(model, config, progress=False)
    model.compile(backend="falqon", options={"config": config})
    fully_shard(model)(torch.randn(2, 32))


def transpose_kept() -> None:
    config = FalqonConfig(inner="eager", transpose="store")
    shard(compile_blocks(make(config, prepared=True), config))(torch.randn(2, 64))


CALLS = {
    "not prepared": not_prepared,
    "one layer not prepared": one_layer_not_prepared,
    "prepared after": prepared_after,
    "another config": another_config,
    "ranks differ": ranks_differ,
    "rows": rows,
    "transpose kept": transpose_kept,
}


def test_a_rank_that_does_not_prepare(tmp_path: Path):
    """The other waits as long as its process group does, and says so; it itself ends, too."""
    codes, errors = ranks.start(one_prepares, 2, tmp_path, 120, patience=5)
    assert codes[0] == 1
    assert codes[1] not in (0, -9), errors[1]  # an error of its own: it was not killed
    assert "Call falqon_fx.prepare(model, config) on every rank" in errors[0]


def one_prepares() -> None:
    model = make(CONFIG, prepared=dist.get_rank() == 0)
    shard(compile_blocks(model, CONFIG))(torch.randn(2, 64))


def test_a_rank_that_dies_ends_the_others(tmp_path: Path):
    codes, errors = ranks.start(one_dies, 2, tmp_path, 120)
    assert codes[1] == 3
    assert codes[0] not in (0, -9)  # an error of its own: it was not killed
    assert "RuntimeError" in errors[0]


def one_dies() -> None:
    model = shard(compile_blocks(make(CONFIG, prepared=True), CONFIG))
    for step in range(4):
        if step == 2 and dist.get_rank() == 1:
            os._exit(3)
        model(torch.randn(2, 64)).sum().backward()
