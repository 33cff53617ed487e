"""W in NVFP4 on a GPU: interpreted against float64 and a CPU, and compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx.kernels.aot import ARCHITECTURES
from falqon_fx.kernels.gemm.examples import PACKED
from falqon_fx.kernels.gemm.launch import Piece, Product, gemm
from falqon_fx.kernels.matrix import compile_lines, instruction_problems, problems
from falqon_fx.site import nvfp4
from falqon_fx.site.numerics import E4M3, FP8_DTYPES
from falqon_fx.site.spec import SiteSpec
from tests.cuda import GROUPS, INTERPRETED, as_on_a_gpu, group
from tests.emulation import codes_of
from tests.lowered import check, expected, run
from tests.parameters import each_value
from tests.sites import randn
from tests.strategies import SEEDS
from tests.tolerances import Approx

pytestmark = INTERPRETED

BF16, F32 = torch.bfloat16, torch.float32
SPEC = SiteSpec("row", "pow2", "e5m2", base="nvfp4")
SMALL = replace(PACKED, operands="float32", block_m=16, block_n=16, block_k=64, group_m=2)


def fp8(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Of all magnitudes."""
    numbers = torch.Generator().manual_seed(seed)
    size = torch.randint(-9, 4, (rows, columns), generator=numbers).float().exp2()
    return (randn(rows, columns, seed=seed) * size).to(dtype)


