"""DDP with default buckets against one process that accumulates what the ranks compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from falqon_fx import FalqonConfig
from tests.distributed import ranks
from tests.distributed.training import alone, compared, compile_blocks, compiled, make, train

pytestmark = pytest.mark.slow
CONFIG = FalqonConfig(inner="aot_eager")
SITES = 10
# 3 MiB of gradients of A and B; with A frozen 1.5 MiB. DDP's first bucket holds 1 MiB.
LARGE = {"blocks": 5, "hidden": 1152, "rank": 64}
CASES = {
    f"{inner}, {granularity}, train_a={train_a}, prepared={prepared}": (
        FalqonConfig(inner=inner, granularity=granularity),
        train_a,
        prepared,
    )
    for inner in ("aot_eager", "inductor")
    for granularity, train_a, prepared in (("row", True, True), ("tensor", False, False))
}


def test_two_ranks(tmp_path: Path):
    for result in ranks.run(two, 2, tmp_path, 900):
        found = result.pop("rows, one piece")
        check("rows", found)
        assert found["sites"] == 4
        assert len(result) == 3 * len(CASES)
        for name, found in result.items():
            check(name, found)
            cut = "whole" in name
            assert bool(found["rejected"]) == cut, name
            # All sites, in pieces or not, or one graph that the blocks share.
            assert found["sites"] == (2 if "blocks" in name else SITES), name


def test_four_ranks(tmp_path: Path):
    """Sums of four depend on their order, so the parts of two ranks count nothing at first."""
    results = ranks.run(four, 4, tmp_path, 900)
    for result in results:
        check("two of four", result["two of four"])
        assert result["all four"]["off"] <= result["all four"]["bound"]


def check(name: str, found: dict[str, Any]) -> None:
    assert found["differs"] == [], name
    assert found["graphs"] == 0, name
    assert found["breaks"] == [], name


def two() -> dict[str, Any]:
    """The whole model in the pieces that DDP's optimizer makes of it, in one, and by blocks."""
    own, runs = dist.new_group([0]), {"rows, one piece": rows()}
    for name, (config, train_a, prepared) in CASES.items():
        size = {"prepared": prepared, "train_a": train_a, **LARGE}
        runs[f"{name}, whole"] = whole(config, own, **size)
        with torch._dynamo.config.patch(optimize_ddp=False):
            runs[f"{name}, one piece"] = whole(config, None, **size)
            runs[f"{name}, blocks"] = blocks(config, **size)
    return runs


def four() -> dict[str, Any]:
    size = {"prepared": True, "train_a": True}
    return {
        "two of four": blocks(CONFIG, used=2, **size),
        "all four": reordered(**size),
    }


def whole(config: FalqonConfig, own: Any, **size: Any) -> dict[str, Any]:
    """``own``: a group of rank 0 alone, in whose DDP it trains alone, cut at the same places."""
    model = make(config, **size)
    torch._dynamo.reset()
    call = compiled(DistributedDataParallel(model), config)
    run = train(call, model, [[dist.get_rank()]])
    model = make(config, **size)
    if dist.get_rank():
        return compared(run, None)
    one = model if own is None else DistributedDataParallel(model, process_group=own)
    return compared(run, alone(model, compiled(one, config), dist.get_world_size()))


def blocks(config: FalqonConfig, used: int | None = None, **size: Any) -> dict[str, Any]:
    torch._dynamo.reset()
    model = compile_blocks(make(config, **size), config)
    run = train(DistributedDataParallel(model), model, [[dist.get_rank()]], used=used)
    model = compile_blocks(make(config, **size), config)
    return compared(run, alone(model, model, dist.get_world_size(), used=used))


def rows() -> dict[str, Any]:
    """Each rank writes the same rows; in one bucket."""
    config, size = replace(CONFIG, update="rows", topk=5), {"prepared": False, "train_a": False}
    model = make(config, **size)
    torch._dynamo.reset()
    call = compiled(DistributedDataParallel(model), config)
    run = train(call, model, [[dist.get_rank()]])
    model = make(config, **size)
    return compared(run, alone(model, compiled(model, config), 2))


def reordered(**size: Any) -> dict[str, float]:
    """The first gradients of four ranks against their sum in order: each sum of four rounds three
    times, by at most 2**-24 of what has been added up so far, in either order.
    """
    config = replace(CONFIG, inner="eager")
    xs = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).chunk(4)

    def gradients(call: Any, model: Any, x: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        ((call(x) - x / 2).square().mean()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch._dynamo.reset()
    model = make(config, **size)
    call = DistributedDataParallel(compile_blocks(model, config))
    found = gradients(call, model, xs[dist.get_rank()])
    one = compile_blocks(make(config, **size), config)
    each = [gradients(one, one, x) for x in xs]
    off = bound = 0.0
    for grad, *parts in zip(found, *each, strict=True):
        expected = sum(part.double() for part in parts) / 4
        most = 3 * 2.0**-24 * sum(part.double().abs() for part in parts) / 4
        assert bool(((grad.double() - expected).abs() <= most).all())
        off, bound = off + float((grad - expected).abs().sum()), bound + float(most.sum())
    return {"off": off, "bound": bound}
