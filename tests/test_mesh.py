"""What `explain` says of a mesh: FSDP2's own shards and gathers, in one process that plays several.

What two processes hold and exchange is compared in `tests/distributed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError, MeshPlan, RewriteReport
from falqon_fx.cost.links import LINKS, NETWORK, link_of
from falqon_fx.model.mesh_bytes import on_mesh
from falqon_fx.report.mesh import Mesh
from tests.distributed.traffic import Counted
from tests.models import Stack, tiny_llama
from tests.test_prepared_experts import build as experts
from tests.versions import needs_fsdp2_of_integers

CONFIG = FalqonConfig(card="H100")
IDS = torch.zeros(2, 5, dtype=torch.int64)


def stack(**options: Any) -> Stack:
    """Sizes that neither 2, 3 nor 8 divide, and ranks that are fewer than 8."""
    return Stack(
        **{"blocks": 2, "width": 67, "hidden": 130, "rank": 5, "dtype": torch.bfloat16, **options}
    )


def planned(model: Stack, mesh: Any, config: FalqonConfig = CONFIG) -> Mesh:
    block: Any = model.blocks[0]
    x = torch.randn(3, len(block.norm.weight)).bfloat16()
    spread = falqon_fx.explain(model, x, config=config, mesh=mesh).mesh
    assert spread is not None
    return spread


@contextmanager
def processes(count: int) -> Iterator[None]:
    """This one is the first of so many, which move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("plan", "dtype"),
    [
        (MeshPlan(fsdp=2), None),
        (MeshPlan(fsdp=3, reshard_after_forward=False), None),
        (MeshPlan(fsdp=8), None),
        (MeshPlan(fsdp=2, ddp=2), None),
        (MeshPlan(fsdp=3, param_dtype=torch.bfloat16), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@needs_fsdp2_of_integers
def test_it_is_what_fsdp2_holds_and_gathers(plan, dtype, granularity, prepared):
    config = FalqonConfig(card="H100", granularity=granularity)
    model = stack()
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    mesh = on_mesh(model, plan, config, [], None, lambda graph: graph)
    assert [unit.path for unit in mesh.units] == ["blocks.0", "blocks.1"]
    for is_prepared, held, gathered in (
        (False, mesh.held_before, [unit.gathered_before for unit in mesh.units]),
        (True, mesh.held, [unit.gathered for unit in mesh.units]),
    ):
        model = stack()
        if is_prepared:
            falqon_fx.prepare(model, config, progress=False)
        with processes(plan.ranks):
            options: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype)}
            if plan.ddp > 1:
                options["mesh"] = hybrid(plan.ddp, plan.fsdp)
            for block in model.blocks:
                fully_shard(block, **options)
            fully_shard(model, **options)
            parameters: list[Any] = [*model.parameters()]
            assert held == sum(p.to_local().untyped_storage().nbytes() for p in parameters)
            units = [m for m in model.blocks if isinstance(m, FSDPModule)]
            for unit, size in zip(units, gathered, strict=True):
                with Counted() as counted:
                    unit.unshard()
                assert counted.gathered == size


def hybrid(copies: int, shards: int) -> DeviceMesh:
    names = ("dp_replicate", "dp_shard")
    return init_device_mesh("cpu", (copies, shards), mesh_dim_names=names)


def conv1d() -> Any:
    from transformers.pytorch_utils import Conv1D

    return torch.nn.Sequential(Conv1D(96, 64)).requires_grad_(False)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama(torch.bfloat16)


@pytest.mark.parametrize("build", [lambda: tiny_llama(torch.bfloat16), experts, conv1d])
def test_one_process_holds_what_there_is(build):
    """Before `prepare` as after it; linear layers, experts, and GPT-2's."""
    model = build()
    before = sum(p.nbytes for p in model.parameters())
    planned = [whole_of(model)]
    falqon_fx.prepare(model, CONFIG, progress=False)
    planned.append(whole_of(model))
    after = sum(p.nbytes for p in model.parameters())
    assert after < before
    assert [(mesh.held_before, mesh.held) for mesh in planned] == [(before, after)] * 2
    assert {layer.path for layer in planned[0].layers} == {
        layer.path for layer in planned[1].layers
    }


def whole_of(model: Any) -> Mesh:
    return on_mesh(model, MeshPlan(), CONFIG, [], None, lambda graph: graph)


def test_the_bytes_of_layers_are_those_of_the_sites(llama):
    """W, scales and adapters are what the report has without a mesh, and a digest of 8 bytes."""
    report = falqon_fx.explain(llama, input_ids=IDS, config=CONFIG, mesh={"fsdp": 4})
    assert report.mesh is not None
    layers = {layer.path: layer for layer in report.mesh.layers}
    for site in report.sites:
        layer = layers[site.path]
        assert site.memory is not None
        assert layer.base + layer.scales == site.memory.state + 8
        assert layer.a + layer.b == site.memory.adapter
        assert layer.whole == ""
    assert sum(layer.held for layer in layers.values()) == report.mesh.held
    of_units = {unit.path: unit.gathered for unit in report.mesh.units}
    assert list(of_units) == ["", *(f"base_model.model.model.layers.{i}" for i in range(2))]
    for path, size in of_units.items():
        assert size == sum(layer.gathered for layer in layers.values() if layer.unit == path)