def packed(out: int, features: int, seed: int) -> Tensor:
    """All codes, -0 among them, and all block scales, zero and those below 2**-6 among them."""
    numbers = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (out, features // 2), generator=numbers)
    scales = torch.randint(0, 127, (out, features // 16), generator=numbers)
    scales[:, ::3] %= 9
    return nvfp4.joined(codes.to(torch.uint8), scales.to(torch.uint8))


# -- the kernel ------------------------------------------------------------------------------------


@given(
    layout=st.sampled_from(["nk", "kn"]),
    x=st.sampled_from(["e4m3", "e5m2"]),
    n=st.sampled_from([1, 15, 17, 40]),
    outs=st.lists(st.sampled_from([1, 7, 16, 33, 64]), min_size=1, max_size=3),
    features=st.sampled_from([64, 128, 192]),
    rank=st.sampled_from([0, 0, 5, 16]),
    biased=st.booleans(),
    power=st.sampled_from([-60, 0, 60]),
    out_dtype=st.sampled_from([F32, BF16]),
    seed=SEEDS,
)
def test_within_the_bound_of_float64(
    layout, x, n, outs, features, rank, biased, power, out_dtype, seed
):
    """What is multiplied is exact: only float32 sums, scales and the store round."""
    nk, seed = layout == "nk", seed % 2**31
    outs = outs if nk else [64 * out for out in range(1, len(outs) + 1)]
    weights = [packed(out, features, seed + i) for i, out in enumerate(outs)]
    sizes = outs if nk else [features]  # of the results
    tall = [features] if nk else outs  # of what is summed
    q = [fp8(n, k, FP8_DTYPES[x], seed + 10 + i) for i, k in enumerate(tall)]
    q[0][0] = 0
    q_scale = [(randn(n, 1, seed=seed + 20 + i).abs() + 0.01) for i in range(len(q))]
    scale = [torch.tensor(1.37 * 2.0**power), *[torch.tensor(0.3)] * len(outs)]
    bias = [randn(size, seed=seed + 30) if biased and nk else None for size in sizes]
    left, right = ([randn(m, rank, seed=seed + 40).bfloat16() for m in s] for s in ([n], sizes))
    pieces = [
        Piece(
            weight,
            scale[i] if nk else None,
            bias[i],
            left[0] if rank else None,
            right[i] if rank else None,
        )
        for i, weight in enumerate(weights if nk else weights[:1])
    ]
    spec = replace(
        SMALL, layout=layout, x=x, w_scale="tensor" if nk else "none", pieces=len(pieces),
        bias="float32" if biased and nk else "none", extra=16 if rank else 0,
        out_dtype=str(out_dtype).removeprefix("torch."), block_n=16 if nk else 64,
        k_pieces=1 if nk else len(outs),
    )  # fmt: skip
    more = [] if nk else [*map(Product, q[1:], q_scale[1:], weights[1:])]
    actual = gemm(q[0], q_scale[0], pieces, spec, more)
    values = [Approx.exact(codes_of(weight).double()) for weight in weights]
    for i, (piece, y) in enumerate(zip(pieces, actual, strict=True)):
        wanted = Approx.exact(torch.zeros(n, sizes[i]))
        for s, (x_hat, of_x) in enumerate(zip(q, q_scale, strict=True)):
            w = values[i].t() if nk else values[s]
            product = (Approx.exact(x_hat.double()) @ w).rounded(F32) * Approx.exact(of_x)
            wanted = (wanted + product.rounded(F32)).rounded(F32)
        if piece.scale is not None:
            wanted = (wanted * Approx.exact(piece.scale)).rounded(F32)
        if rank:
            wanted = wanted.addmm(Approx.exact(left[0]), Approx.exact(right[i]).t(), F32)
        if piece.bias is not None:
            wanted = (wanted + Approx.exact(piece.bias)).rounded(F32)
        wanted.rounded(out_dtype).assert_holds(y)


def test_each_code_with_each_block_scale_is_exact():
    """16 codes and 127 scales, picked by the unit matrix one at a time. NaN, with which no scale
    is cast, stays NaN.
    """
    codes = torch.tensor([16 * (2 * i + 1) + 2 * i for i in range(8)], dtype=torch.uint8)
    scales = torch.arange(128, dtype=torch.uint8).clamp(max=126).unsqueeze(1)
    weight = nvfp4.joined(codes.repeat(128, 4), scales.repeat(1, 4))
    wanted, spec = codes_of(weight), replace(SMALL, out_dtype="float32")
    assert not torch.equal(wanted[126], wanted[125])
    pick = torch.eye(128).to(E4M3)
    (y,) = gemm(pick[:64, :64], torch.ones(64, 1), [Piece(weight, torch.tensor(1.0))], spec)
    torch.testing.assert_close(y, wanted.t() + 0.0, rtol=0, atol=0)
    spec = replace(spec, layout="kn", w_scale="none", block_n=64)
    (y,) = gemm(pick, torch.ones(128, 1), [Piece(weight, None)], spec)
    torch.testing.assert_close(y, wanted + 0.0, rtol=0, atol=0)
    weight[127, 8, 3] = 127
    (y,) = gemm(pick, torch.ones(128, 1), [Piece(weight, None)], spec)
    assert y[:, 48:].isnan().all()
    torch.testing.assert_close(y[:, :48], wanted[:, :48] + 0.0, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_compiles_to_products_of_halves(architecture):
    spec = replace(PACKED, operands="float16")
    ((line, compiled),) = compile_lines(spec, architecture)
    assert "f16" in line.matrix_instructions
    assert not problems(spec, line) + instruction_problems(spec, line, compiled)


# -- the ops ---------------------------------------------------------------------------------------

WHOLE = {
    "one adapter": lambda spec: group(spec, (64, (16,))),
    "siblings, some frozen": lambda spec: group(spec, (64, (16,)), (128, ()), (64, (8,))),
    "several adapters": lambda spec: group(spec, (64, (16, 8)), (128, (5,))),
    "a large rank": lambda spec: group(spec, (64, (300,))),
    "b absent": lambda spec: group(spec, (64, (16,)), (128, (8,)), adds_b=False),
}


@each_value(
    name=list(WHOLE), scale=["pow2", "amax"], granularity=["row", "tensor"], grad=["e5m2", "e4m3"]
)
def test_kernels_compute_what_the_ops_should(name, scale, granularity, grad):
    spec = replace(SPEC, kernel="triton", scale=scale, granularity=granularity, grad=grad)
    case = WHOLE[name](spec)
    wanted = expected(case, steps=True)
    with as_on_a_gpu():
        check(case, wanted)


@each_value(
    name=[name for name in GROUPS if name != "sizes of no multiple of 16"],
    kernel=["dequantize", "auto"], scale=["pow2", "amax"], granularity=["row", "tensor"],
)  # fmt: skip
def test_every_kind_of_group_by_decoded_weights(name, kernel, scale, granularity):
    case = GROUPS[name](replace(SPEC, kernel=kernel, scale=scale, granularity=granularity))
    wanted = expected(case, steps=True)
    with as_on_a_gpu():
        check(case, wanted)


def test_what_no_kernel_takes_says_why():
    """Rows of 48 weights, whose fours of scales are not whole."""
    case = group(replace(SPEC, kernel="triton"), (64, ()), features=48)
    with as_on_a_gpu(), pytest.raises(ValueError, match="no kernel"):
        run(case)
