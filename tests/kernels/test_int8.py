"""Products of integers on a GPU: interpreted against a CPU, and compiled for GPUs without FP8."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from falqon_fx.kernels.aot import compile_ahead
from falqon_fx.kernels.gemm.examples import INT8_PROBLEMS
from falqon_fx.kernels.gemm.launch import Piece, gemm, signatures
from falqon_fx.kernels.gemm.tiles import gemm_specs
from falqon_fx.kernels.loader import load
from falqon_fx.ops import gpu, lowering
from falqon_fx.site.spec import SiteSpec
from tests.cuda import GROUPS, INTERPRETED, as_on_a_gpu
from tests.lowered import check, expected, run
from tests.parameters import each_value
from tests.sites import randn
from tests.strategies import SEEDS, cases

pytestmark = INTERPRETED

BF16, F32 = torch.bfloat16, torch.float32
SPEC = SiteSpec("row", "pow2", "e5m2", base="int8")
DTYPES = {"float32": F32, "bfloat16": BF16}


@given(
    n=st.integers(1, 40),
    out=st.integers(1, 70),
    features=st.sampled_from([1, 33, 64, 2000]),
    dtype=st.sampled_from(sorted(DTYPES)),
    granularity=st.sampled_from(["row", "tensor"]),
    biased=st.booleans(),
    spread=st.sampled_from([1.0, 0.01]),
    seed=SEEDS,
)
def test_o_is_that_of_a_cpu_bit_for_bit(n, out, features, dtype, granularity, biased, spread, seed):
    """Sums of any length: of 2,000 products of like numbers they are beyond what float32 holds
    exactly.
    """
    spec = replace(SPEC, granularity=granularity)
    x = lowering.cast_int8(randn(n, features, seed=seed) * spread + 0.9 * (1 - spread), spec)
    w = lowering.cast_int8(randn(out, features, seed=seed + 1) * spread + 0.9 * (1 - spread), spec)
    bias = randn(out, seed=seed + 2) if biased else None
    sums = (x.value.double() @ w.value.double().t()).to(torch.int32)  # on a CPU with VNNI
    wanted = lowering.rescale(sums, x.scale, w.scale, F32)
    wanted = (wanted if bias is None else wanted + bias).to(DTYPES[dtype])
    problem = replace(
        INT8_PROBLEMS[0], n=n, k=features, rows=(out,), x_scale=granularity, w_scale=granularity
    )
    problem = replace(problem, out_dtype=dtype, bias="none" if bias is None else "float32")
    (kernel,) = gemm_specs(problem, 0)
    (y,) = gemm(x.value, x.scale, [Piece(w.value, w.scale, bias)], kernel)
    assert torch.equal(y, wanted)


@each_value(
    name=list(GROUPS), kernel=["triton", "dequantize", "auto"], scale=["pow2", "amax"],
    granularity=["row", "tensor"],
)  # fmt: skip
def test_every_kind_of_group_by_every_kernel(name, kernel, scale, granularity):
    case = GROUPS[name](replace(SPEC, kernel=kernel, scale=scale, granularity=granularity))
    wanted = expected(case, steps=True)
    with as_on_a_gpu():
        check(case, wanted)


@given(cases(("int8",)))
def test_with_what_a_calibration_makes_results_equal_float64_on_the_same_operands(case):
    assume(case.out_dtype != torch.float16)  # whose dL/dx the library rounds to it, see below
    wanted = expected(case, steps=True)
    with as_on_a_gpu():
        check(case, wanted)


def test_gradients_are_those_of_a_cpu_bit_for_bit():
    """All but dL/dA and dL/dB, which kernels of other products make."""
    case = GROUPS["siblings, some frozen"](SPEC)
    wanted = run(case)
    with as_on_a_gpu():
        actual = run(case)
    for name in ("out_a", "x"):
        assert torch.equal(actual[name], wanted[name]), name


def test_in_float16_the_scales_stay_with_the_integers():
    """A gradient of 2**-14 times a scale of 2**-20 would be none in float16. The library rounds the
    sum of four products: by 2**-10 of its terms in float16, by half of 2**-24 where that is more.
    """
    code = torch.randint(-127, 128, (4, 8), dtype=torch.int8)
    grad, scale = torch.full((3, 4), 2.0**-14).half(), torch.full((4, 1), 2.0**-3)
    found = gpu.merged_linear_grad_x(
        [grad], [code], [scale], [], [], [], [], torch.float16, str(SPEC)
    )
    wanted = grad.double() @ (code.double() * 2.0**-3)
    gauge = grad.double() @ (code.double().abs() * 2.0**-3)
    assert found.dtype == torch.float16
    assert ((found.double() - wanted).abs() <= 2.0**-10 * gauge + 2.0**-25).all()


@pytest.mark.parametrize("architecture", [80, 86])
def test_it_compiles_to_integer_instructions(architecture):
    for problem in INT8_PROBLEMS[:2]:
        spec, *_ = gemm_specs(problem, architecture)
        types = signatures(spec)["gemm"]
        kernel = load(spec, interpret=False).gemm
        made = compile_ahead(kernel, types, architecture, spec.num_warps, spec.num_stages)
        assert re.search(r"mma\.sync\S*s32\.s8\.s8\.s32", made.ptx)
        assert made.stack_bytes == 0
