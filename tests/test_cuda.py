"""The path of a GPU, on CPU: the same casts, with products by generated kernels (interpreted), by
the library or plain; against float64 on the same quantized operands.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from falqon_fx.kernels.products import dispatch
from falqon_fx.kernels.update import launch as update
from falqon_fx.ops import gpu, lowering, products
from falqon_fx.ops import merged_linear as ops
from falqon_fx.ops.adapter_grads import adapter_grads_on_gpu, grad_out_a_on_gpu
from falqon_fx.ops.arguments import Merged
from falqon_fx.ops.decompositions import decompositions
from falqon_fx.rows import cuda as rows_cuda
from falqon_fx.site import casts
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import E4M3, E5M2
from falqon_fx.site.spec import SiteSpec
from tests import sites as sites_module
from tests.parameters import each_pair, each_value
from tests.sites import make_site, randn, same, snapshot, takes_row_scales
from tests.strategies import Case, Layer, Lora, cases
from tests.test_lowering import check, expected, hat, run

F32, BF16 = torch.float32, torch.bfloat16
ROW, TENSOR = (SiteSpec(granularity, "pow2", "e5m2") for granularity in ("row", "tensor"))
falqon = torch.ops.falqon
LAUNCH = "triton_kernel_wrapper_functional"

# numpy, which the interpreter computes with, announces what hashing does on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


@pytest.fixture(autouse=True, scope="module")
def kernel_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FALQON_CACHE", str(tmp_path_factory.mktemp("falqon-cache")))
        yield


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The ops are lowered for CPU tensors as for those of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "lower_merged_linear", gpu.merged_linear)
        patch.setattr(ops, "lower_grad_x", gpu.merged_linear_grad_x)
        patch.setattr(ops, "lower_adapter_grads", adapter_grads_on_gpu)
        patch.setattr(ops, "lower_grad_out_a", grad_out_a_on_gpu)
        patch.setattr(lowering, "grad_a", gpu.grad_a)
        yield


@pytest.fixture
def _h100(monkeypatch):
    """Fake tensors on "cuda" are those of an H100."""
    about = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)


def check_on_gpu(case: Case) -> dict[str, Tensor]:
    """All results against float64. Kernels add up dL/dx in their own order, and some round in
    between: ``steps``.
    """
    wanted = expected(case, steps=True)
    with as_on_a_gpu():
        return check(case, wanted)


@given(case=cases(), kernel=st.sampled_from(["triton", "dequantize"]))
def test_results_equal_float64_on_the_same_quantized_operands(case: Case, kernel: str):
    case.spec = replace(case.spec, kernel=kernel)
    check_on_gpu(case)


@given(cases())
def test_adapters_are_cast_as_on_a_cpu(case: Case):
    """Bit for bit."""
    loras, wide = case.adapters, case.casts[0][2].dtype == F32 if case.adapters else False
    casts = gpu.proxy_update(
        [lora.lora_a for lora in loras],
        [lora.lora_b for lora in loras],
        [lora.scaling for lora in loras],
        [],
        wide,
        str(case.spec),
    )
    wanted = [tensor for cast in case.casts for tensor in cast]
    for ours, other in zip(casts, wanted, strict=True):
        assert (ours.dtype, ours.shape) == (other.dtype, other.shape)
        bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (ours, other)]
        assert torch.equal(*bits)


# -- groups of layers ------------------------------------------------------------------------------


def layer(out: int, ranks: tuple[int, ...], spec: SiteSpec, seed: int, **change: Any) -> Layer:
    """A layer of 64 features whose adapters have the given ranks, for 32 tokens in bfloat16."""
    loras = [
        Lora(
            randn(rank, 64, seed=seed + 10 * j) / 4,
            randn(out, rank, seed=seed + 10 * j + 1) / 4,
            scaling=(2.0, 0.3)[j % 2],
        )
        for j, rank in enumerate(ranks)
    ]
    weight = randn(out, 64, seed=seed + 7).bfloat16()
    grad = randn(32, out, seed=seed + 8).bfloat16()
    return replace(Layer(weight, cast_base(weight, spec), None, loras, grad), **change)


def group(spec: SiteSpec, *of: tuple[int, tuple[int, ...]], **change: Any) -> Case:
    """Layers (out, ranks) that share x [32, 64]."""
    layers = [layer(out, ranks, spec, 100 * i) for i, (out, ranks) in enumerate(of)]
    return replace(Case(randn(32, 64).bfloat16(), layers, BF16, spec), **change)


def with_dropout(spec: SiteSpec) -> Case:
    """Two adapters that read x behind masks of their own, and one that reads x itself."""
    case = group(spec, (48, (16, 8, 16)))
    for i, lora in enumerate(case.adapters[:2]):
        lora.x = case.x * ((randn(32, 64, seed=20 + i) > 0) * 2).bfloat16()
    return case


GROUPS: dict[str, Callable[[SiteSpec], Case]] = {
    "one adapter": lambda spec: group(spec, (48, (16,))),
    "a frozen layer": lambda spec: group(spec, (48, ())),
    "siblings, some frozen": lambda spec: group(spec, (48, (16,)), (32, ()), (16, (8,)), (64, ())),
    "frozen siblings": lambda spec: group(spec, (48, ()), (32, ())),
    "several adapters": lambda spec: group(spec, (48, (16, 8)), (32, (5,)), (16, (16, 16, 3))),
    "ranks beyond the kernels'": lambda spec: group(spec, (48, (300,)), (32, (8,))),
    "dropout": with_dropout,
    "A frozen": lambda spec: group(spec, (48, (16,)), (32, (8,)), keep_x=False),
    "9 sites": lambda spec: group(spec, *[(16, (4,))] * 9),
    "10 pieces, b absent": lambda spec: group(spec, *[(16, (4,))] * 5, adds_b=False),
    "b absent": lambda spec: group(spec, (48, (16,)), (32, (8,)), adds_b=False),
    "b absent, dropout": lambda spec: replace(with_dropout(spec), adds_b=False),
}


@each_pair(
    name=list(GROUPS),
    spec={"row": ROW, "tensor": TENSOR},
    kernel=["triton", "dequantize", "scaled_mm"],
)
def test_every_kind_of_group_by_every_kernel(name, spec, kernel):
    if kernel == "scaled_mm" and spec.per_row and not takes_row_scales():
        pytest.skip("torch's _scaled_mm takes no row scales on CPU")
    actual = check_on_gpu(GROUPS[name](replace(spec, kernel=kernel)))
    assert actual["out_a"].is_contiguous()


@pytest.mark.parametrize("name", ["siblings, some frozen", "dropout"])
def test_by_inductors_templates(name):
    check_on_gpu(GROUPS[name](replace(TENSOR, kernel="inductor")))


def launched(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], int]]:
    """(outs, how many of them are O_A's) of each forward product."""
    found = []
    forward = dispatch.forward

    def seen(q, q_scale, pieces, a_pieces, *rest):
        found.append((tuple(len(piece.weight) for piece in pieces), a_pieces))
        return forward(q, q_scale, pieces, a_pieces, *rest)

    monkeypatch.setattr(dispatch, "forward", seen)
    gpu.merged_linear(case.arguments())
    return found


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("one adapter", [((16,), 1), ((48,), 0)]),
        ("a frozen layer", [((48,), 0)]),
        ("siblings, some frozen", [((16, 8), 2), ((48, 16), 0), ((32, 64), 0)]),
        ("several adapters", [((16, 8, 5, 16, 16, 3), 6), ((48, 32, 16), 0)]),
        ("dropout", [((16,), 1), ((8,), 1), ((16,), 1), ((48,), 0)]),
        ("b absent", [((48, 32, 16, 8), 2)]),
    ],
)
def test_siblings_share_their_launches(name, wanted, monkeypatch):
    """All O_A that read x in one, all O that add an adapter in one, all other O in one."""
    assert launched(GROUPS[name](ROW), monkeypatch) == wanted


