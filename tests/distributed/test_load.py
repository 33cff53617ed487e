"""`falqon_fx.load` straight into shards: no rank ever holds the base weights, in FP8 or dense."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import falqon_fx
from falqon_fx import FalqonConfig
from tests.distributed import ranks
from tests.distributed.training import rewritten

pytestmark = pytest.mark.slow
CONFIG = FalqonConfig(inner="eager")
STEPS = 2


def test_a_prequantized_folder(tmp_path: Path):
    """Files are mapped, so what lies in a rank's own memory grows by its shards alone. The slack is
    a quarter of the base weights: adapters, the tensors below 1 MiB, which are read, and code.
    """
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=3,
        num_attention_heads=8,
        use_cache=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "dense")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    falqon_fx.prequantize(tmp_path / "dense", tmp_path / "fp8", lora, progress=False)
    first, second = ranks.run(work, 2, tmp_path / "ranks", 600)
    for result in (first, second):
        assert result["sites"] > 0
        assert result["loaded"] < 0.25 * result["bytes"]
        assert result["sharded"] < 0.75 * result["bytes"]
    assert first["losses"] == first["alone"][::2]
    assert second["losses"] == first["alone"][1::2]


def work() -> dict[str, Any]:
    folder, rank = Path.cwd().parent / "fp8", dist.get_rank()
    falqon_fx.load(folder, verify=False)  # imports all that it needs
    before = _own_memory()
    model: Any = falqon_fx.load(folder, verify=False)
    found: dict[str, Any] = {"loaded": _own_memory() - before}
    found["bytes"] = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("code"))
    for layer in compiled(model):
        fully_shard(layer)
    fully_shard(model)
    found["sharded"] = _own_memory() - before
    ids = torch.randint(64, (STEPS, 2, 8), generator=torch.Generator().manual_seed(1))
    with rewritten() as reports:
        found["losses"] = train(model, ids[:, rank : rank + 1])
    found["sites"] = sum(len(report.sites) for report in reports)
    if rank == 0:
        one = falqon_fx.load(folder, verify=False)
        compiled(one)
        found["alone"] = train(one, ids)
    return found


def compiled(model: Any) -> Any:
    layers = model.get_base_model().model.layers
    for layer in layers:
        layer.compile(backend="falqon", options={"config": CONFIG})
    return layers


def train(model: Any, ids: Tensor) -> list[float]:
    """``ids`` [steps, parts, tokens]: the parts of a batch one after another."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for batch in ids:
        for part in batch:
            loss = model(input_ids=part[None], labels=part[None]).loss
            (loss / len(batch)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _own_memory() -> int:
    """The bytes of this process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
