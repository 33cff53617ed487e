"""The path of a GPU as the compiler sees it: launches, fusions, the update of rows."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from falqon_fx.kernels.update import launch as update
from falqon_fx.ops import gpu, lowering, products
from falqon_fx.ops.arguments import Merged
from falqon_fx.ops.decompositions import decompositions
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.rows import cuda as rows_cuda
from falqon_fx.site import casts
from falqon_fx.site.numerics import E4M3, E5M2
from falqon_fx.site.spec import SiteSpec
from tests import sites as sites_module
from tests.cuda import BF16, F32, GROUPS, INTERPRETED, ROW, TENSOR, group
from tests.lowered import NOTHING, expected
from tests.parameters import each_value, slow
from tests.sites import make_site, randn, same, snapshot

pytestmark = INTERPRETED

# Of the groups of sites those that differ in what is launched.
KINDS = {"siblings, some frozen", "several adapters", "dropout", "A frozen", "b absent"}

falqon = torch.ops.falqon
LAUNCH = "triton_kernel_wrapper_functional"
NVFP4 = replace(ROW, base="nvfp4")


# -- the ops as the compiler sees them -------------------------------------------------------------


@pytest.mark.usefixtures("_h100")
@each_value(
    name=[n for n in GROUPS if n != "ranks beyond the kernels'"],
    spec={"row": ROW, "tensor": TENSOR},
)
def test_fake_results_look_like_the_real_ones(name, spec):
    """Of the op on a GPU, whose x̂ is in FP8, as of its lowering."""
    case = GROUPS[name](spec)
    real = gpu.merged_linear(case.arguments())
    with FakeTensorMode() as mode:

        def on_gpu(value: Any) -> Any:
            if isinstance(value, list):
                return [on_gpu(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            return torch.empty(value.shape, dtype=value.dtype, device="cuda")

        arguments = [on_gpu(argument) for argument in case.arguments()]
        fake = falqon.merged_linear(*arguments)
        lowered = gpu.merged_linear(Merged(*arguments))
    assert mode is not None
    for i, (one, two, three) in enumerate(zip(fake, lowered, real, strict=True)):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        is_out_a = i == len(case.layers)  # which a CPU without products in bfloat16 has in float32
        here = gemm_dtype(one.dtype, torch.device("cpu")) if is_out_a else one.dtype
        assert (three.shape, three.dtype) == (one.shape, here)


def test_fake_results_of_the_products_look_like_the_real_ones():
    case = group(ROW, (48, (16,)), (32, (8,)))
    spec_text, x = str(case.spec), case.x
    q, q_scale = gpu.quantize(x, E4M3, spec_text)
    _, weight, scale, _, a, a_scale, b, *_ = case.arguments()
    weight = [w.view(E4M3) for w in weight]

    def opcheck(op, args):  # the other checks multiply operands, and torch can't multiply FP8
        torch.library.opcheck(op, args, test_utils=("test_faketensor",))

    (code, *_), (s, *_) = a, a_scale
    out_a = randn(32, 24).to(gemm_dtype(BF16, torch.device("cpu")))
    opcheck(falqon.adapter_product, (q, q_scale, code, s, torch.float16, spec_text))
    for factors, of_a in ((b, []), (b, [out_a]), ([], []), ([], [out_a])):
        parts: tuple[Any, ...] = (a, a_scale, factors, of_a, [], [0, 1])
        opcheck(falqon.merged_product, (q, q_scale, weight, scale, [], *parts, BF16, spec_text))
    nothing: Any = [[]] * 7
    opcheck(falqon.merged_product, (q, q_scale, weight, scale, *nothing, torch.float16, spec_text))
    grads = [gpu.quantize(randn(32, n), E5M2, spec_text) for n in (48, 32)]
    for d, codes, of_a in (([randn(32, 24)], a, a_scale), ([randn(32, 24)], a, []), ([], [], [])):
        g, scales = [g for g, _ in grads], [s for _, s in grads]
        opcheck(falqon.grad_x_product, (g, scales, weight, d, codes, of_a, [], F32, spec_text))
    opcheck(
        falqon.grad_out_a, ([randn(32, 48), randn(32, 32)], [randn(48, 8), randn(32, 4)], spec_text)
    )
    grads_of, ranks, d = [randn(32, 48), randn(32, 32)], [16, 8], [randn(32, 24)]
    for kept, of_d in (([q, q_scale], d), ([], [])):
        rest = (randn(32, 24), ranks, ranks, [0.5, 1.0], kept, of_d, BF16, spec_text)
        opcheck(falqon.adapter_grads, (grads_of, *rest))
    opcheck(falqon.cast_fp8, (x.float(), E5M2, spec_text))
    opcheck(falqon.cast_fp8, (x, E5M2, spec_text))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
def test_the_cast_by_itself_is_the_one_that_inductor_fuses(dtype, fp8, granularity):
    x = randn(7, 40).to(dtype)
    x[2], x[3, 5], x[4, 6] = 0, float("nan"), float("inf")
    spec_text = str(SiteSpec(granularity, "pow2", "e5m2", kernel="triton"))
    for rows in (x, x[:3], x[:0]):
        q, scale = falqon.cast_fp8(rows, fp8, spec_text)
        other_q, other_scale = casts.cast_fp8(rows.float(), fp8, spec_text)
        assert (
            torch.equal(scale.view(torch.int32), other_scale.view(torch.int32))
            or (scale.isnan() == other_scale.isnan()).all()
        )
        same_nan = q.float().isnan() == other_q.float().isnan()
        same_code = q.view(torch.uint8) == other_q.view(torch.uint8)
        assert (same_nan & (same_code | q.float().isnan())).all()


def traced(function: Callable[..., Any], *args: Any) -> Counter[str]:
    """Names of the ops that a function runs on fake tensors."""
    graph = make_fx(function)(*args).graph
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


# Of sizes that kernels are compiled ahead for: launches forward, and for dL/dx.
LOWERED = {
    "siblings, one frozen": (group(ROW, (128, (16,)), (128, ()), (256, (16,)), features=128), 3, 2),
    "several adapters": (group(ROW, (128, (16, 16)), (256, (16,)), features=128), 2, 2),
    "b absent": (group(ROW, (128, (16,)), (256, (16,)), features=128, adds_b=False), 1, 2),
    "nvfp4": (group(NVFP4, (128, (16,)), (128, ()), (256, (16,)), features=256), 3, 1),
    "nvfp4, b absent": (group(NVFP4, (128, (16,)), (256, (16,)), features=256, adds_b=False), 2, 1),
}


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize(("case", "forward", "backward"), LOWERED.values(), ids=LOWERED)
def test_on_a_gpu_the_ops_are_lowered_to_launches(case, forward, backward):
    """O_A, O of the sites with adapters, O of the others; in backward one dL/dx of the group behind
    the transposes of its weights, which an H100 wants the other way round; NVFP4 it reads as it is.
    """
    table = decompositions()
    _, *arguments = case.arguments()
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        columns: list[Any] = [
            [empty(*t.shape, dtype=t.dtype) for t in column] if isinstance(column, list) else column
            for column in arguments[:10]
        ]
        op = table[falqon.merged_linear.default]
        x = empty(32, case.x.shape[1], dtype=BF16)
        found = traced(lambda *args: op(*args), x, *columns, *arguments[10:])
        assert found[LAUNCH] == forward
        assert not {
            name for name in found if name.startswith("falqon.") or name == "aten.mm.default"
        }

        weight, scale, _, a, a_scale, *_ = columns
        grads = [empty(32, len(w), dtype=BF16) for w in weight]
        d = [empty(32, sum(len(code) for code in a), dtype=BF16)] if case.adds_b else []
        given_a = (a, a_scale) if case.adds_b else ([], [])
        op_x = table[falqon.merged_linear_grad_x.default]
        rest = (weight, scale, d, *given_a, [], BF16, str(case.spec))
        found = traced(lambda *args: op_x(*args), grads, *rest)
        assert found[LAUNCH] == backward
        assert not {
            name for name in found if name.startswith("falqon.") or name == "aten.mm.default"
        }


def in_a_graph(function: Callable[..., Any], *args: Any) -> tuple[Counter[str], Any]:
    """The ops in the graph that is traced for these sizes, and what it computes."""
    graph = make_fx(function, tracing_mode="fake")(*args)
    found = Counter(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
    return found, graph(*args)


@pytest.mark.parametrize("spec", [ROW, slow(TENSOR)], ids=["row", "tensor"])
@pytest.mark.parametrize("name", [name if name in KINDS else slow(name) for name in GROUPS])
def test_graphs_of_known_sizes_launch_the_kernels_themselves(name, spec):
    """No op of ours is left, forward and backward, and the graph computes what the ops do."""
    case, table = GROUPS[name](replace(spec, kernel="triton")), decompositions()
    x, *rest_of = case.arguments()
    arguments: list[Any] = [*rest_of]
    ops_found = Counter[str]()

    def check_graph(op: Any, *args: Any) -> None:
        found, made = in_a_graph(lambda *args: table[op](*args), *args)
        wanted = table[op](*args)
        many = isinstance(wanted, list)
        for one, two in zip(made if many else [made], wanted if many else [wanted], strict=True):
            assert torch.equal(one.float(), two.float())
        ops_found.update(found)

    check_graph(falqon.merged_linear.default, x, *arguments)
    weight, scale, _, a, a_scale, *_ = arguments
    grads = [layer.grad.reshape(-1, layer.grad.shape[-1]) for layer in case.layers]
    d = [randn(32, sum(len(code) for code in a)).bfloat16()] if a else []
    given_a = (d, a, a_scale) if case.adds_b else ([], [], [])
    rest = (weight, scale, *given_a, [], BF16, str(case.spec))
    check_graph(falqon.merged_linear_grad_x.default, grads, *rest)
    if a:
        ranks = [len(code) for code in a]
        q, q_scale = gpu.quantize(x.reshape(32, x.shape[-1]), E4M3, str(spec))
        of = [grads[i] for i in arguments[11]]
        given = (
            of,
            randn(32, sum(ranks)).bfloat16(),
            ranks,
            ranks,
            [0.5] * len(a),
            [q, q_scale],
            d,
        )
        check_graph(falqon.adapter_grads.default, *given, F32, str(case.spec))
        factors = [randn(g.shape[1], rank).bfloat16() for g, rank in zip(of, ranks, strict=True)]
        check_graph(falqon.grad_out_a.default, of, factors, str(case.spec))
        loras = [[lora.lora_a for lora in case.adapters], [lora.lora_b for lora in case.adapters]]
        numbers: Any = ([0.5] * len(a), *NOTHING, False, str(case.spec))
        check_graph(falqon.proxy_update.default, *loras, *numbers)
    assert ops_found[LAUNCH] > 0
    assert not [name for name in ops_found if name.startswith("falqon.")]


@pytest.mark.usefixtures("_h100")
def test_below_sm_89_the_cast_is_a_launch_by_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, calls in (((8, 0), 1), ((8, 9), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        with FakeTensorMode():
            x = torch.empty(5, 64, device="cuda")
            found = traced(lambda x: gpu.quantize(x, E4M3, str(ROW)), x)
        assert found[LAUNCH] == calls


@pytest.fixture
def _traceable(monkeypatch):
    """Dynamo may go through the lowering: what this CPU can do is not asked, and products stay
    the ops that they are where sizes are symbols.
    """
    monkeypatch.setattr(lowering, "native_bf16", lambda: True)
    monkeypatch.setattr(products, "sizes_known", lambda args: False)


@pytest.mark.usefixtures("_traceable")
def test_inductors_product_is_compiled_within_a_graph_that_runs():
    """The op is opaque: its product is compiled when the graph around it first runs."""
    case = GROUPS["siblings, some frozen"](replace(TENSOR, kernel="inductor"))
    x, *rest = case.arguments()

    def layers(x: Tensor) -> list[Tensor]:
        return [-y for y in gpu.merged_linear(Merged(x + x, *rest))[: len(case.layers)]]

    compiled = torch.compile(layers, fullgraph=True)(x)
    wanted = expected(replace(case, x=x + x))
    for i, actual in enumerate(compiled):
        wanted[f"y {i}"].assert_holds(-actual)


@pytest.mark.usefixtures("_traceable")
@pytest.mark.parametrize("keep_x", [True, False])
def test_inductor_fuses_the_casts_into_the_norm(keep_x):
    """What reads the norm's input writes the FP8 x, once: no normalized x is kept in between, and
    what is kept for dL/dA is that FP8 x.

    Of the code that Inductor makes for a CPU; into how many kernels it goes on a GPU is not seen.
    """
    case = replace(GROUPS["siblings, some frozen"](ROW), keep_x=keep_x)
    _, *rest = case.arguments()
    gain = torch.ones(64, dtype=BF16)

    def layers(x: Tensor) -> list[Tensor]:
        return gpu.merged_linear(Merged(torch.nn.functional.rms_norm(x, (64,), gain), *rest))

    x = randn(4, 8, 64).bfloat16()
    results, (code,) = run_and_get_code(torch.compile(layers, fullgraph=True), x)
    assert len(results) == len(case.layers) + 1 + 2 * keep_x
    before, _ = code.split("torch.ops.falqon.merged_product.default(", 1)
    body = before[before.rindex("def call(") :]
    made_by = re.findall(r"^ *(cpp_fused_\w+)\(", body, re.MULTILINE)
    assert "norm" in made_by[0] or "rsqrt" in made_by[0]
    buffers = Counter(re.findall(r"= empty_strided_cpu\(\((.*?)\), .*torch\.(\w+)\)", body))
    assert buffers[("32, 64", "float8_e4m3fn")] == 1
    wide = [b for b in buffers if b[0] in ("32, 64", "4, 8, 64") and b[1] != "float8_e4m3fn"]
    assert not wide, wide


# -- the update of rows ----------------------------------------------------------------------------


def rows_arguments(*made: sites_module.Site) -> tuple[list[list[Any]], str]:
    """Those of ``falqon::proxy_update_``, the text apart."""
    columns: list[list[Any]] = [
        *([site.state.tensors[i] for site in made] for i in range(5)),
        [site.lora_b for site in made],
        [site.lora_a for site in made],
        [site.base for site in made],
        [site.state.scaling for site in made],
    ]
    return columns, str(made[0].state.spec)


def test_update_takes_sites_of_all_kinds_in_few_launches():
    made = [make_site(40, 64, 8), make_site(24, 32, 4, dtype=BF16)]
    odd = make_site(24, 32, 4)
    odd.lora_b = odd.lora_b.t().contiguous().t()  # the kernels take no strides
    others = [make_site(40, 64, 8), make_site(24, 32, 4, dtype=BF16), make_site(24, 32, 4)]
    for site in (*made, odd, *others):
        site.step()
    rows_cuda.proxy_update_(*rows_arguments(*made, odd))
    sites_module.update(*others)
    for site, other in zip((*made, odd), others, strict=True):
        code, other_code = site.state.code, other.state.code
        # Sums of eight products in another order: bytes may differ at ties alone.
        assert (code != other_code).double().mean() < 0.01
        assert same(snapshot(site.state)[2:], snapshot(other.state)[2:])


def test_launches_are_remembered_while_the_tensors_stay_where_they_are(monkeypatch):
    site, other = make_site(40, 64, 8), make_site(40, 64, 8)
    planned = []
    plan = rows_cuda._plan_launches
    monkeypatch.setattr(rows_cuda, "_known", {})
    monkeypatch.setattr(rows_cuda, "_plan_launches", lambda *a: planned.append(1) or plan(*a))
    for step, launches in ((0, 1), (1, 1), (2, 2)):
        if step == 2:
            site.lora_b = site.lora_b.clone()
        for each in (site, other):
            each.step(seed=step)
        rows_cuda.proxy_update_(*rows_arguments(site))
        sites_module.update(other)
        assert len(planned) == launches
        code, other_code = site.state.code, other.state.code
        assert (code != other_code).double().mean() < 0.01  # at ties alone
        assert same(snapshot(site.state)[2:], snapshot(other.state)[2:])


def test_an_update_is_four_launches_that_read_nothing_back(monkeypatch):
    launched, ops_run = [], []

    class Kernels:
        def __getattr__(self, name):
            return defaultdict(lambda: lambda *args, **options: launched.append(name))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops_run.append(str(func))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(update, "load", lambda spec, interpret: Kernels())
    made = [make_site(40, 64, 8), make_site(24, 32, 4), make_site(16, 32, 4)]
    arguments = rows_arguments(*made)
    rows_cuda.proxy_update_(*arguments)  # makes the table
    launched.clear()
    with Watch():
        rows_cuda.proxy_update_(*arguments)
    assert launched == ["fingerprint", "score", "select", "write"]
    # Buffers for the kernels; neither a value nor a copy goes to the host.
    assert set(ops_run) <= {"aten.zeros.default", "aten.empty.memory_format"}, ops_run
