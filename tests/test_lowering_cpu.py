"""The casts of a CPU, compiled and by ATen, and CPUs without bfloat16."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from falqon_fx import rewrite
from falqon_fx.kernels.cpu import casts as cpu_casts
from falqon_fx.kernels.cpu import integers
from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.ops import lowering
from falqon_fx.site import spec as site_spec
from falqon_fx.site.numerics import E4M3, E5M2
from falqon_fx.site.spec import SiteSpec
from tests.lowered import BF16, F32, falqon, gemm_dtype, run
from tests.models import LoraLinear, Traceable
from tests.sites import randn
from tests.strategies import cases

T = TypeVar("T")


# -- compiled casts --------------------------------------------------------------------------------


def by_aten(run: Callable[[], T]) -> T:
    """As where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (cpu, cpu_casts, integers):
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


@given(matrices(), st.sampled_from(["pow2", "amax"]), st.sampled_from([None, 0.0, 0.3, 1.0]))
def test_compiled_casts_to_int8_equal_those_of_aten(x, scale, share):
    """Integers and scales; of a row with NaN or Inf nothing but NaN is left. With zeros in a
    ``share`` of the channels, as if x had them.
    """
    spec = SiteSpec("row", scale, "e5m2", base="int8")
    generator = torch.Generator().manual_seed(5)
    apart = None if share is None else torch.rand(x.shape[1], generator=generator) < share
    compiled, aten = (
        lowering.cast_int8(x, spec, apart),
        by_aten(lambda: lowering.cast_int8(x, spec, apart)),
    )
    if apart is not None:
        rest = lowering.cast_int8(x.masked_fill(apart, 0.0), spec)
        assert same_bits(compiled.scale, rest.scale)
        assert torch.equal(compiled.value, rest.value)
    assert same_bits(compiled.scale, aten.scale)
    finite = compiled.scale.isfinite()
    assert torch.equal(compiled.value * finite, aten.value * finite)
    for cast in (compiled, aten):
        assert (cast.value * cast.scale).isnan().eq(~finite).all()


@given(
    st.integers(0, 9),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.sampled_from([F32, BF16]),
)
def test_compiled_scales_behind_integers_equal_those_of_aten(n, m, by_row, by_column, dtype):
    """One a row or one for all, on either side; of NaN and Inf too."""
    sums = torch.randint(-(2**31), 2**31, (n, m), dtype=torch.int64).to(torch.int32)
    rest = randn(n, 1).abs() if by_row else torch.tensor(0.3)
    scale = randn(m, 1, seed=1).abs() if by_column else torch.tensor(float("inf"))
    rest = rest.masked_fill(rest > 1.5, float("nan"))
    compiled = lowering.rescale(sums, rest, scale, dtype)
    assert compiled.dtype == dtype
    assert same_bits(compiled, by_aten(lambda: lowering.rescale(sums, rest, scale, dtype)))


@given(matrices(), st.booleans(), st.sampled_from([F32, BF16]))
def test_compiled_scales_of_columns_equal_those_of_aten(x, by_column, dtype):
    scale = randn(x.shape[1], 1, seed=3) if by_column else torch.tensor(0.3)
    wide = torch.zeros(len(x), x.shape[1] + 5, dtype=dtype)
    assert integers.scale_columns(x, scale.t() if scale.dim() else scale, wide[:, 5:])
    wanted = (x.float() * scale.reshape(1, -1)).to(dtype)
    assert same_bits(wide[:, 5:], wanted)
    assert not wide[:, :5].any()


def test_kept_codes_are_of_the_dtype_that_was_asked_for():
    x = randn(5, 24, seed=2)
    for fp8 in (E4M3, E5M2):
        cast = lowering.cast_fp8(x, fp8, SiteSpec("row", "pow2", "e5m2"), F32, keep=True)
        assert cast.code is not None
        assert cast.code.dtype == fp8
        assert torch.equal(cast.code.float() * cast.scale, cast.value)


@given(cases(("int8",)))
def test_integers_on_a_cpu_that_has_no_exact_sums_of_them(case):
    """Their products are in float32 then, where sums of so few are exact: the same bits."""
    expected = run(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "exact", lambda: False)
        for name, actual in run(case).items():
            assert torch.equal(actual, expected[name]), name


def test_a_cpu_without_vnni_is_not_given_products_of_integers(monkeypatch):
    """Torch has them, thirty times as slow as those of float32."""
    monkeypatch.setattr(integers, "native_int8", lambda: False)
    assert not integers.exact.__wrapped__()


def test_sums_of_integers_are_exact_whatever_their_sizes():
    for n, m, k in itertools.product((1, 2, 17), (1, 3, 16), (1, 2, 3, 64, 65)):
        left, right = (torch.randint(-128, 128, (size, k), dtype=torch.int8) for size in (n, m))
        wanted = left.double() @ right.double().t()
        assert torch.equal(lowering.multiplied(left, right).double(), wanted), (n, m, k)


@pytest.mark.slow
def test_a_cpu_without_vnni_is_noticed():
    """oneDNN obeys the variable, and clamps what it adds up as such a CPU would."""
    code = """
import torch
from falqon_fx.kernels.cpu import integers
from falqon_fx.ops.lowering import multiplied
left = torch.full((3, 64), 127, dtype=torch.int8)
assert not integers.exact()
assert (multiplied(left, left) == 64 * 127 * 127).all()
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


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
    assert update.args[7] == (dtype != BF16 or not native)
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
