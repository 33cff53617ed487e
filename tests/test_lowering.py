"""What the ops compute, against float64 on the same quantized operands and the layer itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from falqon_fx import rewrite
from falqon_fx.kernels.cpu import casts as cpu_casts
from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.ops import lowering
from falqon_fx.site import spec as site_spec
from falqon_fx.site.numerics import E4M3, E5M2
from falqon_fx.site.spec import SiteSpec
from tests.emulation import cast
from tests.models import LoraLinear, Traceable
from tests.sites import randn
from tests.strategies import Case, Lora, cases
from tests.tolerances import Approx, fp8_cast_bound, rounded_bound, side_by_side

F32, BF16 = torch.float32, torch.bfloat16
falqon = torch.ops.falqon
T = TypeVar("T")


def run(case: Case) -> dict[str, Tensor]:
    """The op's results and the gradients of all that it differentiates, by name."""
    leaves = case.leaves()
    *ys, out_a = falqon.merged_linear(*case.arguments())[: len(case.layers) + 1]
    for layer, y in zip(case.layers, ys, strict=True):
        assert (y.shape, y.dtype) == (layer.grad.shape, case.out_dtype)
    pairs = [(y, layer.grad) for y, layer in zip(ys, case.layers) if layer.reached]
    grads = torch.autograd.grad(
        [y for y, _ in pairs], [*leaves.values()], [g for _, g in pairs], allow_unused=True
    )
    results = {f"y {i}": y.detach() for i, y in enumerate(ys)} | {"out_a": out_a}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        if grad is not None:
            assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
            results[name] = grad
    return results


def gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products return; on a CPU that multiplies bfloat16."""
    return BF16 if dtype == BF16 else F32


def hat(x: Tensor, dtype: torch.dtype, spec: SiteSpec) -> Approx:
    """x [n, k] as it is multiplied: after its cast to FP8, exactly."""
    codes, scale = cast(x.float(), dtype, spec.per_row, spec.scale == "pow2")
    return Approx.exact(codes.double() * scale.double())


def decoded(code: Tensor, scale: Tensor) -> Approx:
    """What FP8 numbers stand for, exactly."""
    return Approx.exact(code.view(E4M3).float().double() * scale.double())


@dataclass
class Operands:
    """What the op multiplies on behalf of an adapter, exactly, and its O_A as computed."""

    lora: Lora
    read: Approx  # x, or the dropped x, after its cast
    a: Approx
    b: Approx  # scaling · B in the dtype of the products
    out_a: Approx


def operands(case: Case, dtype: torch.dtype) -> list[list[Operands]]:
    """Of the adapters of each layer; ``dtype``: what products return."""
    casts = iter(case.casts)
    found: list[list[Operands]] = []
    for layer in case.layers:
        found.append([])
        for lora in layer.adapters:
            code, scale, b = next(casts)
            x = case.x if lora.x is None else lora.x
            read, a = (
                hat(x.detach().reshape(-1, x.shape[-1]), E4M3, case.spec),
                decoded(code, scale),
            )
            out_a = (read @ a.t()).rounded(dtype, *behind(case.spec, dtype))
            factor = Approx.exact(b.to(dtype))
            if not case.adds_b:  # then dL/dA is made from B itself
                factor = (Approx.exact(lora.lora_b) * number(lora.scaling)).rounded(F32, dtype)
            found[-1].append(Operands(lora, read, a, factor, out_a))
    return found


def number(value: float) -> Approx:
    """A Python number that multiplies a float32 tensor."""
    return Approx.exact(torch.tensor(value, dtype=torch.float64)).rounded(F32)


def behind(spec: SiteSpec, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The roundings of a product with its scales. Those that are powers of two go into the operands
    exactly.
    """
    return () if spec.scale == "pow2" else (F32, F32, dtype)