def test_times_are_bytes_by_the_rate_of_a_link_with_a_source(llama):
    """Within a machine and between machines."""
    report = falqon_fx.explain(
        llama, input_ids=IDS, config=CONFIG, mesh={"dp_replicate": 8, "dp_shard": 8}
    )
    assert report.mesh is not None
    gathers, scattered, summed = report.mesh.traffic
    assert [t.collective for t in (gathers, scattered, summed)] == [
        "all-gather",
        "reduce-scatter",
        "all-reduce",
    ]
    assert gathers.seconds == pytest.approx(gathers.bytes * 7 / 8 / LINKS["H100"].bandwidth)
    assert summed.bytes == scattered.bytes / 8
    assert summed.seconds == pytest.approx(summed.bytes * 2 * 7 / 8 / NETWORK.bandwidth)
    assert gathers.bytes < gathers.bytes_before
    assert gathers.source == LINKS["H100"].source
    assert all(link.source for link in [*LINKS.values(), NETWORK])
    assert link_of("NVIDIA H200 141GB") is LINKS["H200"]
    assert report.mesh.seconds == pytest.approx(
        sum(s.cost.seconds_after for s in report.sites if s.cost)
    )
    text = str(report)
    assert "NVLink 4, 450 GB/s each way" in text
    assert "not known" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_mesh_comes_back_from_json_and_stands_on_the_page(llama):
    report = falqon_fx.explain(llama, input_ids=IDS, config=CONFIG, mesh={"fsdp": 2})
    again = RewriteReport.from_json(report.to_json())
    assert again.mesh == report.mesh
    assert "mesh: fsdp 2" in report.to_html()


def test_tensor_parallelism_follows_the_models_own_plan(llama):
    report = falqon_fx.explain(llama, input_ids=IDS, config=CONFIG, mesh=MeshPlan(tp=2))
    assert report.mesh is not None
    layers = {layer.path.rpartition(".")[2]: layer for layer in report.mesh.layers}
    cuts = {name: layer.cut for name, layer in layers.items() if layer.cut}
    assert cuts == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "columns"
    ) | dict.fromkeys(["o_proj", "down_proj"], "rows")
    for layer in layers.values():
        base = layer.base // 2 if layer.cut else layer.base
        a = layer.a // 2 if layer.cut == "rows" else layer.a
        b = layer.b // 2 if layer.cut == "columns" else layer.b
        scales = (layer.scales - 8) // 2 + 8 if layer.cut == "columns" else layer.scales
        assert layer.held == base + scales + a + b + layer.rest
        assert layer.whole
    tokens, width, hidden, layers_ = 10, 32, 48, 2
    (activations,) = (t for t in report.mesh.traffic if t.what == "activations")
    # dL/dx of q, k and v, and of gate and up; O of o and of down: four sums of width in bf16
    assert activations.bytes == layers_ * 4 * tokens * width * 2
    assert hidden != width
    (gradients,) = (t for t in report.mesh.traffic if t.what == "gradients")
    # A of five layers with 32 inputs, B of two with 32 outputs; rank 4, float32
    assert gradients.bytes == layers_ * 7 * 4 * 32 * 4


def test_what_is_not_cut_says_why():
    plan = MeshPlan(tp=2, tp_plan={"up": "colwise", "blocks.1.down": "rowwise"})
    mesh = planned(stack(width=64), plan)
    why = {layer.path: layer.whole for layer in mesh.layers}
    assert why["blocks.0.down"] == "all of it: the plan does not name it"
    assert why["blocks.1.down"] == "B and biases: the other half is cut"
    assert "no layer in FP8" in why["blocks.0.norm"]
    uneven = planned(stack(width=64, hidden=129), plan)
    why = {layer.path: layer.whole for layer in uneven.layers}
    assert why["blocks.0.up"] == "all of it: 2 processes don't divide its 129 outputs"
    copies = planned(stack(), {"ddp": 4})
    assert {layer.whole for layer in copies.layers} == {"all of it: DDP copies the model"}
    assert copies.units == ()


@pytest.mark.parametrize(
    ("mesh", "config", "said"),
    [
        ({"shards": 2}, CONFIG, "Known are ddp"),
        ({"fsdp": 2, "dp_shard": 4}, CONFIG, "another of that kind"),
        ({"fsdp": 0}, CONFIG, "no number of processes"),
        (3, CONFIG, "is no mesh with names"),
        ({"tp": 2}, CONFIG, "tp_plan="),
        ({"tp": 2}, FalqonConfig(init="svd"), 'init="svd"'),
        (MeshPlan(fsdp=2, units=["layer.*"]), CONFIG, "no module has such a path"),
        ({"fsdp": 2}, FalqonConfig(update="rows"), 'update="adapter"'),
        ({"fsdp": 2}, FalqonConfig(transpose="store"), 'transpose="auto"'),
    ],
)
def test_a_mesh_that_says_nothing_is_an_error(mesh, config, said):
    with pytest.raises(FalqonError, match=said):
        planned(stack(), mesh, config)


def test_a_device_mesh_says_the_same_as_its_sizes():
    model = stack()
    expected = planned(model, MeshPlan(ddp=2, fsdp=4))
    with processes(8):
        assert planned(model, hybrid(2, 4)) == expected
        one = init_device_mesh("cpu", (8,))
        assert planned(model, one).axes == {"ddp": 1, "fsdp": 8, "tp": 1}
