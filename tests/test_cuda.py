"""The path of a GPU, on CPU: the same casts, with products by generated kernels (interpreted), by
the library or plain; against float64 on the same quantized operands.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from falqon_fx import FalqonConfig, cuda, lowering, ops, products, rewrite
from falqon_fx.kernels import dispatch, update
from falqon_fx.kernels.choice import Choices
from falqon_fx.ops import decompositions
from falqon_fx.passes.kernels import choose
from falqon_fx.spec import SiteSpec
from tests import sites as sites_module
from tests.sites import make_site, randn, same, snapshot, takes_row_scales
from tests.spellings import HandWritten, Spelling
from tests.strategies import Case, cases
from tests.test_lowering import expected
from tests.tolerances import Approx

KERNELS = ["triton", "dequantize", "scaled_mm", "inductor"]
OUTPUTS = ["own", "strided"]

# numpy, which the interpreter computes with, announces what hashing does on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


@pytest.fixture(autouse=True, scope="module")
def kernel_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FALQON_CACHE", str(tmp_path_factory.mktemp("falqon-cache")))
        yield


def columns(made):
    states = [site.state for site in made]
    return (
        [s.weight for s in states],
        [s.scale for s in states],
        [s.applied for s in states],
        [site.lora_b for site in made],
    )


def run(made, x, bias, out_dtype, grads, kernel, output="own"):
    """(O of each site, O_A, dL/dx, dL/dB of each)."""
    states = [site.state for site in made]
    plan, scaling = (
        replace(states[0].plan, kernel=kernel, output=output),
        [s.scaling for s in states],
    )
    spec = str(plan)
    *ys, out_a = cuda.merged_linear(x, *columns(made), bias, scaling, out_dtype, spec)
    grad_x = cuda.merged_linear_grad_x(grads, *columns(made), scaling, x.dtype, spec)
    parts = out_a.split([s.rank for s in states], dim=1)
    grad_bs = [
        products.grad_b_product(g, a, s.state.scaling, s.lora_b.dtype, spec)
        for g, a, s in zip(grads, parts, made, strict=True)
    ]
    if not states[0].plan.per_row:  # in one pass they are the same, bit for bit
        one_pass = cuda.merged_linear_grads(parts, grads, *columns(made), scaling, x.dtype, spec)
        assert torch.equal(one_pass[0], grad_x)
        assert all(map(torch.equal, one_pass[1], grad_bs))
    return ys, out_a, grad_x, grad_bs


def holds(wanted: Approx, actual: torch.Tensor) -> None:
    Approx(wanted.value.reshape(actual.shape), wanted.bound.reshape(actual.shape)).assert_holds(
        actual
    )


@settings(max_examples=30)
@given(
    case=cases(),
    kernel=st.sampled_from([("triton", "own")] * 2 + [("dequantize", o) for o in OUTPUTS]),
)
def test_results_equal_float64_on_the_same_quantized_operands(case: Case, kernel: tuple[str, str]):
    wanted, bias = expected(case), [] if case.bias is None else [case.bias]
    grad = case.grad.reshape(-1, case.grad.shape[-1])
    (y,), out_a, grad_x, (grad_b,) = run([case.site], case.x, bias, case.out_dtype, [grad], *kernel)
    assert y.shape == (*case.x.shape[:-1], len(case.site.lora_b))
    assert (y.dtype, grad_x.dtype, grad_b.dtype) == (
        case.out_dtype,
        case.x.dtype,
        case.site.lora_b.dtype,
    )
    for name, actual in {"y": y, "out_a": out_a, "grad_x": grad_x, "grad_b": grad_b}.items():
        holds(wanted[name], actual)


def siblings(granularity, pending):
    """Sites of different sizes and ranks that share x, some of B not yet written."""
    made = []
    for i, (out, rank) in enumerate(((48, 16), (32, 8), (16, 16))):
        site = make_site(out, 64, rank, granularity=granularity, pending=pending, seed=i)
        site.step(seed=i)
        made.append(site)
    return made


@pytest.mark.parametrize(
    ("kernel", "output"), [*((k, "own") for k in KERNELS), *((k, "strided") for k in KERNELS[1:])]
)
@pytest.mark.parametrize("pending", ["apply", "hold"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_siblings_share_a_cast_and_the_products(granularity, pending, kernel, output):
    library = kernel in ("scaled_mm", "inductor")
    if library and granularity == "row" and not takes_row_scales():
        pytest.skip("torch's _scaled_mm takes no row scales on CPU")
    made, x = siblings(granularity, pending), randn(32, 64).bfloat16()
    grads = [randn(32, len(s.lora_b), seed=i).bfloat16() for i, s in enumerate(made)]
    ys, out_a, grad_x, _ = run(made, x, [], torch.bfloat16, grads, kernel, output)
    assert [y.stride(0) for y in ys] == ([48, 32, 16] if output == "own" else [64, 40, 32])
    assert out_a.is_contiguous()
    total = Approx.exact(torch.zeros(32, 64))
    for site, y, a, grad in zip(made, ys, out_a.split([16, 8, 16], dim=1), grads, strict=True):
        case = Case(site, x, None, torch.bfloat16, grad)
        wanted = expected(case)
        holds(wanted["y"], y)
        holds(wanted["out_a"], a)
        total = (total + wanted["grad_x"]).rounded(torch.float32)
    holds(total.rounded(torch.bfloat16), grad_x)


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_no_tokens(kernel):
    made = siblings("row", "apply")
    grads = [torch.zeros(0, len(s.lora_b)) for s in made]
    ys, out_a, grad_x, grad_bs = run(made, torch.zeros(2, 0, 64), [], torch.float32, grads, kernel)
    assert [y.shape for y in ys] == [(2, 0, 48), (2, 0, 32), (2, 0, 16)]
    assert (out_a.shape, grad_x.shape) == ((0, 40), (0, 64))
    assert all((b == 0).all() for b in grad_bs)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("pending", ["apply", "hold"])
def test_fake_results_look_like_the_real_ones(pending, output):
    made, x = siblings("row", pending), randn(5, 64)
    spec = str(replace(made[0].state.plan, output=output))
    q, q_scale = cuda.quantize(x, torch.float8_e4m3fn, spec)
    weight, scale, applied, lora_b = columns(made)
    outs = [len(b) for b in lora_b]

    def check(op, args):  # the other checks multiply operands, and torch can't multiply FP8
        torch.library.opcheck(op, args, test_utils=("test_faketensor",))

    parts = [lowering.pending_part(b, a, 2.0, torch.float32) for b, a in zip(lora_b, applied)]
    rest = parts if pending == "apply" else []
    args = (q, q_scale, weight, scale, outs, rest, [], torch.float16, spec)
    check(torch.ops.falqon.merged_product, args)
    args = (x, weight, scale, applied, lora_b, [], [2.0] * 3, torch.float16, spec)
    check(torch.ops.falqon.merged_linear, args)
    grads = [cuda.quantize(randn(5, n), torch.float8_e5m2, spec) for n in outs]
    args = ([g for g, _ in grads], [s for _, s in grads], weight, outs, [], x.dtype, spec)
    check(torch.ops.falqon.grad_x_product, args)
    args = (randn(5, 48), randn(5, 16), 0.5, torch.bfloat16, spec)
    check(torch.ops.falqon.grad_b_product, args)
    args = (randn(5, 48), torch.tensor(0.5), randn(5, 16), 0.5, torch.bfloat16)
    check(torch.ops.falqon.cast_grad_b_product, (*args, torch.float8_e5m2, spec))
    check(torch.ops.falqon.cast_fp8, (x, torch.float8_e5m2, spec))
    check(torch.ops.falqon.cast_fp8, (x.bfloat16(), torch.float8_e5m2, spec))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_cast_by_itself_is_the_one_that_inductor_fuses(dtype, fp8, granularity):
    x = randn(7, 40).to(dtype)
    x[2], x[3, 5], x[4, 6] = 0, float("nan"), float("inf")
    (made,) = [make_site(8, 40, 4, granularity=granularity)]
    spec = str(replace(made.state.plan, kernel="triton"))
    for rows in (x, x[:3], x[:0]):
        q, scale = torch.ops.falqon.cast_fp8(rows, fp8, spec)
        other_q, other_scale = products.cast_fp8(rows.float(), fp8, spec)
        assert (
            torch.equal(scale.view(torch.int32), other_scale.view(torch.int32))
            or (scale.isnan() == other_scale.isnan()).all()
        )
        same_nan = q.float().isnan() == other_q.float().isnan()
        same_code = q.view(torch.uint8) == other_q.view(torch.uint8)
        assert (same_nan & (same_code | q.float().isnan())).all()


def backward_ops():
    """What backward of three siblings runs on a GPU. Autograd itself needs a real one."""
    made = siblings("tensor", "apply")
    ranks = [site.state.rank for site in made]
    like = [torch.zeros(5, sum(ranks)), *(t for column in columns(made) for t in column)]
    with FakeTensorMode():
        saved = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in like]
        grads = [torch.empty(5, n, dtype=torch.bfloat16, device="cuda") for n in (48, 32, 16)]
        ctx = SimpleNamespace(
            saved_tensors=saved,
            ranks=ranks,
            scaling=[2.0] * 3,
            bias_dtypes=[],
            x_dtype=torch.bfloat16,
            x_shape=(5, 64),
            spec=str(made[0].state.plan),
            needs_input_grad=(True, None, None, None, [True] * 3, []),
        )
        return traced(lambda *grads: ops._backward(ctx, [*grads, None])[0], *grads)


def test_one_pass_casts_dl_do_and_computes_dl_db(monkeypatch):
    for one_pass in (True, False):
        monkeypatch.setattr(cuda, "casts_with_grad_b", lambda device, spec, on=one_pass: on)
        found = backward_ops()
        assert found["falqon.cast_grad_b_product.default"] == 3 * one_pass
        assert found["falqon.grad_x_product.default"] == one_pass
        assert found["falqon.grad_b_product.default"] == 3 * (not one_pass)
        assert found["falqon.merged_linear_grad_x.default"] == (not one_pass)


@pytest.mark.parametrize(
    ("granularity", "kernel", "capability", "one_pass"),
    [
        ("tensor", "auto", (9, 0), True),
        ("tensor", "max-autotune", (8, 9), True),
        ("tensor", "triton", (12, 0), True),
        ("row", "auto", (9, 0), False),
        ("tensor", "dequantize", (9, 0), False),
        ("tensor", "inductor", (9, 0), False),
        ("tensor", "scaled_mm", (9, 0), False),
        ("tensor", "auto", (8, 6), False),
    ],
)
def test_one_pass_is_for_one_scale_and_generated_kernels(
    granularity, kernel, capability, one_pass, monkeypatch
):
    spec = SiteSpec.from_config(FalqonConfig(granularity=granularity))
    spec = str(replace(spec, kernel=kernel))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cuda.casts_with_grad_b(torch.device("cuda", 0), spec) == one_pass
    assert not cuda.casts_with_grad_b(torch.device("cpu"), spec)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not cuda.casts_with_grad_b(torch.device("cuda", 0), spec)


def test_gradients_of_the_one_pass_reach_their_sites(monkeypatch):
    """Three siblings, the second one's result unused."""
    for one_pass in (False, True):
        made, x = siblings("tensor", "apply"), randn(5, 64).requires_grad_()
        monkeypatch.setattr(cuda, "casts_with_grad_b", lambda device, spec, on=one_pass: on)
        *given, lora_b = columns(made)
        leaves = [x, *(b.requires_grad_() for b in lora_b)]
        scaling, spec = [0.5, 1.0, 2.0], str(made[0].state.plan)
        first, _, third, _ = torch.ops.falqon.merged_linear(
            x, *given, lora_b, [], scaling, torch.float32, spec
        )
        grads = {0: randn(5, 48, seed=7), 2: randn(5, 16, seed=8)}
        loss = (first * grads[0]).sum() + (third * grads[2]).sum()
        grad_x, *grad_b = torch.autograd.grad(loss, leaves, allow_unused=True)
        assert grad_b[1] is None
        total = Approx.exact(torch.zeros(5, 64))
        for i, grad in grads.items():
            # A state says what its scaling is in the model; here each site has its own.
            made[i].state.scaling = scaling[i]
            wanted = expected(Case(made[i], x.detach(), None, torch.float32, grad))
            total = (total + wanted["grad_x"]).rounded(torch.float32)
            holds(wanted["grad_b"], grad_b[i])
        holds(total, grad_x)