def test_adapters_of_a_layer_need_not_stand_side_by_side():
    """Their order is that of ``owner``."""
    case = group(ROW, (48, (16, 8)), (32, (5,)))
    names = ("a", "a_scale", "b", "alpha", "lora_a", "lora_b", "adapter_x", "owner", "scaling")
    x, weight, scale, bias, *columns, keep_x, out_dtype, spec_text = case.arguments()
    by_name = dict(zip(names, columns, strict=True))
    turned = [2, 1, 0]
    moved: Any = [[column[j] for j in turned] if column else column for column in by_name.values()]
    given: list[Any] = [x, weight, scale, bias, *moved, keep_x, out_dtype, spec_text]
    first, second, out_a, *_ = gpu.merged_linear(Merged(*given))
    wanted = gpu.merged_linear(case.arguments())
    of_a = wanted[2].split([16, 8, 5], dim=1)
    assert torch.equal(out_a, torch.cat([of_a[j] for j in turned], dim=1))
    assert torch.equal(second, wanted[1])
    expected(case)["y 0"].assert_holds(first)  # whose terms are added in another order


@pytest.mark.parametrize("spec", [ROW, TENSOR], ids=["row", "tensor"])
@pytest.mark.parametrize("name", ["one adapter", "dropout"])
def test_x_is_kept_in_fp8_where_a_trains_and_not_at_all_where_it_is_frozen(name, spec):
    case = GROUPS[name](spec)
    *_, out_a = gpu.merged_linear(replace(case, keep_x=False).arguments())
    assert out_a.shape[1] == sum(len(lora.lora_a) for lora in case.adapters)
    kept = gpu.merged_linear(case.arguments())[2:]
    read = [case.x if lora.x is None else lora.x for lora in case.adapters]
    read = read if case.apart else [case.x]
    assert len(kept) == 2 * len(read)
    for x, code, scale in zip(read, kept[::2], kept[1::2], strict=True):
        assert (code.dtype, scale.dtype) == (E4M3, F32)
        assert scale.shape == ((32, 1) if spec.per_row else ())
        assert torch.equal(code.double() * scale.double(), hat(x, E4M3, spec).value)