def expected(
    case: Case, *, dtype: torch.dtype | None = None, steps: bool = False
) -> dict[str, Approx]:
    """Each result on the operands that the op really multiplies, and its roundings one by one.

    ``dtype``: what products return. ``steps``: dL/dx may be a buffer in it, which is rounded after
    each product that is added, instead of one product over all.
    """
    dtype = dtype or gemm_dtype(case.out_dtype)
    loras = operands(case, dtype)
    x_hat = hat(case.x.detach().reshape(-1, case.x.shape[-1]), E4M3, case.spec)
    wanted: dict[str, Approx] = {}
    for i, (layer, adapters) in enumerate(zip(case.layers, loras)):
        y = x_hat @ decoded(layer.base.code, layer.base.scale).t()
        y = y.rounded(dtype, *behind(case.spec, dtype))
        for lora in adapters if case.adds_b else []:
            y = y.addmm(lora.out_a, lora.b.t(), dtype)
        if layer.bias is not None:
            y = (y + Approx.exact(layer.bias).rounded(dtype)).rounded(dtype)
        wanted[f"y {i}"] = y.rounded(case.out_dtype)
    every = [lora.out_a for adapters in loras for lora in adapters]
    none = Approx.exact(torch.zeros(len(x_hat.value), 0))
    wanted["out_a"] = side_by_side(every, 1) if every else none
    return wanted | gradients(case, loras, dtype, steps)


def gradients(
    case: Case, loras: list[list[Operands]], dtype: torch.dtype, steps: bool
) -> dict[str, Approx]:
    """Those of the layers that are reached, by the names of `Case.leaves`."""
    spec, wanted = case.spec, {}
    pow2 = spec.scale == "pow2"
    products: list[tuple[Approx, Approx]] = []  # of W, each with scales of its own behind it
    joined: list[tuple[Approx, Approx]] = []  # added up in one product
    others: list[Approx] = []  # the parts of adapters that autograd adds to dL/dx
    j = -1
    for i, (layer, adapters) in enumerate(zip(case.layers, loras)):
        grad = layer.grad.reshape(-1, len(layer.base.code))
        exact, scale = Approx.exact(grad), layer.base.scale
        for lora in adapters:
            j += 1
            if not layer.reached:
                continue
            product = (exact.t() @ lora.out_a).rounded(dtype) * number(lora.lora.scaling)
            wanted[f"b {j}"] = product.rounded(F32, lora.lora.lora_b.dtype)
            d = (exact @ lora.b).rounded(dtype)
            # The scale of x goes into D, unless it is in x̂ exactly.
            of_a = d if pow2 else d.rounded(F32, dtype)
            wanted[f"a {j}"] = (of_a.t() @ lora.read).rounded(dtype, lora.lora.lora_a.dtype)
            code, a_scale, _ = case.casts[j]
            if case.apart and case.adds_b:
                x = case.x if lora.lora.x is None else lora.lora.x
                part = d @ (lora.a if pow2 else lora.a.rounded(F32, dtype))
                part = part.rounded(dtype, x.dtype)
                if lora.lora.x is None:
                    others.append(part)
                else:
                    wanted[f"x {j}"] = part
            elif case.adds_b:  # the scales of A go into D
                turned = Approx.exact(a_scale.t() if spec.per_row else a_scale)
                joined.append(((d * turned).rounded(F32, dtype), decoded(code, torch.ones(()))))
        if not layer.reached:
            continue
        if layer.bias is not None:
            total = Approx.exact(torch.ones(1, len(grad))) @ exact
            wanted[f"bias {i}"] = Approx(total.value[0], total.bound[0]).rounded(layer.bias.dtype)
        # The scales of W's rows go into dL/dO before its cast.
        wide = grad.float() * scale.t() if spec.per_row else grad.float()
        grad_hat = hat(wide, E5M2 if spec.grad == "e5m2" else E4M3, spec)
        w = decoded(layer.base.code, torch.ones(()) if spec.per_row else scale)
        (joined if pow2 else products).append((grad_hat, w))

    parts = [(left @ right).rounded(dtype, F32, F32) for left, right in products]
    if joined:
        lefts, rights = zip(*joined)
        parts.append((side_by_side(lefts, 1) @ side_by_side(rights, 0)).rounded(dtype))
    total = added(parts, F32)
    if steps:
        sizes = [left.largest @ right.largest for left, right in (*products, *joined)]
        size = torch.stack(sizes).sum(0)
        off = len(sizes) * rounded_bound(size, torch.zeros_like(size), dtype)
        total = Approx(total.value, total.bound + off)
    wanted["x"] = added([total.rounded(case.x.dtype), *others], case.x.dtype)
    return wanted


