"""Stacks of experts over two processes: sharded by FSDP2, cut and shared by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from falqon_fx import FalqonConfig
from tests.distributed import ranks
from tests.distributed.tensor_parallel import compiled
from tests.test_expert_situations import batch, sharded_beside_alone, similar, spread
from tests.test_prepared_experts import build


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(tmp_path: Path):
    """On the same batch; a mean of two equal gradients is either of them."""
    assert all(all(same) for same in ranks.run(work, 2, tmp_path))


@pytest.mark.slow
def test_frozen_experts_that_two_ranks_share_give_what_one_has(tmp_path: Path):
    """By transformers' tensor and expert parallelism: y, and dL/dx under the former."""
    for seen in ranks.run(shared, 2, tmp_path):
        for plan, (sites, alike) in seen.items():
            # What half of down is, 64 x 32, is too small to gain.
            down = ["experts.down_proj"] * (plan == "expert")
            assert sites == [*down, "experts.gate_up_proj"], plan
            assert min(alike) > 0.99, plan


def shared() -> dict[str, tuple[list[str], list[float]]]:
    mesh = dist.init_device_mesh("cpu", (2,))
    return {plan: _shared(plan, mesh) for plan in ("tensor", "expert")}


def _shared(plan: str, mesh: Any) -> tuple[list[str], list[float]]:
    graphs: list[Any] = []
    results = []
    for of_two in (False, True):
        torch._dynamo.reset()
        model = build(False)
        x, ids, weights = batch(0)
        x.requires_grad_(plan == "tensor")
        call: Any = model
        if of_two:
            spread(model, mesh, plan)
            call = compiled(model, FalqonConfig(inner="eager"), graphs)
        with torch.set_grad_enabled(plan == "tensor"):
            y = call(x, ids, weights)
        results.append([y.detach()])
        if plan == "tensor":
            y.float().square().sum().backward()
            assert x.grad is not None
            results[-1].append(x.grad)
    sites = sorted(site.path for graph in graphs for site in graph.report.sites)
    return sites, [similar(*pair) for pair in zip(*results, strict=True)]


def work() -> list[bool]:
    return sharded_beside_alone(dist.init_device_mesh("cpu", (2,)))
