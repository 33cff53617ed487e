"""Calls on a whole model of which each rank holds a part."""

from __future__ import annotations

import functools
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import falqon_fx
from falqon_fx import CheckpointState, FalqonConfig, FalqonError
from falqon_fx.files import checkpoint, export
from falqon_fx.site import sharded as parts
from falqon_fx.site.sharded import hashes, part_of
from tests.distributed import ranks
from tests.distributed.training import whole
from tests.models import fill_b, tiny_llama
from tests.versions import needs_fsdp2_of_integers

pytestmark = needs_fsdp2_of_integers
CONFIG = FalqonConfig(inner="eager")
FOUR_BITS = FalqonConfig(inner="eager", base_dtype="nvfp4")
IDS = torch.arange(16).reshape(2, 8)


def llama(prepared: bool = True, config: FalqonConfig = CONFIG) -> Any:
    torch.manual_seed(0)
    model = tiny_llama(torch.bfloat16)
    fill_b(model)
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    return model


def wrapped() -> Any:
    """With a checkpoint wrapper, which PEFT's save_pretrained can't see through."""
    return sharded(wrap=True)


def sharded(prepared: bool = True, wrap: bool = False, config: FalqonConfig = CONFIG) -> Any:
    model = llama(prepared, config)
    layers = model.get_base_model().model.layers
    if wrap:
        layers[0] = checkpoint_wrapper(layers[0])
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def by_columns() -> Any:
    """Cut as tensor parallelism may, which no call here needs to know."""
    model, mesh = llama(), dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            placement = Shard(1) if p.dim() == 2 and p.shape[1] > 1 else Replicate()
            part = distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None)
            setattr(module, name, nn.Parameter(part, requires_grad=p.requires_grad))
    return model


def trained(model: Any, seed: int) -> torch.optim.AdamW:
    """An optimizer with a state."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for p in optimizer.param_groups[0]["params"]:
        value = torch.randn(p.shape, generator=generator)
        p.grad = part_of(value, p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": whole(slot) for name, slot in slots.items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(FalqonError) as caught:
        call()
    return str(caught.value)


@pytest.mark.slow
def test_two_ranks(tmp_path: Path):
    check(tmp_path, lambda: ranks.run(work, 2, tmp_path / "ranks"))


def test_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whose parts are all there is: the same calls, in this process."""
    (tmp_path / "ranks").mkdir()
    monkeypatch.chdir(tmp_path / "ranks")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check(tmp_path, lambda: [work()])
    finally:
        dist.destroy_process_group()


def check(folder: Path, run: Callable[[], Any]) -> None:
    """What the ranks save and load is what one process without shards does."""
    plain = llama()
    optimizer = trained(plain, 0)
    expected = tensors(plain, optimizer)
    falqon_fx.save_fp8(plain, folder / "fp8_alone", progress=False)
    falqon_fx.save_fp8(llama(config=FOUR_BITS), folder / "four_alone", progress=False)
    falqon_fx.save_checkpoint(plain, folder / "alone", optimizer=optimizer)
    merged = {path: adapter.merged() for path, adapter in falqon_fx.adapters(plain).items()}
    for found in run():
        assert found.pop("problems") == []
        assert same(found.pop("merged"), merged)
        assert found.pop("hashes") == hashes(expected)
        for name, same_as in found.items():
            assert same(same_as, expected), name
    for file in ("model.safetensors", "config.json", "falqon.json"):
        content = (folder / "fp8_alone" / file).read_bytes()
        for kind in ("fp8", "fp8_sharded", "fp8_by_columns", "fp8_wrapped"):
            assert (folder / kind / file).read_bytes() == content, kind
        four = (folder / "four_alone" / file).read_bytes()
        assert (folder / "four_bits" / file).read_bytes() == four
    for name, call in {"saved": falqon_fx.load_checkpoint, "dcp": load_dcp}.items():
        other = llama()
        again = trained(other, 1)
        call(other, folder / name, optimizer=again)
        assert same(tensors(other, again), expected), name
    adapter = get_peft_model_state_dict(plain)
    for name in ("adapter", "adapter_by_columns"):
        assert same(load_file(folder / name / "adapter_model.safetensors"), adapter), name


def load_into(model: Any, folder: Path) -> dict[str, Tensor]:
    optimizer = trained(model, 1)
    falqon_fx.load_checkpoint(model, folder, optimizer=optimizer)
    return tensors(model, optimizer)


def load_dcp(model: Any, folder: Path, optimizer: torch.optim.Optimizer) -> None:
    dcp.load({"falqon": CheckpointState(model, optimizer)}, checkpoint_id=folder)