def test_inductors_product_is_compiled_within_a_graph_that_runs():
    """The op is opaque: its product is compiled when the graph around it first runs."""
    made = siblings("tensor", "hold")
    spec = str(replace(made[0].state.plan, kernel="inductor"))
    given = columns(made)

    def layer(x):
        y = cuda.merged_linear(x + x, *given, [], [2.0] * 3, torch.bfloat16, spec)
        return [-part for part in y]

    x = randn(32, 64).bfloat16()
    compiled = torch.compile(layer, fullgraph=True)(x)
    for site, actual in zip(made, compiled, strict=False):
        case = Case(site, x + x, None, torch.bfloat16, torch.zeros(32, len(site.lora_b)))
        holds(expected(case)["y"], -actual)


def test_update_takes_sites_of_all_kinds_in_few_launches():
    made = [make_site(40, 64, 8), make_site(24, 32, 4, dtype=torch.bfloat16)]
    odd = make_site(24, 32, 4)
    odd.lora_b = odd.lora_b.t().contiguous().t()  # the kernels take no strides
    others = [
        make_site(40, 64, 8),
        make_site(24, 32, 4, dtype=torch.bfloat16),
        make_site(24, 32, 4),
    ]
    for site in (*made, odd, *others):
        site.step()
    states = [s.state for s in (*made, odd)]
    cuda.proxy_update_(
        *([s.tensors[i] for s in states] for i in range(5)),
        [s.lora_b for s in (*made, odd)],
        [s.lora_a for s in (*made, odd)],
        [s.base for s in (*made, odd)],
        [s.scaling for s in states],
        str(states[0].plan),
    )
    sites_module.update(*others)
    for site, other in zip((*made, odd), others, strict=True):
        code, other_code = site.state.code, other.state.code
        # Sums of eight products in another order: bytes may differ at ties alone.
        assert (code != other_code).double().mean() < 0.01
        assert same(snapshot(site.state)[2:], snapshot(other.state)[2:])


