"""A calibration on several processes: each reads batches of its own, all get the same terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.model.fp8_linear import Fp8Linear
from tests.distributed import ranks
from tests.distributed.training import compile_blocks, make, shard
from tests.sites import randn

pytestmark = pytest.mark.slow
CONFIG = FalqonConfig(inner="aot_eager")
BATCHES = [randn(12, 64, seed=i) for i in range(4)]


def calibrated(batches: list[Tensor]) -> Any:
    model = make(CONFIG, prepared=False)
    falqon_fx.prepare(model, CONFIG, calibration=batches, compensate=8, outliers=4, progress=False)
    return model


def chosen(batches: list[Tensor]) -> dict[str, Any]:
    """What is left out and bought where the batches decide."""
    model, config = make(CONFIG, prepared=False), FalqonConfig(exclude="sensitive:1")
    report = falqon_fx.prepare(
        model, config, calibration=batches, compensate="auto", progress=False
    )
    return {"left": report.config.exclude, **terms(model)}


def terms(model: Any) -> dict[str, Tensor]:
    layers = {p: m for p, m in model.named_modules() if isinstance(m, Fp8Linear)}
    return {f"{p}.{n}": t.detach().clone() for p, m in layers.items() for n, t in m.terms.items()}


def two() -> dict[str, Any]:
    """Terms of both ranks; the output and gradients of a sharded model and of a whole one."""
    model = calibrated(BATCHES[dist.get_rank() :: 2])
    found: dict[str, Any] = {"terms": terms(model)}
    found["chosen"] = chosen(BATCHES[dist.get_rank() :: 2])
    whole = compile_blocks(calibrated(BATCHES[dist.get_rank() :: 2]), CONFIG)
    parts = compile_blocks(model, CONFIG)
    shard(parts)
    for name, each in (("whole", whole), ("sharded", parts)):
        x = BATCHES[0].clone().requires_grad_()
        y = each(x)
        y.square().sum().backward()
        found[name] = y.detach(), x.grad
    return found


def test_two_ranks_get_the_same_terms_and_fsdp2_shards_them(tmp_path: Path):
    first, second = ranks.run(two, 2, tmp_path, 300)
    assert first["terms"].keys() == second["terms"].keys() != set()
    assert all(torch.equal(t, second["terms"][name]) for name, t in first["terms"].items())
    left = first["chosen"].pop("left")
    assert left == second["chosen"].pop("left") != ()
    assert first["chosen"].keys() == second["chosen"].keys() != set()
    assert all(torch.equal(t, second["chosen"][name]) for name, t in first["chosen"].items())
    for result in (first, second):
        for a, b in zip(result["whole"], result["sharded"], strict=True):
            assert torch.equal(a, b)


def cut() -> str:
    """What a calibration says of layers that tensor parallelism has cut."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = make(CONFIG, prepared=False)
    plan = {"blocks.0.up.base_layer": ColwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    try:
        falqon_fx.prepare(model, CONFIG, calibration=BATCHES, progress=False)
    except FalqonError as error:
        return str(error)
    return ""


def test_layers_that_are_cut_are_refused_by_name(tmp_path: Path):
    for said in ranks.run(cut, 2, tmp_path, 300):
        assert said.startswith("blocks.0.up.base_layer: its base weight is cut over processes")
