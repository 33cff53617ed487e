"""Stacked experts in FP8: what is matched, and the numbers against float64 on the same operands."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # defines transformers::grouped_mm_fallback
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.errors import PassError
from falqon_fx.ops import grouped
from falqon_fx.ops.experts import OP
from falqon_fx.ops.experts_lowering import (
    Experts,
    lower_grad_out_a,
    lower_grad_x,
    lower_grads,
    lower_merged_experts,
)
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.passes.pipeline import PASSES
from falqon_fx.passes.verify import verify
from falqon_fx.passes.work import Work
from falqon_fx.site.spec import SiteSpec
from tests.emulation import E4M3, E5M2, cast
from tests.tolerances import assert_within

_ = transformers.integrations.moe
RANK, SCALING = 3, 0.5
_default = settings.get_profile(settings.get_current_profile_name()).max_examples


class Stack(nn.Module):
    """Stacked weights with PEFT's adapter, each token multiplied by ``top`` experts, as
    transformers' experts implementations spell it.

    Attributes:
        spelling: "grouped" (rows sorted by expert), "fallback" (the same in float32 compiled) or
            "batched" (weights gathered).
        adapter: "baddbmm", "sum" or "" for none.
        turned: whether W is stored [E, in, out].
        b: how lora_B [out, r * E] is read as [E, out, r].
    """

    def __init__(
        self,
        experts: int = 4,
        out: int = 72,
        features: int = 64,
        rank: int = RANK,
        *,
        spelling: str = "fallback",
        adapter: str = "baddbmm",
        turned: bool = False,
        fastest: bool = True,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.spelling, self.adapter = experts, spelling, adapter
        self.turned, self.fastest = turned, fastest
        self.out, self.features, self.dtype = out, features, dtype
        shape = (experts, features, out) if turned else (experts, out, features)
        weight = torch.randn(shape, dtype=dtype) / features**0.5
        self.weight = nn.Parameter(weight, requires_grad=False)
        own = adapter_dtype or dtype
        self.lora_a = nn.Parameter(torch.randn(experts * rank, features, dtype=own) / 8)
        self.lora_b = nn.Parameter(torch.randn(out, rank * experts, dtype=own) / 8)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B_e [E, out, r] and A_e [E, r, in]."""
        a = self.lora_a.reshape(self.experts, -1, self.features)
        if self.fastest:
            b = self.lora_b.reshape(self.out, -1, self.experts).permute(2, 0, 1)
        else:
            b = self.lora_b.reshape(self.out, self.experts, -1).permute(1, 0, 2)
        return b, a

    def adapted(self) -> Tensor:
        left, right = self.factors()
        if self.turned:
            left, right = right.transpose(-2, -1), left.transpose(-2, -1)
        left, right = left.to(self.dtype), right.to(self.dtype)
        if self.adapter == "baddbmm":
            return torch.baddbmm(self.weight, left, right, alpha=SCALING)
        if self.adapter == "sum":
            return self.weight + SCALING * torch.bmm(left, right)
        return self.weight

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [n, in], ids [n, top] -> [n * top, out]."""
        top, flat, weight = ids.shape[1], ids.reshape(-1), self.adapted()
        if self.spelling == "batched":
            rows = x.repeat_interleave(top, dim=0)
            if self.turned:
                return torch.bmm(rows.unsqueeze(1), weight[flat]).squeeze(1)
            return torch.bmm(weight[flat], rows.unsqueeze(-1)).squeeze(-1)
        in_order, perm = torch.sort(flat)
        counts = torch.histc(in_order.float(), bins=self.experts, min=0, max=self.experts - 1)
        offs = torch.cumsum(counts, dim=0, dtype=torch.int32)
        rows = x[perm // top]
        weight = weight if self.turned else weight.transpose(-2, -1)
        multiply: Any = F.grouped_mm
        if self.spelling == "fallback":
            multiply = torch.ops.transformers.grouped_mm_fallback
        return multiply(rows.to(self.dtype), weight, offs=offs)[torch.argsort(perm)]


@dataclass
class Exact:
    """A value in float64 and the sum of the magnitudes of its terms."""

    value: Tensor
    gauge: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Exact:
        return cls(value.double(), value.double().abs())

    def __matmul__(self, other: Exact) -> Exact:
        return Exact(self.value @ other.value, self.gauge @ other.gauge)

    def __add__(self, other: Exact) -> Exact:
        return Exact(self.value + other.value, self.gauge + other.gauge)

    def times(self, factor: float) -> Exact:
        return Exact(self.value * factor, self.gauge * abs(factor))

    @property
    def mT(self) -> Exact:
        return Exact(self.value.mT, self.gauge.mT)

    def __getitem__(self, rows: Any) -> Exact:
        return Exact(self.value[rows], self.gauge[rows])


def exact(model: Stack, x: Tensor, ids: Tensor, grad: Tensor, pow2: bool) -> dict[str, Exact]:
    """Results of one step in float64, expert by expert, on the operands as they are cast."""
    flat, token = ids.reshape(-1), torch.arange(ids.numel()) // ids.shape[1]
    weight = (model.weight.mT if model.turned else model.weight).detach().float()
    wide = gemm_dtype(model.weight.dtype, x.device) == torch.float32
    xq = _cast(x.float(), E4M3, pow2)
    results = {
        "y": Exact.of(torch.zeros(ids.numel(), weight.shape[1])),
        "x": Exact.of(torch.zeros(x.shape)),
        "a": Exact.of(torch.zeros(model.lora_a.shape)),
        "b": Exact.of(torch.zeros(model.lora_b.shape)),
    }
    for e in range(model.experts):
        rows = torch.nonzero(flat == e).flatten()
        codes, scale = cast(weight[e], E4M3, True, pow2)
        w, g = Exact.of(codes.double() * scale.double()), grad[rows]
        _add(results["y"], rows, xq[token[rows]] @ w.mT)
        through = _cast(g.float() * scale.t(), E5M2, pow2) @ Exact.of(codes)
        if model.adapter:
            columns = slice(e, None, model.experts)  # lora_B: the experts fastest
            places = slice(e * RANK, (e + 1) * RANK)
            a = _cast(model.lora_a[places].detach().float(), E4M3, pow2)
            b = model.lora_b[:, columns].detach().float() * SCALING
            b64 = Exact.of(b if wide else b.bfloat16())
            out_a, d = xq[token[rows]] @ a.mT, Exact.of(g) @ b64
            _add(results["y"], rows, out_a @ b64.mT)
            through = through + d @ a
            grad_b, grad_a = (Exact.of(g).mT @ out_a).times(SCALING), d.mT @ xq[token[rows]]
            for name, at, part in (
                ("b", (slice(None), columns), grad_b),
                ("a", places, grad_a),
            ):
                results[name].value[at], results[name].gauge[at] = part.value, part.gauge
        results["x"].value.index_add_(0, token[rows], through.value)
        results["x"].gauge.index_add_(0, token[rows], through.gauge)
    return results


def _cast(x: Tensor, dtype: torch.dtype, pow2: bool) -> Exact:
    codes, scale = cast(x, dtype, True, pow2)
    return Exact.of(codes.double() * scale.double())


def _add(to: Exact, rows: Tensor, part: Exact) -> None:
    to.value[rows] += part.value
    to.gauge[rows] += part.gauge


_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def bound(of: Exact, terms: int, *dtypes: torch.dtype) -> Tensor:
    """A float32 sum of K terms in any order is off by K·2⁻²⁴ of the sum of their magnitudes. What
    lies between operands and a result is rounded at most ten times to the dtype of the products or
    of the result: O_A, O_A·b, their product, their sum and the result, and with scale="amax" each
    product by its scales once more (D, its scales, D·Â, the sum, dL/dx and its sum over the
    experts of a token are fewer).
    """
    off = terms * 2.0**-24 + 10 * max(_UNIT[dtype] for dtype in dtypes)
    return of.gauge * (off / (1 - off)) + 2.0**-126


SIZES = st.sampled_from([64, 72, 80, 96])


@st.composite
def programs(draw: Any) -> tuple[Stack, Tensor, Tensor, str]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    spelling = draw(st.sampled_from(["grouped", "fallback", "batched"]))
    # torch traces grouped products in bfloat16 alone.
    dtype = torch.bfloat16
    if spelling != "grouped":
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    experts = draw(st.integers(2, 9))
    model = Stack(
        experts,
        draw(SIZES),
        draw(SIZES),
        spelling=spelling,
        adapter=draw(st.sampled_from(["baddbmm", "sum", ""])),
        turned=draw(st.booleans()),
        dtype=dtype,
        adapter_dtype=draw(st.sampled_from([torch.float32, dtype])),
    )
    n, top = draw(st.integers(1, 12)), draw(st.integers(1, min(experts, 3)))
    crowd = draw(st.integers(1, experts))  # experts that any token chooses
    ids = torch.randint(0, crowd, (n, top))
    x = torch.randn(n, model.lora_a.shape[1]).to(dtype)
    return model, x, ids, draw(st.sampled_from(["pow2", "amax"]))


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


def rows(n: int = 9, top: int = 2, experts: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 64), torch.randint(0, experts, (n, top))


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
        d = lower_grad_out_a(grad, offs, *way, b[0], torch.bfloat16)
        grad_x = lower_grad_x(
            grad, 48, rows, offs, *way, weight, scale, [d], a, a_scale, torch.bfloat16, spec
        )
        grads = lower_grads(
            grad, rows, offs, *way, out_a, [d], kept, 1.0, torch.float32, torch.float32
        )
        assert grad_x.shape == x.shape
        assert [g.shape for g in grads] == [b[0].shape, a[0].shape]
    return seen


FAULTS = {
    "x": (0, lambda args: args[1][0]),
    "rows": (1, lambda args: []),
    "groups": (2, lambda args: args[1][0]),
    "by_id": (3, lambda args: not args[3]),
    "experts": (4, lambda args: args[4] + 1),
    "weight": (5, lambda args: args[6]),
    "scale": (6, lambda args: args[5]),
    "a": (7, lambda args: args[8]),
    "a_scale": (8, lambda args: args[7]),
    "b": (9, lambda args: []),
    "lora_a": (10, lambda args: args[11]),
    "lora_b": (11, lambda args: args[10]),
    "scaling": (12, lambda args: [2 * args[12][0]]),
    "keep_x": (13, lambda args: False),
    "out_dtype": (14, lambda args: torch.float64),
    "spec": (15, lambda args: "row amax"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_op_is_found(name):
    model, (x, ids) = Stack(), rows()
    work = Work(fx.symbolic_trace(model), [x, ids], FalqonConfig())
    for step in takewhile(lambda step: step is not PASSES["verify"], PASSES.values()):
        step(work)
    (op,) = work.gm.graph.find_nodes(op="call_function", target=OP)
    place, wrong = FAULTS[name]
    args = list(op.args)
    args[place] = wrong(args)
    verify(work.plan, work.operands, work.before)
    op.args = tuple(args)
    with pytest.raises(PassError):
        verify(work.plan, work.operands, work.before)
