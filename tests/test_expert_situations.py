"""Stacked experts where they are used: other routing each step, accumulated gradients, autocast,
experts that are spread over processes.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.integrations.peft import trace_param_wrappers, untrace_param_wrappers
from tests import zoo
from tests.models import fill_b
from tests.test_prepared_experts import EXPERTS, STACKS, build
from tests.versions import needs_fsdp2_of_integers, needs_meshes_in_graphs

EAGER: Any = {"config": FalqonConfig(inner="eager")}
E, TOP, HIDDEN = 4, 2, 64


def batch(seed: int, tokens: int = 12, crowd: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """x, and routing to the first ``crowd`` experts alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    ids = torch.randint(0, crowd, (tokens, TOP), generator=generator)
    weights = torch.rand(tokens, TOP, generator=generator).to(torch.bfloat16)
    return x, ids, weights


def backward(call: Any, given: tuple[Tensor, ...]) -> None:
    call(*given).float().square().mean().backward()


def gradients(model: Any) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def similar(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().float(), b.flatten().float(), 0))


def test_routing_changes_each_step_in_one_graph(graphs):
    """Six steps: no token, one and all of them for an expert among the routings. Gradients are
    PEFT's, and where an expert has no token they are zero; those of several batches add up.
    """
    model, twin = build(), build()
    falqon_fx.prepare(model, progress=False)
    call = torch.compile(model, backend="falqon", options=EAGER)
    for seed in range(6):
        given = batch(seed, crowd=1 + seed % E)
        if seed == 4:
            given[1].fill_(3)
            given[1][0, 0] = 1
        backward(call, given)
        backward(twin, given)
        for ours, theirs in zip(gradients(model), gradients(twin), strict=True):
            assert similar(ours, theirs) > 0.99
            if ours.shape[1] % E == 0 and ours.shape[0] in (128, HIDDEN):  # lora_B [out, r * E]
                idle = [e for e in range(E) if not (given[1] == e).any()]
                assert all(not ours[:, e::E].any() for e in idle)
    apart = []
    for seed in range(2):
        backward(call, batch(seed))
        apart.append(gradients(model))
    for seed in range(2):
        backward(call, batch(seed))
    for both, first, second in zip(gradients(model), *apart, strict=True):
        assert torch.equal(both, first + second)
    assert len(graphs) == 1


