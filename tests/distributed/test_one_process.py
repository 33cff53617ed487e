"""DDP and FSDP2 in a group of one process: errors, and sites that buckets cut."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.parallel import DistributedDataParallel

import falqon_fx
from falqon_fx import FalqonError
from tests.models import LoraLinear, Stack, compiled, train
from tests.versions import needs_fsdp2_of_integers


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def values(model: nn.Module) -> list[Tensor]:
    """Everything that there is of a model: its parameters, and the FP8 base of every site."""
    states = falqon_fx.adapters(model).values()
    return [*(p.detach().clone() for p in model.parameters()), *(s.base() for s in states)]


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("regional", [False, True])
def test_fsdp2_of_a_model_that_is_not_prepared_is_refused(group, regional):
    from torch.distributed.fsdp import fully_shard

    model = Stack()
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for part in model.blocks if regional else [model]:
        part.compile(backend="falqon", options={"inner": "eager"})
    with pytest.raises(BackendCompilerFailed) as caught:
        model(torch.randn(2, 32))
    assert isinstance(caught.value.inner_exception, FalqonError)
    assert "up: FSDP shards its base weight, which is not in FP8 yet" in str(caught.value)
    assert "Call falqon_fx.prepare(model) before fully_shard" in str(caught.value)


@needs_fsdp2_of_integers
def test_fsdp2_is_refused_a_copy_of_what_it_shards(group):
    from torch.distributed.fsdp import fully_shard

    config = falqon_fx.FalqonConfig(inner="eager", transpose="store")
    model = Stack()
    falqon_fx.prepare(model, config, progress=False)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    call = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    with pytest.raises(BackendCompilerFailed, match='Set transpose="auto"'):
        call(torch.randn(2, 32))


def ddp(model: nn.Module, bucket: int | None, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """``bucket``: bytes of gradients a bucket. Torch has no option for the first one."""
    if bucket is None:
        return DistributedDataParallel(model)
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", bucket)
    return DistributedDataParallel(model, bucket_cap_mb=bucket / 2**20)


def test_ddp_with_one_bucket_trains_as_without_ddp(group, monkeypatch):
    model, x = Stack(), torch.randn(2, 5, 32)
    alone = copy.deepcopy(model)
    expected = train(compiled(alone, inner="aot_eager"), adam(alone), x, steps=4)
    torch._dynamo.reset()
    call = compiled(ddp(model, None, monkeypatch), inner="aot_eager")
    assert train(call, adam(model), x, steps=4) == expected
    assert len(values(model)) == len(values(alone)) == 4 * 3 + 2 + 4
    assert all(map(torch.equal, values(model), values(alone)))


BLOCK = 4 * 2 * (48 * 4 + 32 * 4)  # bytes of the gradients of a block: two A and two B


def as_peft_does(layer: Any, x: Tensor) -> Tensor:
    """The forward of `LoraLinear` with the base layer first."""
    base = layer.base_layer(x)
    return base + layer.lora_B(layer.lora_A(x)) * layer.scaling


@pytest.mark.parametrize("base_first", [False, True])
def test_sites_that_ddp_buckets_cut_train_as_they_were(group, graphs, monkeypatch, base_first):
    """A bucket for each parameter, and FP8 nowhere: as the model that is not compiled, bit for
    bit.
    """
    model, x = Stack(), torch.randn(2, 5, 32)
    if base_first:
        for module in filter(lambda m: isinstance(m, LoraLinear), model.modules()):
            monkeypatch.setattr(module, "forward", functools.partial(as_peft_does, module))
    alone = copy.deepcopy(model)
    expected = train(alone, adam(alone), x, steps=3)
    call = compiled(ddp(model, 4, monkeypatch), frozen="leave")
    assert train(call, adam(model), x, steps=3) == expected
    assert all(map(torch.equal, model.parameters(), alone.parameters()))
    rejected = [item for piece in graphs for item in piece.rejected]
    assert {item.site.split(".lora_")[0] for item in rejected} == {
        f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")
    }
    for item in rejected:
        assert "DDP's optimizer compiles the model in pieces" in item.reason
        assert "torch._dynamo.config.optimize_ddp = False" in item.remedy


def test_ddp_buckets_that_cut_no_site_train_as_without_ddp(group, graphs, monkeypatch):
    model, x = Stack(), torch.randn(2, 5, 32)
    alone = copy.deepcopy(model)
    expected = train(compiled(alone, inner="aot_eager"), adam(alone), x, steps=4)
    torch._dynamo.reset()
    graphs.clear()
    call = compiled(ddp(model, BLOCK, monkeypatch), inner="aot_eager")
    assert train(call, adam(model), x, steps=4) == expected
    assert [len(piece.sites) for piece in graphs] == [2, 2]
    assert len(values(model)) == len(values(alone)) == 4 * 3 + 2 + 4
    assert all(map(torch.equal, values(model), values(alone)))


class Around(nn.Module):
    """Trained layers besides the sites, as PEFT's modules_to_save has: each alone in its piece."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.stack, self.head = nn.Linear(32, 40), Stack(), nn.Linear(32, 20)
        self.narrow = nn.Linear(40, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(self.narrow(torch.relu(self.wide(x))) + x))


def test_ddp_pieces_may_hold_other_trained_layers(group, graphs, monkeypatch):
    """Buckets of a block's size: the head, then the blocks, then the rest."""
    model, x = Around(), torch.randn(2, 5, 32)
    alone = copy.deepcopy(model)

    def run(call: nn.Module, model: nn.Module) -> list[Tensor]:
        torch._dynamo.reset()
        optimizer = adam(model)
        outputs = []
        for _ in range(3):
            outputs.append(call(x).detach())
            call(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return outputs

    expected = run(compiled(alone, inner="aot_eager"), alone)
    graphs.clear()
    found = run(compiled(ddp(model, BLOCK, monkeypatch), inner="aot_eager"), model)
    assert len(graphs) > 2
    assert sum(len(piece.sites) for piece in graphs) == 4
    assert all(map(torch.equal, found, expected))


def test_ddp_without_its_optimizer_trains_with_any_buckets(group, monkeypatch):
    model, x = Stack(), torch.randn(2, 5, 32)
    alone = copy.deepcopy(model)
    expected = train(compiled(alone, inner="aot_eager"), adam(alone), x, steps=4)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=False):
        call = compiled(ddp(model, 4, monkeypatch), inner="aot_eager")
        assert train(call, adam(model), x, steps=4) == expected
