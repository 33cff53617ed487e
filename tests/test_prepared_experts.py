"""`prepare` and what acts on whole models, on transformers' stacked experts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.integrations.peft import trace_param_wrappers, untrace_param_wrappers
from falqon_fx.model.stacks import Fp8Stack
from tests.models import fill_b

EXPERTS = "base_model.model.experts"
STACKS = [f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj"]
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 4}


class Layer(nn.Module):
    """Transformers' experts of Qwen3-MoE, routed from outside."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        config = transformers.Qwen3MoeConfig(**SIZES)
        config._experts_implementation = implementation
        self.experts = Qwen3MoeExperts(config)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.experts(x, ids, weights)
        return y


def build(adapted: bool = True, implementation: str = "grouped_mm") -> Any:
    """In bfloat16, with PEFT's adapters or frozen and without any."""
    torch.manual_seed(0)
    model: Any = Layer(implementation).to(torch.bfloat16).requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    if not adapted:
        return model
    names = ["experts.gate_up_proj", "experts.down_proj"]
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=names)
    model = peft.get_peft_model(model, lora)
    fill_b(model, 0.05)
    trace_param_wrappers(model)
    return model


def step(model: Any, compiled: bool = True) -> list[Tensor]:
    """The output and the gradients of a step."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 64, generator=generator).to(torch.bfloat16).requires_grad_()
    weights, ids = torch.randn(12, 4, generator=generator).softmax(-1).topk(2)
    options = {"config": FalqonConfig(inner="eager")}
    call = torch.compile(model, backend="falqon", options=options) if compiled else model
    y = call(x, ids, weights.to(x.dtype))
    y.float().square().mean().backward()
    grads = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *(g.clone() for g in grads if g is not None)]


@pytest.mark.parametrize("adapted", [True, False])
def test_a_prepared_stack_computes_what_it_did_and_takes_half(adapted, graphs):
    model, paths = build(adapted), STACKS
    if not adapted:
        paths = [path.removeprefix("base_model.model.") for path in STACKS]
    expected = step(model)
    report = falqon_fx.prepare(model, progress=False)
    assert sorted(report.prepared) == paths
    assert sorted(report.frozen) == ([] if adapted else paths)
    assert report.bytes_after <= 0.56 * report.bytes_before
    torch._dynamo.reset()
    for ours, theirs in zip(step(model), expected, strict=True):
        assert torch.equal(ours, theirs)
    for graph in graphs:
        assert sorted(site.path for site in graph.sites) == paths
    assert [site.prepared for graph in graphs for site in graph.sites] == [False] * 2 + [True] * 2
    assert falqon_fx.prepare(model, progress=False).prepared == ()


def test_uncompiled_it_runs_on_its_fp8_values():
    model = build()
    falqon_fx.prepare(model, progress=False)
    twin = copy.deepcopy(model)
    falqon_fx.restore(twin)
    for ours, theirs in zip(step(model, False), step(twin, False), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_its_own(copied):
    model = build()
    falqon_fx.prepare(model, progress=False)
    twin = copied(model)
    expected = step(model, False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    for ours, theirs in zip(step(twin, False), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_restore_gives_the_parameters_back():
    model = build()
    names, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    falqon_fx.prepare(model, progress=False)
    falqon_fx.restore(model)
    assert list(model.state_dict()) == names
    assert [type(m) for m in model.modules()] == classes
    for name, parameter in model.named_parameters():
        # Half a step of E4M3, then of bfloat16.
        torch.testing.assert_close(parameter, plain[name], rtol=2**-4 + 2**-8, atol=2**-9)
    untrace_param_wrappers(model)
    assert type(model.get_submodule(EXPERTS)) is ParamWrapper


def test_adapters_has_a_row_for_each_stack():
    model = build()
    for prepared in (False, True):
        if prepared:
            falqon_fx.prepare(model, progress=False)
        torch._dynamo.reset()
        step(model)
        found = falqon_fx.adapters(model)
        assert sorted(path for path, a in found.items() if getattr(a, "experts", 0)) == STACKS
        for path in STACKS:
            adapter: Any = found[path]
            wrapper = _wrapper(model, path.rpartition(".")[2])
            delta = wrapper.get_delta_weight("default").float().flatten(0, 1)
            ours = adapter.merged() - adapter.base()
            # PEFT rounds the sum of 4 products to bfloat16, then twice that.
            torch.testing.assert_close(ours, delta, rtol=2**-7, atol=2**-10)


def _wrapper(model: Any, name: str) -> Any:
    return next(m for m in model.modules() if getattr(m, "parameter_name", None) == name)


def test_merge_and_unload_merges_prepared_stacks():
    model = build()
    falqon_fx.prepare(model, progress=False)
    expected = step(model, False)[0]
    merged = falqon_fx.merge_and_unload(model)
    assert not any(isinstance(m, Fp8Stack) for m in merged.modules())
    assert similar(step(merged, False)[0], expected) > 0.999


def test_training_goes_on_from_a_checkpoint(tmp_path):
    model = build()
    falqon_fx.prepare(model, progress=False)
    falqon_fx.save_checkpoint(model, tmp_path / "saved")
    expected = step(model)
    twin = build()
    falqon_fx.prepare(twin, progress=False)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    falqon_fx.load_checkpoint(twin, tmp_path / "saved")
    torch._dynamo.reset()
    for ours, theirs in zip(step(twin), expected, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(FalqonError, match="experts"):
        falqon_fx.load_checkpoint(build(), tmp_path / "saved")


def similar(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().float(), b.flatten().float(), 0))


def test_what_cant_be_prepared_is_named():
    reasons = {
        "set_experts_implementation": build(implementation="eager"),
        "trace_param_wrappers": build(),
        "granularity": build(),
    }
    untrace_param_wrappers(reasons["trace_param_wrappers"])
    for text, model in reasons.items():
        config = FalqonConfig(granularity="tensor" if text == "granularity" else "row")
        skipped = falqon_fx.prepare(model, config, progress=False).skipped
        assert all(text in skipped[path] for path in STACKS)
    model = build()
    model.get_submodule(EXPERTS).get_base_layer()._is_expert_parallel = True
    skipped = falqon_fx.prepare(model, progress=False).skipped
    assert all("processes" in skipped[path] for path in STACKS)
    report = falqon_fx.prepare(build(), FalqonConfig(exclude=("*experts*",)), progress=False)
    assert set(STACKS) <= report.skipped.keys()
    report = falqon_fx.prepare(build(False), FalqonConfig(frozen="leave"), progress=False)
    assert report.prepared == ()
    assert report.skipped == {}


def test_a_write_into_prepared_bytes_is_seen():
    model = build()
    falqon_fx.prepare(model, progress=False)
    step(model)
    stack = next(m for m in model.modules() if isinstance(m, Fp8Stack))
    with torch.no_grad():
        stack.code.view(-1)[:64].add_(1)
    with pytest.raises(FalqonError, match="not those that prepare"):
        step(model)
