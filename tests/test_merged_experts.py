"""Stacked experts in FP8: what is matched, and the numbers against float64 on the same operands."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.ops import grouped
from falqon_fx.ops.experts_lowering import (
    Experts,
    lower_grad_out_a,
    lower_grad_x,
    lower_grads,
    lower_merged_experts,
)
from falqon_fx.site.spec import SiteSpec
from tests.emulation import E4M3
from tests.stacks import RANK, Stack, bound, exact, programs, rows
from tests.tolerances import assert_within

_default = settings.get_profile(settings.get_current_profile_name()).max_examples


def compiled(model: Stack, **options: Any) -> Any:
    given: Any = {"config": FalqonConfig(inner="eager", **options)}
    return torch.compile(model, backend="falqon", options=given)


def check(model: Stack, x: Tensor, ids: Tensor, scale: Any, call: Any) -> None:
    """Outputs and gradients of a call within their bounds."""
    x = x.clone().requires_grad_()
    y = call(x, ids)
    grad = torch.randn(y.shape).to(y.dtype)
    model.zero_grad()
    y.backward(grad)
    want = exact(model, x.detach(), ids, grad, scale == "pow2")
    dtype, features, out = y.dtype, x.shape[1], y.shape[1]
    assert x.grad is not None
    assert_within(y, want["y"].value, bound(want["y"], features + RANK, dtype))
    terms = (out + RANK) * ids.shape[1]
    assert_within(x.grad, want["x"].value, bound(want["x"], terms, dtype))
    if model.adapter:
        assert model.lora_a.grad is not None
        assert model.lora_b.grad is not None
        terms = ids.numel() + features + out
        assert_within(model.lora_a.grad, want["a"].value, bound(want["a"], terms, dtype))
        assert_within(model.lora_b.grad, want["b"].value, bound(want["b"], terms, dtype))


@settings(max_examples=max(12, _default // 5))
@given(programs())
def test_programs_compute_what_float64_does_on_the_same_operands(program):
    """The passes on symbolic traces; what Dynamo gives is below."""
    model, x, ids, scale = program
    result = falqon_fx.rewrite(fx.symbolic_trace(model), [x, ids], FalqonConfig(scale=scale))
    (site,) = result.report.sites
    assert (site.experts, site.adapters) == (model.experts, int(bool(model.adapter)))
    check(model, x, ids, scale, result)


@pytest.mark.parametrize("spelling", ["grouped", "fallback", "batched"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_compiled_program_does(spelling, turned):
    dtype = torch.bfloat16 if spelling == "grouped" else torch.float32
    model, (x, ids) = Stack(spelling=spelling, turned=turned, dtype=dtype), rows()
    check(model, x.to(dtype), ids, "pow2", compiled(model))


def explained(model: nn.Module, x: Tensor, ids: Tensor, **options: Any) -> Any:
    return falqon_fx.explain(model, x, ids, config=FalqonConfig(**options))


@pytest.mark.parametrize("spelling", ["fallback", "batched"])
def test_zero_one_and_all_tokens_an_expert_without_compiling_again(spelling, graphs):
    model, (x, ids) = Stack(spelling=spelling), rows()
    call = compiled(model)
    one = torch.full_like(ids, 2)
    one[0, 0] = 3
    for routed in (ids, torch.zeros_like(ids), one, torch.full_like(ids, 3)):
        check(model, x, routed, "pow2", call)
    assert len(graphs) == 1


def test_what_peft_reads_as_an_expert_is_one():
    """PEFT's own sum, against which reading lora_B with the experts slowest is off by more than
    its whole size.
    """
    model, (x, ids) = Stack(), rows(64)
    grads = {}
    for name, call in (("peft", model), ("ours", compiled(model))):
        model.zero_grad()
        call(x, ids).square().sum().backward()
        grads[name] = [p.grad.clone() for p in (model.lora_a, model.lora_b) if p.grad is not None]
    for ours, theirs in zip(grads["ours"], grads["peft"], strict=True):
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.99
    slowest = Stack(fastest=False)
    slowest.load_state_dict(model.state_dict())
    wrong = slowest(x, ids).square().sum()
    (grad_b,) = torch.autograd.grad(wrong, slowest.lora_b)
    assert F.cosine_similarity(grad_b.flatten(), grads["peft"][1].flatten(), 0) < 0.9


def test_another_layout_of_b_is_refused():
    model, (x, ids) = Stack(fastest=False), rows()
    report = explained(model, x, ids)
    assert [s for s in report.sites if s.experts] == []
    assert "layouts" in report.rejected[0].reason


def test_x_is_cast_once_a_token():
    model, (x, ids) = Stack(), rows()
    report = explained(model, x, ids)
    (site,) = report.sites
    assert site.tokens_hint == len(x) < ids.numel()


@pytest.mark.parametrize(
    "options", [{"granularity": "tensor"}, {"adapter_dtype": "fp8"}, {"update": "rows"}]
)
def test_options_that_a_stack_has_not_are_named(options):
    model, (x, ids) = Stack(), rows()
    report = explained(model, x, ids, **options)
    assert report.sites == ()
    (option,) = options
    assert option in report.rejected[0].reason


def test_a_frozen_stack_is_left_with_a_reason(graphs):
    model, (x, ids) = Stack(out=32, adapter=""), rows()
    report = explained(model, x, ids)
    assert report.sites == ()
    assert report.left[0].reason == "it is too small to gain (32 x 64)"
    assert explained(Stack(adapter=""), x, ids, frozen="leave").sites == ()


def test_a_trained_stack_is_refused():
    model, (x, ids) = Stack(), rows()
    model.weight.requires_grad_()
    assert "trained" in explained(model, x, ids).rejected[0].reason


def test_a_frozen_adapter_is_a_constant():
    """A gradient for x alone, and none for what is frozen; B alone trains (LoRA-FA)."""
    model, (x, ids) = Stack(), rows()
    model.lora_a.requires_grad_(False)
    x.requires_grad_()
    compiled(model)(x, ids).sum().backward()
    assert model.lora_a.grad is None
    assert model.lora_b.grad is not None
    assert x.grad is not None


def test_activation_checkpoints_route_as_the_forward_pass():
    model, (x, ids) = Stack(), rows()
    saved = functools.partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False)
    grads = []
    for function in (model, saved):
        torch._dynamo.reset()
        model.zero_grad()
        given: Any = {"config": FalqonConfig(inner="aot_eager")}
        torch.compile(function, backend="falqon", options=given)(x, ids).sum().backward()
        grads.append(copy.deepcopy(model.lora_b.grad))
    assert torch.equal(*grads)


def test_the_registry_sees_a_write_into_a_stack():
    model, (x, ids) = Stack(), rows()
    call = compiled(model)
    check(model, x, ids, "pow2", call)
    with torch.no_grad():
        model.weight.mul_(-3.0)
    check(model, x, ids, "pow2", call)


def test_on_a_gpu_the_calls_are_as_many_for_any_number_of_experts(monkeypatch):
    """What a compiler of sm_90 would see, without one: torch's FP8 product once, and no loop."""
    monkeypatch.setattr(grouped, "fp8_architecture", lambda device: 90)
    counts = [operations(experts) for experts in (2, 128)]
    assert counts[0] == counts[1]
    assert counts[0]["aten._scaled_grouped_mm.default"] == 1
    assert counts[0]["aten._grouped_mm.default"] == 7  # O_A, O_A·b, D, q·W, D·Â, dL/dB, dL/dA


