"""Two processes over gloo: DDP and FSDP2 train as one process that accumulates their halves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

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

CONFIG = FalqonConfig(inner="aot_eager")
ROWS = FalqonConfig(inner="aot_eager", update="rows", topk=5)


def test_two_ranks(tmp_path: Path):
    """A mean over two ranks is a sum of two halves, which is exact in any order."""
    first, second = ranks.run(work, 2, tmp_path)
    for result in (first, second):
        for name, found in result["runs"].items():
            assert found["differs"] == [], name
            assert found["graphs"] == 0, name
            assert found["breaks"] == [], name
    assert first["bytes"] <= 0.53 * first["bytes_bf16"]
    assert first["codes"] + second["codes"] == first["whole"]


def work() -> dict[str, Any]:
    runs = {
        "ddp": ddp(CONFIG, prepared=False),
        "ddp, update=rows": ddp(ROWS, prepared=False),
        "fsdp2": fsdp2(),
    }
    return {"runs": runs, **gathered()}


def ddp(config: FalqonConfig, prepared: bool) -> dict[str, Any]:
    kind = {"prepared": prepared, "train_a": config.update == "adapter"}
    model = make(config, **kind)
    torch._dynamo.reset()
    run = train(compiled(DistributedDataParallel(model), config), model, [[dist.get_rank()]])
    model = make(config, **kind)
    return compared(run, alone(model, compiled(model, config), 2))


def fsdp2() -> dict[str, Any]:
    model = shard(compile_blocks(make(CONFIG, prepared=True), CONFIG))
    torch._dynamo.reset()
    run = train(model, model, [[dist.get_rank()]])
    model = compile_blocks(make(CONFIG, prepared=True), CONFIG)
    return compared(run, alone(model, model, 2))


def gathered() -> dict[str, int]:
    """The bytes of a forward's gathers, FP8 and bf16, and of the codes that this rank holds."""
    size = {"blocks": 1, "width": 512, "hidden": 512, "rank": 4}
    x, found = torch.randn(2, 512), {}
    for name, prepared in (("bytes", True), ("bytes_bf16", False)):
        model = make(CONFIG, prepared=prepared, dtype=torch.bfloat16, **size)
        found["whole"] = 2 * 512 * 512
        shard(model)
        with _Gathers() as gathers:
            model(x.bfloat16())
        found[name] = gathers.bytes
        if prepared:
            local = [p.to_local() for n, p in model.named_parameters() if n.endswith("code")]
            found["codes"] = sum(code.nbytes for code in local)
    return found


class _Gathers(TorchDispatchMode):
    """Counts the bytes that all-gathers of a process group give."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "allgather" in str(func):
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))