@pytest.mark.slow
def test_under_autocast_a_float32_model_is_merged(graphs):
    model = build().float()
    x, ids, weights = batch(0)
    given = (x.float(), ids, weights.float())
    results = []
    for call in (model, torch.compile(model, backend="falqon", options=EAGER)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(*given)
        y.float().square().mean().backward()
        results.append([y.detach(), *gradients(model)])
    (graph,) = graphs
    assert sorted(site.path for site in graph.sites) == STACKS
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert similar(ours, theirs) > 0.99


@pytest.mark.slow
def test_checkpointed_layers_route_as_in_the_forward_pass():
    """The router runs anew in the recomputation, behind FP8 layers: gradients are the same bits."""
    gradients_of = []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        whole: Any = zoo.build("qwen3_moe")
        whole.set_experts_implementation("grouped_mm")
        stacks = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
        lora = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=stacks)
        model: Any = peft.get_peft_model(whole, lora)
        fill_b(model, 0.05)
        trace_param_wrappers(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        options: Any = {"config": FalqonConfig(inner="aot_eager")}
        ids = torch.arange(24).reshape(2, 12) % 37
        call = torch.compile(model, backend="falqon", options=options)
        call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients_of.append(gradients(model))
    assert len(gradients_of[0]) > 2
    for plain, recomputed in zip(*gradients_of, strict=True):
        assert torch.equal(plain, recomputed)


# -- spread over processes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    """One for all: torch keeps what it knows of a mesh, and finds it again by its shape alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_stacks_that_fsdp_shards_run_as_they_were(mesh, graphs):
    from torch.distributed.fsdp import fully_shard

    model: Any = build()
    expected, given = model(*batch(0)), batch(0)
    fully_shard(model.base_model.model, mesh=mesh)
    with pytest.raises(FalqonError, match="before fully_shard"):
        falqon_fx.prepare(model, progress=False)
    model.base_model.model.compile(backend="falqon", options=EAGER)
    assert torch.equal(model(*given), expected)
    rejected = {item.site: item for graph in graphs for item in graph.rejected}
    assert len(rejected) == len(STACKS)
    for item in rejected.values():
        assert "FSDP shards its stacked weights" in item.reason
        assert item.remedy


@needs_fsdp2_of_integers
@pytest.mark.slow
def test_prepared_stacks_that_fsdp_shards_train_as_they_do_alone(mesh, graphs):
    assert all(sharded_beside_alone(mesh))
    assert [len(graph.sites) for graph in graphs] == [2, 2]


def sharded_beside_alone(mesh: Any) -> list[bool]:
    """Whether the output and each gradient of a step are those of one process, bit for bit."""
    from torch.distributed.fsdp import fully_shard

    alone, model = build(), build()
    for each in (alone, model):
        falqon_fx.prepare(each, progress=False)
    call = torch.compile(alone, backend="falqon", options=EAGER)
    expected = call(*batch(0)).detach()
    backward(call, batch(0))
    torch._dynamo.reset()
    fully_shard(model.base_model.model, mesh=mesh)
    model.base_model.model.compile(backend="falqon", options=EAGER)
    same = [torch.equal(model(*batch(0)), expected)]
    backward(model, batch(0))
    whole: list[Any] = gradients(model)
    pairs = zip(whole, gradients(alone), strict=True)
    return same + [torch.equal(ours.full_tensor(), theirs) for ours, theirs in pairs]


def test_stacks_that_are_cut_are_left_by_name(mesh):
    """By `prepare`; the experts of a process, as expert parallelism has them, and DTensors."""
    model = build()
    inner: Any = model.get_submodule(EXPERTS).get_base_layer()
    whole = copy.deepcopy(inner._parameters["down_proj"])
    cut = distribute_tensor(whole.detach(), mesh, [Shard(0)])
    inner._parameters["down_proj"] = torch.nn.Parameter(cut, requires_grad=False)
    report = falqon_fx.prepare(model, progress=False)
    assert "spread over processes" in report.skipped[f"{EXPERTS}.down_proj"]
    assert report.prepared == (f"{EXPERTS}.gate_up_proj",)


@pytest.mark.parametrize("spread", ["cut", "whole experts"])
def test_adapted_experts_that_are_spread_are_refused_before_a_step(spread, mesh):
    """PEFT's sum would fail in it; nothing has changed then."""
    model = build()
    untrace_param_wrappers(model)
    inner: Any = model.get_submodule(EXPERTS).get_base_layer()
    if spread == "cut":
        whole = inner._parameters["down_proj"].detach()
        cut = distribute_tensor(whole, mesh, [Shard(1)])
        inner._parameters["down_proj"] = torch.nn.Parameter(cut, requires_grad=False)
    else:
        inner._is_expert_parallel = True
    before = [type(module) for module in model.modules()]
    with pytest.raises(FalqonError, match=r"experts\.down_proj.*target_parameters"):
        trace_param_wrappers(model)
    assert [type(module) for module in model.modules()] == before


@needs_meshes_in_graphs
@pytest.mark.parametrize("plan", ["tensor", "expert"])
def test_frozen_experts_of_one_process_are_sites(plan, mesh, graphs):
    """As transformers spreads them, here over one process; `prepare` leaves them by name."""
    model, given = build(False), batch(0)
    expected = model(*given)
    spread(model, mesh, plan)
    skipped = falqon_fx.prepare(model, progress=False).skipped
    assert sorted(skipped) == ["experts.down_proj", "experts.gate_up_proj"]
    assert all("spread over processes" in reason for reason in skipped.values())
    with torch.no_grad():
        y = torch.compile(model, backend="falqon", options=EAGER)(*given)
    assert similar(y, expected) > 0.99
    found = sorted(site.path for graph in graphs for site in graph.sites)
    assert found == sorted(skipped)


def spread(model: Any, mesh: Any, plan: str) -> None:
    """What `from_pretrained` does with a `DistributedConfig`."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    styles = {"gate_up_proj": "packed_colwise", "down_proj": "rowwise", "": "moe_tp_experts"}
    if plan == "expert":
        styles = dict.fromkeys(styles, "grouped_gemm") | {"": "ep_dispatch_experts"}
    named = {f"experts.{name}".rstrip("."): style for name, style in styles.items()}
    if plan == "expert":
        apply_expert_parallelism(model, mesh, mesh, named)
    else:
        apply_tensor_parallelism(model, mesh, named)


@pytest.mark.slow
def test_tokens_of_other_processes_experts_give_nothing(graphs):
    """Expert parallelism marks them by the number of experts: no expert here has them."""
    model = build(False)
    model.experts._is_expert_parallel = True
    x, ids, weights = batch(0)
    ids[::3] = E
    weights[ids == E] = 0
    expected = model(x, ids, weights)
    call = torch.compile(model, backend="falqon", options=EAGER)
    y = call(x, ids, weights)
    assert similar(y, expected) > 0.99
    assert not y[(ids == E).all(1)].any()