def operations(experts: int, out: int = 64, features: int = 32, rank: int = 8) -> Counter[str]:
    """The operations of a forward and a backward pass where there is no memory to look into."""
    seen: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen[str(func)] += 1
            return func(*args, **kwargs or {})

    spec, way = str(SiteSpec.from_config(FalqonConfig())), (False, experts)
    with torch.device("meta"), Counting():

        def fp8(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=E4M3)

        def ones(rows: int) -> Tensor:
            return torch.ones(rows, 1)

        x, offs = torch.empty(48, features, dtype=torch.bfloat16), torch.empty(experts).int()
        rows, grad = [torch.empty(96).long()], torch.empty(96, out, dtype=torch.bfloat16)
        weight, scale = fp8(experts * out, features), ones(experts * out)
        a, a_scale = [fp8(experts * rank, features)], [ones(experts * rank)]
        b = [torch.empty(out, rank * experts, dtype=torch.bfloat16)]
        own = (weight, scale, a, a_scale)
        given = Experts(x, rows, offs, *way, *own, b, a, b, [1.0], True, torch.bfloat16, spec)
        y, out_a, *kept = lower_merged_experts(given)
        assert (y.shape, out_a.shape) == ((96, out), (96, rank))
        d = lower_grad_out_a(grad, offs, *way, b[0], torch.bfloat16, spec)
        grad_x = lower_grad_x(
            grad, 48, rows, offs, *way, weight, scale, [d], a, a_scale, torch.bfloat16, spec
        )
        grads = lower_grads(
            grad, rows, offs, *way, out_a, [d], kept, 1.0, torch.float32, torch.float32, spec
        )
        assert grad_x.shape == x.shape
        assert [g.shape for g in grads] == [b[0].shape, a[0].shape]
    return seen
