"""FSDP2 in all its settings against one process that accumulates what the ranks compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from falqon_fx import FalqonConfig
from tests.distributed import ranks
from tests.distributed.training import (
    alone,
    compared,
    compile_blocks,
    compiled,
    make,
    shard,
    train,
)

pytestmark = pytest.mark.slow
CONFIG = FalqonConfig(inner="aot_eager")
CONFIGS = {
    f"{inner}, {granularity}": FalqonConfig(inner=inner, granularity=granularity)
    for inner in ("aot_eager", "inductor")
    for granularity in ("row", "tensor")
}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def check(name: str, found: dict[str, Any]) -> None:
    assert found["differs"] == [], name
    assert found["graphs"] == 0, name
    assert found["rejected"] == [], name
    if name == "whole":  # the hooks of the units, which run outside of graphs
        assert all("function `disable`" in why for why in found["breaks"])
    else:
        assert found["breaks"] == [], name
        assert found["sites"] == 2, name  # one graph for both blocks


def test_two_ranks(tmp_path: Path):
    for result in ranks.run(two, 2, tmp_path, 900):
        assert result.pop("mixed precision") == [True] * 9
        assert len(result) == 8 + 9
        for name, found in result.items():
            check(name, found)


def test_four_ranks(tmp_path: Path):
    for result in ranks.run(four, 4, tmp_path, 900):
        assert len(result) == 3
        for name, found in result.items():
            check(name, found)


def two() -> dict[str, Any]:
    runs = {}
    for name, config in CONFIGS.items():
        for train_a in (True, False):
            runs[f"{name}, train_a={train_a}"] = case(config, train_a=train_a)
    runs["kept"] = case(CONFIG, reshard_after_forward=False)
    runs["offloaded"] = case(CONFIG, offload_policy=CPUOffloadPolicy(pin_memory=False))
    runs["accumulated"] = case(CONFIG, each=2)
    runs["amax"] = case(replace(CONFIG, scale="amax"))
    runs["int8"] = case(replace(CONFIG, base_dtype="int8", scale="amax"))
    runs["adapters in FP8"] = case(replace(CONFIG, adapter_dtype="fp8"))
    runs["whole"] = case(CONFIG, whole=True)
    runs["checkpointed around"] = case(CONFIG, change=around)
    runs["checkpointed inside"] = case(CONFIG, change=inside)
    return {**runs, "mixed precision": mixed_precision()}


def four() -> dict[str, Any]:
    """The parts of two ranks count nothing, as sums of four depend on their order."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    return {
        "sharded": case(CONFIG, used=2),
        "copies of shards": case(CONFIG, used=2, mesh=mesh),
        "inductor": case(replace(CONFIG, inner="inductor"), used=2),
    }


def around(model: Any) -> None:
    """As transformers' gradient_checkpointing_enable: outside of what is compiled."""
    model.call = lambda block, x: checkpoint(block, x, use_reentrant=False)


def inside(model: Any) -> None:
    """As torchtitan: the wrapper is what is compiled and sharded."""
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)


def case(
    config: FalqonConfig,
    *,
    train_a: bool = True,
    each: int = 1,
    used: int | None = None,
    whole: bool = False,
    change: Callable[[Any], None] = lambda model: None,
    **options: Any,
) -> dict[str, Any]:
    torch._dynamo.reset()
    size, rank = dist.get_world_size(), dist.get_rank()

    def model() -> Any:
        made = make(config, prepared=True, train_a=train_a)
        change(made)
        return made if whole else compile_blocks(made, config)

    sharded = shard(model(), **options)
    sync = sharded.set_requires_gradient_sync
    parts = [range(rank * each, (rank + 1) * each)]
    call = compiled(sharded, config) if whole else sharded
    run = train(call, sharded, parts, used=used, before=sync if each > 1 else lambda last: None)
    one = model()
    call = compiled(one, config) if whole else one
    return compared(run, alone(one, call, size, each, used=used), each)


def mixed_precision() -> list[bool]:
    """Whether MixedPrecisionPolicy changes what it says and nothing else: outputs and gradients are
    those of adapters and norms in bf16, added up in float32. Scales that are no powers of two would
    show a cast.
    """
    config, rank = replace(CONFIG, scale="amax"), dist.get_rank()
    xs = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).chunk(2)
    torch._dynamo.reset()
    model = shard(compile_blocks(make(config, prepared=True), config), mp_policy=BF16)
    y = model(xs[rank])
    y.float().square().mean().backward()
    one = compile_blocks(make(config, prepared=True), config)
    for parameter in one.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    outputs: list[Tensor] = []
    sums: list[Tensor] = []
    for x in xs:
        one.zero_grad()
        outputs.append(one(x.bfloat16()))
        outputs[-1].float().square().mean().backward()
        grads = [p.grad.float() / 2 for p in one.parameters() if p.grad is not None]
        sums = list(map(torch.add, sums, grads)) if sums else grads
    found = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
    return [torch.equal(y, outputs[rank]), *map(torch.equal, found, sums)]