@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("name", ["siblings, some frozen", "dropout", "b absent"])
def test_no_tokens(name, kernel):
    case = GROUPS[name](replace(ROW, kernel=kernel))
    case.x = case.x.new_empty(2, 0, 64)
    for each in case.layers:
        each.grad = each.grad.new_empty(2, 0, len(each.weight))
    for lora in case.adapters:
        lora.x = None if lora.x is None else case.x.clone()
    with as_on_a_gpu():
        actual = run(case)
    assert actual["y 0"].shape == (2, 0, 48)
    assert actual["x"].shape == (2, 0, 64)
    gradients = [actual[n] for n in actual if re.fullmatch(r"[ab] \d", n)]
    assert len(gradients) == 2 * len(case.adapters)
    assert not any(grad.any() for grad in gradients)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("kernel", ["triton", "dequantize"])
def test_autocast_changes_nothing_inside_of_the_op(kernel, dtype):
    case = group(replace(ROW, kernel=kernel), (48, (16,)), (32, ()), out_dtype=F32)
    for each in case.layers:
        each.grad = each.grad.float()
    with as_on_a_gpu():
        wanted = run(case)
        with torch.autocast("cpu", dtype):
            for name, actual in run(case).items():
                assert torch.equal(actual, wanted[name]), name


# -- the ops as the compiler sees them -------------------------------------------------------------


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize("name", [name for name in GROUPS if name != "ranks beyond the kernels'"])
@pytest.mark.parametrize("spec", [ROW, TENSOR], ids=["row", "tensor"])
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
    for one, two, three in zip(fake, lowered, real, strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype) == (three.shape, three.dtype)