class Gathered:
    """The most bytes that were gathered and live at a time."""

    def __init__(self) -> None:
        self.most = 0
        self.live: list[tuple[weakref.ref[Any], int]] = []

    def __enter__(self) -> Self:
        self.patches = [
            mock.patch.object(place, "whole", functools.partial(self.whole, parts.whole))
            for place in (parts, export)
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()

    def whole(self, real: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        result = real(tensor)
        if not isinstance(tensor, DTensor):
            return result
        self.live = [(ref, size) for ref, size in self.live if ref() is not None]
        self.live.append((weakref.ref(result.untyped_storage()), result.nbytes))
        self.most = max(self.most, sum(size for _, size in self.live))
        return result


def work() -> dict[str, Any]:
    folder, rank = Path(".."), dist.get_rank()
    model = sharded()
    optimizer = trained(model, 0)
    model(input_ids=IDS)  # leaves the root's parameters whole
    found: dict[str, Any] = {}
    sites = falqon_fx.adapters(model)
    found["merged"] = {path: site.merged() for path, site in sites.items()}
    found["hashes"] = hashes(dict(model.state_dict())) | hashes(
        {
            f"{n}.{name}": slot
            for n, slots in optimizer.state_dict()["state"].items()
            for name, slot in slots.items()
        }
    )
    falqon_fx.save_fp8(sharded(config=FOUR_BITS), folder / "four_bits", progress=False)
    with Gathered() as seen:
        falqon_fx.save_fp8(model, folder / "fp8", progress=False)
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    layers = [name.removesuffix("base_layer.code") for name in sizes if name.endswith("code")]
    largest = max(sum(n for p, n in sizes.items() if p.startswith(layer)) for layer in layers)
    if rank:
        assert seen.most <= max(largest, max(sizes.values()))
    random.seed(rank)
    torch.manual_seed(rank)
    with mock.patch.object(checkpoint, "_GATHERED", 1 << 15), Gathered() as seen:
        report = falqon_fx.save_checkpoint(model, folder / "saved", optimizer=optimizer)
    assert len(report.files) > 2
    if dist.get_world_size() > 1:  # else nothing has to be gathered
        assert seen.most <= max(sizes.values()) + (0 if rank else 1 << 15)
    assert {path.name for path in (folder / "saved").iterdir()} == {
        "checkpoint.json",
        *report.files,
    }
    numbers = random.random(), torch.rand(1)
    dcp.save({"falqon": CheckpointState(model, optimizer)}, checkpoint_id=folder / "dcp")

    halves = [p for name, p in model.named_parameters() if "lora_A" in name]
    for half in halves:  # as of LoRA-FA: it is saved, too
        half.requires_grad_(False)
    falqon_fx.save_adapter(model, folder / "adapter")
    for half in halves:
        half.requires_grad_()
    trained(columns := by_columns(), 0)
    falqon_fx.save_adapter(columns, folder / "adapter_by_columns")

    for name, load, make in (
        ("saved", falqon_fx.load_checkpoint, sharded),
        ("alone", falqon_fx.load_checkpoint, sharded),
        ("dcp", load_dcp, sharded),
        ("saved", falqon_fx.load_checkpoint, by_columns),
        ("dcp", load_dcp, by_columns),
        ("dcp", load_dcp, wrapped),
        ("saved", falqon_fx.load_checkpoint, wrapped),
    ):
        other = make()
        again = trained(other, 1)
        load(other, folder / name, optimizer=again)
        if name == "saved":
            assert (random.random(), torch.rand(1)) == numbers
        found[f"{name}, {make.__name__}"] = tensors(other, again)
        if name == "dcp":
            falqon_fx.save_fp8(other, folder / f"fp8_{make.__name__}", progress=False)
    again_saved = falqon_fx.save_checkpoint(other, folder / "wrapped", optimizer=again)
    found["wrapped"] = load_into(sharded(), folder / "wrapped")
    assert again_saved.sites == report.sites
    found["problems"] = list(problems(model, optimizer, folder))
    return found


def problems(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> Any:
    """What isn't refused as it should be."""
    for call, remedy in {
        falqon_fx.restore: "load_checkpoint",
        falqon_fx.merge_and_unload: "load_checkpoint",
        lambda model: falqon_fx.explain(model, IDS): "before fully_shard",
        falqon_fx.prepare: "before fully_shard",
    }.items():
        text = refused(functools.partial(call, model))
        if "sharded" not in text or remedy not in text:
            yield text
    text = refused(lambda: falqon_fx.save_adapter(wrapped(), folder / "none"))
    if "gradient_checkpointing_enable" not in text:
        yield text
    # On one rank alone something is wrong, and both hear of it.
    calls: list[Callable[[], object]] = [
        lambda: falqon_fx.save_fp8(model, mine(folder / "fp8"), progress=False),
        lambda: falqon_fx.save_checkpoint(model, mine(folder / "adapter/adapter_config.json")),
        lambda: falqon_fx.load_checkpoint(model, mine(folder / "nowhere", folder / "saved")),
    ]
    for each in calls:
        text = refused(each)
        if "Name a" not in text or ("(on rank 0)" in text) is (dist.get_rank() == 0):
            yield text
    text = refused(lambda: falqon_fx.load_checkpoint(sharded(prepared=False), folder / "saved"))
    if "Call falqon_fx.prepare(model) before fully_shard" not in text:
        yield text


def mine(path: Path, of_others: Path = Path("../free")) -> Path:
    return path if dist.get_rank() == 0 else of_others