def test_launches_are_remembered_while_the_tensors_stay_where_they_are(monkeypatch):
    site, other = make_site(40, 64, 8), make_site(40, 64, 8)
    planned = []
    plan = cuda._plan_launches
    monkeypatch.setattr(cuda, "_known", {})
    monkeypatch.setattr(cuda, "_plan_launches", lambda *a: planned.append(1) or plan(*a))

    def update():
        cuda.proxy_update_(
            *([tensor] for tensor in site.state.tensors),
            [site.lora_b],
            [site.lora_a],
            [site.base],
            [site.state.scaling],
            str(site.state.plan),
        )

    for step, launches in ((0, 1), (1, 1), (2, 2)):
        if step == 2:
            site.lora_b = site.lora_b.clone()
        for each in (site, other):
            each.step(seed=step)
        update()
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
    arguments = [
        *([s.state.tensors[i] for s in made] for i in range(5)),
        [s.lora_b for s in made],
        [s.lora_a for s in made],
        [s.base for s in made],
        [s.state.scaling for s in made],
        str(made[0].state.plan),
    ]
    cuda.proxy_update_(*arguments)  # makes the table
    launched.clear()
    with Watch():
        cuda.proxy_update_(*arguments)
    assert launched == ["fingerprint", "score", "select", "write"]
    # Buffers for the kernels; neither a value nor a copy goes to the host.
    assert set(ops_run) <= {"aten.zeros.default", "aten.empty.memory_format"}, ops_run