def test_fake_results_of_the_products_look_like_the_real_ones():
    case = group(ROW, (48, (16,)), (32, (8,)))
    spec_text, x = str(case.spec), case.x
    q, q_scale = gpu.quantize(x, E4M3, spec_text)
    _, weight, scale, _, a, a_scale, b, *_ = case.arguments()
    weight = [w.view(E4M3) for w in weight]

    def opcheck(op, args):  # the other checks multiply operands, and torch can't multiply FP8
        torch.library.opcheck(op, args, test_utils=("test_faketensor",))

    (code, *_), (s, *_) = a, a_scale
    out_a = randn(32, 24).bfloat16()
    opcheck(falqon.adapter_product, (q, q_scale, code, s, torch.float16, spec_text))
    for factors, of_a in ((b, []), (b, [out_a]), ([], []), ([], [out_a])):
        parts = (a, a_scale, factors, of_a, [0, 1])
        opcheck(falqon.merged_product, (q, q_scale, weight, scale, [], *parts, BF16, spec_text))
    nothing: Any = [[]] * 6
    opcheck(falqon.merged_product, (q, q_scale, weight, scale, *nothing, torch.float16, spec_text))
    grads = [gpu.quantize(randn(32, n), E5M2, spec_text) for n in (48, 32)]
    for d, codes, of_a in (([randn(32, 24)], a, a_scale), ([randn(32, 24)], a, []), ([], [], [])):
        g, scales = [g for g, _ in grads], [s for _, s in grads]
        opcheck(falqon.grad_x_product, (g, scales, weight, d, codes, of_a, F32, spec_text))
    opcheck(
        falqon.grad_out_a, ([randn(32, 48), randn(32, 32)], [randn(48, 8), randn(32, 4)], spec_text)
    )
    grads_of, ranks, d = [randn(32, 48), randn(32, 32)], [16, 8], [randn(32, 24)]
    for kept, of_d in (([q, q_scale], d), ([], [])):
        rest = (randn(32, 24), ranks, [0.5, 1.0], kept, of_d, BF16, spec_text)
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


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize(
    ("name", "forward"),
    [("siblings, some frozen", 3), ("several adapters", 2), ("b absent", 1)],
)
def test_on_a_gpu_the_ops_are_lowered_to_launches(name, forward):
    """O_A, O of the sites with adapters, O of the others; in backward one dL/dx of the group behind
    the transposes of its weights, which an H100 wants the other way round.
    """
    case, table = GROUPS[name](ROW), decompositions()
    _, *arguments = case.arguments()
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        columns: list[Any] = [
            [empty(*t.shape, dtype=t.dtype) for t in column] if isinstance(column, list) else column
            for column in arguments[:9]
        ]
        op = table[falqon.merged_linear.default]
        x = empty(32, 64, dtype=BF16)
        found = traced(lambda *args: op(*args), x, *columns, *arguments[9:])
        assert found[LAUNCH] == forward
        assert not {
            name for name in found if name.startswith("falqon.") or name == "aten.mm.default"
        }

        weight, scale, _, a, a_scale, *_ = columns
        grads = [empty(32, len(w), dtype=BF16) for w in weight]
        d = [empty(32, sum(len(code) for code in a), dtype=BF16)] if case.adds_b else []
        given_a = (a, a_scale) if case.adds_b else ([], [])
        op_x = table[falqon.merged_linear_grad_x.default]
        rest = (weight, scale, d, *given_a, BF16, str(case.spec))
        found = traced(lambda *args: op_x(*args), grads, *rest)
        assert found[LAUNCH] == 2
        assert not {
            name for name in found if name.startswith("falqon.") or name == "aten.mm.default"
        }


def in_a_graph(function: Callable[..., Any], *args: Any) -> tuple[Counter[str], Any]:
    """The ops in the graph that is traced for these sizes, and what it computes."""
    graph = make_fx(function, tracing_mode="fake")(*args)
    found = Counter(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
    return found, graph(*args)


@each_value(name=list(GROUPS), spec={"row": ROW, "tensor": TENSOR})
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
    rest = (weight, scale, *given_a, BF16, str(case.spec))
    check_graph(falqon.merged_linear_grad_x.default, grads, *rest)
    if a:
        ranks = [len(code) for code in a]
        q, q_scale = gpu.quantize(x.reshape(32, 64), E4M3, str(spec))
        of = [grads[i] for i in arguments[10]]
        given = (of, randn(32, sum(ranks)).bfloat16(), ranks, [0.5] * len(a), [q, q_scale], d)
        check_graph(falqon.adapter_grads.default, *given, F32, str(case.spec))
        factors = [randn(g.shape[1], rank).bfloat16() for g, rank in zip(of, ranks, strict=True)]
        check_graph(falqon.grad_out_a.default, of, factors, str(case.spec))
        loras = [[lora.lora_a for lora in case.adapters], [lora.lora_b for lora in case.adapters]]
        numbers: Any = ([0.5] * len(a), [], False, str(case.spec))
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
