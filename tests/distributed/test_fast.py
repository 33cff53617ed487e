"""Two processes over gloo, one pair for all that is fast: DDP, FSDP2 and tensor parallelism train
as one process that accumulates their halves.

A mean over two ranks is a sum of two halves, which is exact in any order.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError, MeshPlan
from falqon_fx.site import base
from falqon_fx.site.found import FoundByAddress
from tests.distributed import ranks, test_tensor_parallel
from tests.distributed.traffic import Counted
from tests.distributed.training import alone, compared, compile_blocks, compiled, make, shard, train
from tests.versions import needs_fsdp2_of_integers, needs_meshes_in_graphs

CONFIG = FalqonConfig(inner="aot_eager")
EAGER = FalqonConfig(inner="eager")
# 1.2 MiB of gradients of A and B, the last layer's first: DDP's first bucket holds 1 MiB.
LARGE = {"blocks": 2, "hidden": 1152, "rank": 64}


@needs_fsdp2_of_integers
@needs_meshes_in_graphs
def test_two_ranks(tmp_path: Path):
    results = ranks.run(work, 2, tmp_path)
    for result in results:
        test_tensor_parallel.check(result["tensor parallel"])
        for name, found in result["runs"].items():
            assert found["differs"] == [], name
            assert found["graphs"] == 0, name
            assert found["breaks"] == [], name
        of_ddp, of_fsdp = result["runs"].values()
        assert of_ddp["sites"] == 4
        assert {reason.split(":")[0] for reason in of_ddp["rejected"]} == {
            f"blocks.0.up.lora_{name}" for name in "AB"
        }
        assert all("cuts through it" in reason for reason in of_ddp["rejected"])
        assert (of_fsdp["sites"], of_fsdp["rejected"]) == (2, [])  # one graph for both blocks
        assert of_fsdp["digests"] == 4  # the bytes of a site are looked at once, not at each gather
        assert of_fsdp["addresses"] == 0  # each gather has others
        differ = "rank 0 prepares with granularity=row, rank 1 with granularity=tensor"
        assert differ in result["different"]
    first, second = results
    assert first["bytes"] <= 0.53 * first["bytes_bf16"]
    assert first["codes"] + second["codes"] == first["whole"]
    for result in results:
        assert result["real"] == result["planned"]
        assert result["alive"] < 1.01 * result["codes"]


def work() -> dict[str, Any]:
    runs = {"ddp": ddp_cut(), "fsdp2": fsdp2()}
    found = {"runs": runs, **sharded(), "different": different()}
    return {**found, "tensor parallel": test_tensor_parallel.fast()}


def ddp_cut() -> dict[str, Any]:
    """With default buckets; the process alone is in a DDP of its own, which cuts alike."""
    own = dist.new_group([0])
    model = make(EAGER, prepared=False, **LARGE)
    torch._dynamo.reset()
    call = compiled(DistributedDataParallel(model), EAGER)
    run = train(call, model, [[dist.get_rank()]], steps=4)
    if dist.get_rank():
        return compared(run, None)
    model = make(EAGER, prepared=False, **LARGE)
    call = compiled(DistributedDataParallel(model, process_group=own), EAGER)
    return compared(run, alone(model, call, 2, steps=4))


def fsdp2() -> dict[str, Any]:
    model = shard(compile_blocks(make(CONFIG, prepared=True), CONFIG))
    torch._dynamo.reset()
    before = _addresses()
    with mock.patch.object(base, "digest", wraps=base.digest) as digests:
        run = train(model, model, [[dist.get_rank()]], steps=4)
    kept = _addresses() - before
    model = compile_blocks(make(CONFIG, prepared=True), CONFIG)
    result = compared(run, alone(model, model, 2, steps=4))
    return {**result, "digests": digests.call_count, "addresses": kept}


def _addresses() -> int:
    """How many calls are known by their addresses."""
    gc.collect()
    return sum(len(o._found) for o in gc.get_objects() if type(o) is FoundByAddress)


def sharded() -> dict[str, Any]:
    """The bytes of a forward's gathers, in FP8 and in bf16; those of the codes of this rank, and of
    all codes that there are in memory after a step. What a plan says of all this beforehand, and
    what is so.
    """
    size: dict[str, Any] = {"blocks": 1, "width": 512, "hidden": 512, "rank": 4}
    x, found = torch.randn(2, 512).bfloat16(), dict[str, Any](whole=2 * 512 * 512)
    size["dtype"] = torch.bfloat16
    found["planned"] = planned(make(CONFIG, prepared=False, **size), x)
    for name, prepared in (("bytes", True), ("bytes_bf16", False)):
        model = shard(make(CONFIG, prepared=prepared, **size))
        with Counted() as forward:
            y = model(x)
        found[name] = forward.gathered
        if prepared:
            with Counted() as backward:
                y.sum().backward()
            held = sum(p.to_local().nbytes for p in model.parameters())
            step = forward.gathered + backward.gathered
            found["real"] = [forward.gathered, step, backward.scattered, held]
            local = [p.to_local() for n, p in model.named_parameters() if n.endswith("code")]
            found["codes"] = sum(code.nbytes for code in local)
            found["alive"] = _bytes_of_codes()
    return found


def planned(model: Any, x: Tensor) -> list[int]:
    """A gather, those of a step, the gradients that are scattered, and what a process holds."""
    plan = MeshPlan(fsdp=dist.get_world_size(), units=["blocks.*"])
    mesh = falqon_fx.explain(model, x, config=CONFIG, mesh=plan).mesh
    assert mesh is not None
    gathers, gradients = mesh.traffic
    return [mesh.units[0].gathered, gathers.bytes, gradients.bytes, mesh.held]


def _bytes_of_codes() -> int:
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.dtype == torch.uint8]
    return sum({id(storage): storage.nbytes() for storage in storages}.values())


def different() -> str:
    """The error where ranks ask for different things."""
    config = FalqonConfig(granularity=("row", "tensor")[dist.get_rank()])
    try:
        make(config, prepared=True)
    except FalqonError as error:
        return str(error)
    return ""