def traced(function, *args):
    """Names of the ops that a function runs on fake tensors."""
    graph = make_fx(function)(*args).graph
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("pending", ["apply", "hold"])
def test_on_a_gpu_the_ops_are_lowered_to_products(pending, monkeypatch):
    table, made = decompositions(), siblings("row", pending)
    spec, scaling, state = str(made[0].state.plan), [2.0] * 3, columns(made)
    monkeypatch.setattr(cuda, "merged_linear_grad_x", lambda grad, *rest: "for GPUs")
    with FakeTensorMode():
        given = [
            [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in column] for column in state
        ]
        x = torch.empty(2, 5, 64, device="cuda", dtype=torch.bfloat16)

        def forward(x, *given):
            op = torch.ops.falqon.merged_linear.default
            return table[op](x, *given, [], scaling, torch.bfloat16, spec)

        ops = traced(forward, x, *given)
        assert ops["falqon.merged_product.default"] == 1
        assert ops["aten.mm.default"] == 0
        assert table[torch.ops.falqon.merged_linear_grad_x.default]([x]) == "for GPUs"


def test_below_sm_89_the_cast_is_an_op_by_itself(monkeypatch):
    made = siblings("row", "apply")
    spec = str(made[0].state.plan)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, calls in (((8, 0), 1), ((8, 9), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        with FakeTensorMode():
            x = torch.empty(5, 64, device="cuda")
            ops = traced(lambda x: cuda.quantize(x, torch.float8_e4m3fn, spec), x)
        assert ops["falqon.cast_fp8.default"] == calls


def test_inductor_fuses_the_casts_into_the_norm():
    """What reads the norm's input writes the FP8 x, once: no normalized x is kept in between.

    Of the code that Inductor makes for a CPU; into how many kernels it goes on a GPU is not seen.
    """
    made = siblings("row", "apply")
    spec, given = str(made[0].state.plan), columns(made)
    gain = torch.ones(64, dtype=torch.bfloat16)

    def layer(x):
        y = torch.nn.functional.rms_norm(x, (64,), gain)
        return cuda.merged_linear(y, *given, [], [2.0] * 3, torch.bfloat16, spec)

    x = randn(4, 8, 64).bfloat16()
    _, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
    before, after = code.split("torch.ops.falqon.merged_product.default(", 1)
    body = before[before.rindex("def call(") :]
    made_by = re.findall(r"^ *(cpp_fused_\w+)\(", body, re.MULTILINE)
    assert "norm" in made_by[0] or "rsqrt" in made_by[0]
    buffers = Counter(re.findall(r"= empty_strided_cpu\(\((.*?)\), .*torch\.(\w+)\)", body))
    assert buffers[("32, 64", "float8_e4m3fn")] == 1
    wide = [b for b in buffers if b[0] in ("32, 64", "4, 8, 64") and b[1] != "float8_e4m3fn"]
    assert not wide, wide


def test_explain_shows_what_won(monkeypatch):
    device = torch.device("cuda", 0)
    choices = Choices("card", lambda run: run())
    monkeypatch.setattr(dispatch, "choices_for", lambda device: choices)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = HandWritten(Spelling(out=48, features=64))
    gm = torch.fx.symbolic_trace(model)
    (site,) = rewrite(gm, (randn(5, 64),), FalqonConfig(card="H100")).report.sites
    kernel, why = choose(site, device)
    assert kernel.startswith("triton:"), why
    assert "times them and the library's" in why
    candidates = {"triton:x": lambda: 1.0, "scaled_mm": lambda: 1.5}
    choices.get("forward n=32, k=64, rows=(48, 16), a_pieces=1", candidates)
    assert choose(site, device) == (
        "triton:x",
        "forward n=32, k=64, rows=(48, 16), a_pieces=1: triton:x, 1.50x the speed of scaled_mm",
    )
    choices.get("forward n=64, k=64, rows=(48, 16), a_pieces=1", {"scaled_mm": lambda: 1.0})
    assert choose(site, device)[0] == "scaled_mm"
    assert choose(site, torch.device("cpu"))[0].startswith("triton:")
