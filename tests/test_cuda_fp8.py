"""adapter_dtype="fp8" by the path of a GPU, on CPU: kernels are interpreted."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import falqon_fx
from falqon_fx.ops import fp8_gpu
from falqon_fx.ops.arguments import Merged
from falqon_fx.ops.decompositions import decompositions
from falqon_fx.ops.fp8_adapter import clamped
from falqon_fx.passes import insert_operands
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import E4M3
from tests.cuda import BF16, GROUPS, INTERPRETED, ROW, TENSOR, as_on_a_gpu, group, lower
from tests.lowered import gemm_dtype, run
from tests.lowered_fp8 import expected, in_fp8
from tests.models import fill_b, tiny_mlp
from tests.parameters import each_pair, each_value
from tests.sites import dyadic, needs_row_scales
from tests.strategies import Case, cases
from tests.tolerances import Approx

LAUNCH = "triton_kernel_wrapper_functional"

pytestmark = INTERPRETED


def counted(case: Case) -> list[int]:
    """What each layer has clamped since the last time."""
    found = [int(count) for count in case.clamped]
    for count in case.clamped:
        count.zero_()
    return found


def counting(case: Case) -> Case:
    case.clamped = [torch.zeros(1, dtype=torch.int32) for _ in case.layers]
    return case


@pytest.mark.slow
@given(case=cases(), kernel=st.sampled_from(["triton", "dequantize"]))
def test_results_equal_float64_on_the_same_quantized_operands(case: Case, kernel: str):
    case = counting(in_fp8(case))
    case.spec = replace(case.spec, kernel=kernel)
    assume(case.adapters and case.x.numel())
    with as_on_a_gpu(grad_x=False):
        actual = run(case)
    assume(not any(counted(case)))
    wanted = expected(case, actual["out_a"], gemm_dtype(case.out_dtype))
    assert actual.keys() == wanted.keys() & {*case.leaves(), *actual}
    for name, result in actual.items():
        shape, of = result.shape, wanted[name]
        Approx(of.value.reshape(shape), of.bound.reshape(shape)).assert_holds(result)


@pytest.mark.slow
@given(cases())
def test_adapters_of_all_kinds_are_cast_as_on_a_cpu(case: Case):
    check_casts(in_fp8(case))


@each_value(scale=["pow2", "amax"], name=["several adapters"], spec={"row": ROW, "tensor": TENSOR})
def test_adapters_are_cast_as_on_a_cpu(scale, name, spec):
    case = in_fp8(GROUPS[name](replace(spec, scale=scale, kernel="triton")))
    case.adapters[0].lora_b.zero_()
    case.adapters[1].lora_a.zero_()
    check_casts(case)


def check_casts(case: Case) -> None:
    """Bit for bit."""
    scales = [layer.base.scale for layer in case.layers for _ in layer.adapters]
    casts = [
        part
        for m, s in zip(case.adapters, scales, strict=True)
        for part in fp8_gpu.proxy_update(
            [m.lora_a], [m.lora_b], [m.scaling], [s], str(case.spec), m.fixed
        )
    ]
    wanted = [tensor for cast in case.casts for tensor in cast]
    for ours, other in zip(casts, wanted, strict=True):
        assert (ours.dtype, ours.shape) == (other.dtype, other.shape)
        bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (ours, other)]
        assert torch.equal(*bits)


def exact(case: Case) -> Case:
    """The same with numbers of which every sum is exact, whatever its order."""
    features = case.x.shape[1]
    case.x = dyadic(len(case.x), features, 1).bfloat16()
    for i, each in enumerate(case.layers):
        out = len(each.weight)
        each.weight = dyadic(out, features, 10 + i).bfloat16()
        each.base = cast_base(each.weight, case.spec)
        each.grad = dyadic(len(case.x), out, 20 + i).bfloat16()
        for j, lora in enumerate(each.adapters):
            rank = len(lora.lora_a)
            lora.lora_a = dyadic(rank, features, 30 + j, bits=3)
            lora.lora_b = dyadic(out, rank, 40 + j, bits=3, low=-12)
            lora.x = None if lora.x is None else case.x * 2
    return replace(case, spec=replace(case.spec, adapter="fp8"))


@each_pair(
    name=[name for name in GROUPS if not re.search("absent|beyond|sites", name)],
    spec={"row": ROW, "tensor": TENSOR},
    kernel=["triton", "dequantize"],
)
def test_every_kind_of_group_is_computed_as_on_a_cpu(name, spec, kernel):
    """Bit for bit, but for the gradients of A and B: on a CPU their products are rounded before
    they are scaled.
    """
    case = exact(GROUPS[name](replace(spec, kernel=kernel)))
    wanted = run(case)
    with as_on_a_gpu(grad_x=False):
        actual = run(counting(case))
    assert actual.keys() == wanted.keys()
    for result in actual:
        if result[0] not in "ab":
            assert torch.equal(actual[result], wanted[result]), result
    assert torch.equal(actual["out_a"], wanted["out_a"])


@needs_row_scales
@pytest.mark.parametrize("name", ["siblings, some frozen", "several adapters", "dropout"])
def test_by_the_library(name):
    """One product for all siblings, which rounds in another place than a CPU."""
    case = counting(in_fp8(GROUPS[name](replace(ROW, kernel="scaled_mm"))))
    with as_on_a_gpu(grad_x=False):
        actual = run(case)
    for result, of in expected(case, actual["out_a"], gemm_dtype(case.out_dtype)).items():
        if result in actual:
            of.assert_holds(actual[result])


@pytest.mark.parametrize("kernel", ["triton", "dequantize"])
def test_what_is_clamped_is_counted_by_site(kernel):
    """As a CPU counts it by adapter: of t in forward, of D' in backward."""
    case = counting(group(replace(ROW, adapter="fp8", kernel=kernel), (48, (16,)), (32, (8, 8))))
    for lora in case.adapters:
        lora.lora_b[::7] *= 2.0**9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.clamped, counts = [], case.clamped
        before = [clamped.of(lora.lora_b) for lora in case.adapters]
        run(case)
        after = [clamped.of(lora.lora_b) for lora in case.adapters]
    wanted = [0, 0]
    for site, one, two in zip(case.owner, before, after, strict=True):
        wanted[site] += two - one
    case.clamped = counts
    with as_on_a_gpu(grad_x=False):
        run(case)
    assert counted(case) == wanted
    assert min(wanted) > 0