def added(parts: list[Approx], dtype: torch.dtype) -> Approx:
    """The sum, rounded after each step, in any order: no partial sum exceeds that of all sizes."""
    value = torch.stack([part.value for part in parts]).sum(0)
    bound = torch.stack([part.bound for part in parts]).sum(0)
    size = torch.stack([part.largest for part in parts]).sum(0)
    for _ in parts[1:]:
        bound = bound + (rounded_bound(size, bound, dtype) - bound)
    return Approx(value, bound)


def holds(wanted: Approx, actual: Tensor) -> None:
    shape = actual.shape
    Approx(wanted.value.reshape(shape), wanted.bound.reshape(shape)).assert_holds(actual)


def check(case: Case, wanted: dict[str, Approx]) -> dict[str, Tensor]:
    """All results of the op, among them the gradient of everything that it should reach."""
    actual = run(case)
    assert actual.keys() == wanted.keys() & {*case.leaves(), *actual}
    for name, result in actual.items():
        shape = result.shape
        of = wanted[name]
        Approx(of.value.reshape(shape), of.bound.reshape(shape)).assert_holds(result)
    return actual


@settings(max_examples=6 * settings.default.max_examples)
@given(cases())
def test_results_equal_float64_on_the_same_quantized_operands(case):
    check(case, expected(case))