@pytest.mark.parametrize("kernel", ["triton", "dequantize"])
def test_without_counts_nothing_is_written(kernel):
    """As where kernels are timed before a graph is compiled."""
    case = group(replace(ROW, adapter="fp8", kernel=kernel), (48, (16,)))
    (lora,) = case.adapters
    lora.lora_b[::7] *= 2.0**9
    before = lora.lora_b.clone()
    with as_on_a_gpu(grad_x=False):
        run(case)
    assert torch.equal(lora.lora_b, before)


def test_a_model_says_what_it_clamps(monkeypatch):
    """Once, when it is looked at the next time; and by site."""
    monkeypatch.setattr(insert_operands, "counts_on", lambda device: True)
    torch.manual_seed(0)
    model, x = tiny_mlp(), torch.randn(5, 32)
    fill_b(model, 2.0**9)
    options = {"inner": "eager", "adapter_dtype": "fp8", "kernel": "dequantize"}
    call = torch.compile(model, backend="falqon", options=options)
    with as_on_a_gpu(grad_x=False), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            call(x).sum().backward()
    said = [str(w.message) for w in caught if "clamps some of it" in str(w.message)]
    assert len(said) == 2
    assert "base_model.model.0" in said[0]
    first, second = falqon_fx.adapters(model).values()
    assert first.saturated > 0
    assert second.saturated > 0


# -- as the compiler sees it -----------------------------------------------------------------------


def on_cuda(value: Any) -> Any:
    if isinstance(value, list):
        return [on_cuda(item) for item in value]
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="cuda")


def traced(function: Callable[..., Any], *args: Any) -> Counter[str]:
    """Names of the ops that a function runs on fake tensors."""
    graph = make_fx(function)(*args).graph
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize("kernel", ["auto", "scaled_mm"])
def test_siblings_are_one_product_each_way(kernel):
    """Forward t, then O of all, by the library with [W | b], which is put together, or kept but for
    b; backward D, one transpose of W and A, and dL/dx, or, where Wᵀ is kept, no transpose.
    """
    layers = [(48, (16,)), (32, (16,)), (64, (16,))]
    case = counting(exact(group(replace(ROW, kernel=kernel), *layers, features=128)))
    table, own = decompositions(), kernel == "auto"
    given_to = case.arguments()
    with FakeTensorMode():
        x, *arguments = map(on_cuda, given_to)
        op = table[torch.ops.falqon.merged_linear.default]
        found = traced(lambda *args: op(*args), x, *arguments)
        assert found[LAUNCH] == 1 + own
        assert found["aten._scaled_mm.default"] == (not own)
        joined = [torch.empty((48 + 32 + 64, 128 + 3 * 16), dtype=E4M3, device="cuda")]
        rest = Merged(x, *arguments)._replace(joined=joined)[1:]
        by_kept = traced(lambda *args: op(*args), x, *rest)
        writes = by_kept["aten.copy_.default"], by_kept["aten.as_strided_scatter.default"]
        assert writes == (not own, found["aten.as_strided_scatter.default"] + (not own))
        assert found["aten.copy_.default"] == 0
        weight, scale, _, a, a_scale, b, alpha, count, *_ = arguments
        grads = [on_cuda(layer.grad) for layer in case.layers]
        given = (grads, weight, scale, a, a_scale, b, alpha, count, case.owner)
        op_x = table[torch.ops.falqon.merged_linear_grad_fp8.default]
        back = traced(lambda *args: op_x(*args), *given, True, True, [], BF16, str(case.spec))
        assert back[LAUNCH] == 2 + own
        assert back["aten._scaled_mm.default"] == (not own)
        # Columns for A's transpose lie behind a Wᵀ that is kept: a graph writes them by itself.
        kept = [torch.empty((128, 48 + 32 + 64 + 3 * 16), dtype=E4M3, device="cuda")]
        again = traced(lambda *args: op_x(*args), *given, True, True, kept, BF16, str(case.spec))
        assert again[LAUNCH] == 1 + own
        assert (again["aten.copy_.default"], back["aten.copy_.default"]) == (1, 0)
    for name in (*found, *back):
        assert not name.startswith(("falqon.", "aten.mm", "aten.addmm"))


@pytest.mark.parametrize("name", ["several adapters"])
def test_graphs_of_known_sizes_compute_what_the_ops_do(name):
    case = counting(exact(GROUPS[name](replace(ROW, kernel="triton"))))
    x, *arguments = case.arguments()
    with as_on_a_gpu(grad_x=False):
        op = lower_args
        graph = make_fx(op, tracing_mode="fake")(x, *arguments)
        wanted = op(x, *arguments)
        counted(case)
        made = graph(x, *arguments)
    for one, two in zip(made, wanted, strict=True):
        assert torch.equal(one.float(), two.float())


def lower_args(*args: Any) -> list[Tensor]:
    return lower(Merged(*args))