@given(cases())
def test_results_equal_float64_where_the_cpu_multiplies_no_bfloat16(case):
    """Then products are in float32, and b comes in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "native_bf16", lambda: False)
        assert all(b.dtype == F32 for _, _, b in case.casts)
        assert check(case, expected(case, dtype=F32))["out_a"].dtype == F32


@given(cases(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_autocast_changes_nothing_inside_of_the_op(case, dtype):
    expected = run(case)
    with torch.autocast("cpu", dtype):
        del case.casts
        for name, actual in run(case).items():
            assert torch.equal(actual, expected[name]), name


@settings(max_examples=4 * settings.default.max_examples)
@given(cases())
def test_results_equal_the_original_layer_within_the_fp8_casts(case):
    """The layer is x·Wᵀ + Σ s·(x·Aᵀ)·Bᵀ + bias. Its operands differ from those of the op by their
    casts: x, A and W by one to E4M3, s·B by float32 and the dtype of the products, dL/dO by one to
    FP8 where it meets W. The rest is the arithmetic of the op.
    """
    spec, dtype, own = case.spec, gemm_dtype(case.out_dtype), expected(case)
    casts, wanted = iter(case.casts), {}

    def near(x: Tensor, scale: Tensor) -> Approx:
        return Approx(x.detach().double(), fp8_cast_bound(x.detach(), scale, E4M3))

    def read(x: Tensor) -> Approx:
        x = x.detach().reshape(-1, x.shape[-1])
        return near(x, cast(x.float(), E4M3, spec.per_row, spec.scale == "pow2")[1])

    x, grad_x, out_as, j = read(case.x), [], [], -1
    for i, layer in enumerate(case.layers):
        w, scale = near(layer.weight, layer.base.scale), layer.base.scale
        grad = layer.grad.reshape(-1, len(layer.weight))
        exact, y = Approx.exact(grad), x @ w.t()
        for lora in layer.adapters:
            j, (_, a_scale, _) = j + 1, next(casts)
            x_j = x if lora.x is None else read(lora.x)
            a = near(lora.lora_a, a_scale)
            b = (Approx.exact(lora.lora_b) * number(lora.scaling)).rounded(F32, dtype)
            out_a, d = x_j @ a.t(), exact @ b
            out_as.append(out_a)
            wanted[f"a {j}"] = d.t() @ x_j
            wanted[f"b {j}"] = (exact.t() @ out_a) * number(lora.scaling)
            if case.adds_b:
                y = y + out_a @ b.t()
                if lora.x is not None:
                    wanted[f"x {j}"] = d @ a
                elif layer.reached:
                    grad_x.append(d @ a)
        wanted[f"y {i}"] = y if layer.bias is None else y + Approx.exact(layer.bias)
        if layer.reached:
            # q(dL/dO · s_W) / s_W: an error of the cast in units of its own scale.
            wide, fp8 = grad.float(), E5M2 if spec.grad == "e5m2" else E4M3
            rows = scale.t() if spec.per_row else torch.ones(1, 1)
            _, g_scale = cast(wide * rows, fp8, spec.per_row, spec.scale == "pow2")
            off = fp8_cast_bound(wide * rows, g_scale, fp8) / rows.double()
            grad_x.append(Approx(grad.double(), off) @ w)
    wanted["x"] = added(grad_x, torch.float64)
    wanted["out_a"] = side_by_side(out_as, 1) if out_as else own["out_a"]
    for name, actual in run(case).items():
        if not name.startswith("bias"):
            bound = wanted[name].bound + own[name].bound
            value = wanted[name].value.reshape(actual.shape)
            Approx(value, bound.reshape(actual.shape)).assert_holds(actual)


# -- the casts of the adapters ---------------------------------------------------------------------


@given(cases())
def test_the_adapters_are_cast_as_by_torch(case):
    """Â and its scale bit for bit; b = s·B rounded in float32, then to the dtype asked for."""
    for lora, (code, scale, b) in zip(case.adapters, case.casts, strict=True):
        value = lora.lora_a.float()
        codes, wanted = cast(value, E4M3, case.spec.per_row, case.spec.scale == "pow2")
        assert (code.dtype, scale.dtype) == (E4M3, F32)
        assert torch.equal(code.float(), codes)
        assert torch.equal(scale, wanted)
        assert torch.equal(b, (lora.lora_b.float() * lora.scaling).to(b.dtype))


def test_the_adapters_of_a_graph_are_cast_together_and_apart_from_autograd():
    """In one op, whatever their shapes; gradients reach A and B through the products alone."""
    a = [randn(3, 8).requires_grad_(), randn(5, 6, seed=1).bfloat16().requires_grad_()]
    b = [randn(4, 3, seed=2).requires_grad_(), randn(7, 5, seed=3).requires_grad_()]
    spec = str(SiteSpec("row", "pow2", "e5m2"))
    casts = falqon.proxy_update(a, b, [2.0, 0.5], [], False, spec)
    assert [t.dtype for t in casts] == [E4M3, F32, BF16] * 2
    assert [tuple(t.shape) for t in casts] == [(3, 8), (3, 1), (4, 3), (5, 6), (5, 1), (7, 5)]
    assert not any(t.requires_grad for t in casts)
    first = falqon.proxy_update(a[:1], b[:1], [2.0], [], False, spec)
    second = falqon.proxy_update(a[1:], b[1:], [0.5], [], False, spec)
    alone = [*first, *second]
    assert all(torch.equal(s.float(), t.float()) for s, t in zip(casts, alone, strict=True))


# -- compiled casts --------------------------------------------------------------------------------


def by_aten(run: Callable[[], T]) -> T:
    """As where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (cpu, cpu_casts):
            patch.setattr(module, "library", lambda: None)
        return run()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN is NaN, whatever its payload; zeros have a sign."""
    nan = a.isnan()
    wide = [t.float().masked_fill(nan, 0.0).view(torch.int32) for t in (a, b)]
    return torch.equal(nan, b.isnan()) and torch.equal(*wide)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """[n, k] in float32 or bfloat16, rows from tiny to huge, some with NaN, Inf or nothing but
    zeros, some with gaps between rows.
    """
    n, k = draw(st.integers(0, 5)), draw(st.integers(1, 70))
    x = randn(n, k + 3, seed=draw(st.integers(0, 1000)))
    for row in range(n):
        x[row] *= 2.0 ** draw(st.sampled_from([0, 0, -130, -100, 60, 100]))
        special = draw(st.sampled_from([None, None, None, 0.0, float("nan"), float("-inf")]))
        if special == 0.0:
            x[row] = -0.0
        elif special is not None:
            x[row, draw(st.integers(0, k - 1))] = special
    x = x[:, :k] if draw(st.booleans()) else x[:, :k].contiguous()
    return x.to(draw(st.sampled_from([F32, BF16])))


@settings(max_examples=4 * settings.default.max_examples)
@given(matrices(), st.sampled_from([E4M3, E5M2]), st.booleans(), st.sampled_from([F32, BF16]))
def test_compiled_casts_equal_those_of_aten(x, fp8, turned, dtype):
    """Bit for bit: scales, values in the dtype of the products, and the codes that are kept."""
    keep = fp8 == E4M3
    columns = randn(1, x.shape[1], seed=3).abs() if turned else None
    spec = SiteSpec("row", "pow2", "e5m2")

    def run() -> lowering.Cast:
        wide = torch.zeros(len(x), x.shape[1] + 5, dtype=dtype)
        return lowering.cast_fp8(x, fp8, spec, dtype, columns=columns, keep=keep, to=wide[:, 5:])

    compiled, aten = run(), by_aten(run)
    assert same_bits(compiled.scale, aten.scale)
    assert same_bits(compiled.value, aten.value)
    if keep:  # beside an Inf the codes may differ, what they stand for is NaN
        whole, other = (cast.code.float() * cast.scale for cast in (compiled, aten))
        assert same_bits(whole, other)
        for scale in (compiled.scale, torch.tensor(0.3), 1.0):
            decode = functools.partial(lowering.decode, compiled.code, scale, dtype)
            assert same_bits(decode(), by_aten(decode))


# -- other CPUs ------------------------------------------------------------------------------------


def test_the_version_of_the_lowering_tells_cpus_apart(monkeypatch):
    """It keys disk caches, which may be shared by machines."""
    versions = []
    for native in (True, False):
        monkeypatch.setattr(site_spec, "native_bf16", lambda native=native: native)
        site_spec.lowering_version.cache_clear()
        versions.append(site_spec.lowering_version())
    site_spec.lowering_version.cache_clear()
    assert versions[0] != versions[1]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_the_adapters_of_a_graph_are_cast_to_what_the_cpu_multiplies(dtype, native, monkeypatch):
    """The plan decides, from the dtype of the layer's result."""
    monkeypatch.setattr(lowering, "native_bf16", lambda: native)
    model = LoraLinear(64, 32, dtype=dtype).to(dtype)
    graph = fx.symbolic_trace(Traceable(model))
    x = randn(3, 64).to(dtype)
    result = rewrite(graph, [x])
    (update,) = result.gm.graph.find_nodes(op="call_function", target=falqon.proxy_update.default)
    assert update.args[4] == (dtype != BF16 or not native)
    y = result(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert model.lora_A.weight.grad.dtype == dtype


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_products_are_in_what_the_cpu_multiplies(dtype, native, monkeypatch):
    monkeypatch.setattr(lowering, "native_bf16", lambda: native)
    cpu, gpu = (lowering.gemm_dtype(dtype, torch.device(name)) for name in ("cpu", "cuda"))
    assert gpu == gemm_dtype(dtype)
    assert cpu == (F32 if not native else gpu)
