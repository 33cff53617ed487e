"""init="svd" and init="keep": the randomized SVD, and what becomes of lora_A."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx import FalqonConfig
from falqon_fx.ops.lowering import proxy_update
from falqon_fx.site.numerics import E4M3, amax_to_scale, round_to_fp8
from falqon_fx.site.spec import SiteSpec
from falqon_fx.site.svd import init_where_new, low_rank_rows
from tests.sites import dequantized, randn, site_of
from tests.tolerances import UNIT_ROUNDOFF, fp8_cast_bound, gamma

GRANULARITY = pytest.mark.parametrize("granularity", ["tensor", "row"])
SCALE = pytest.mark.parametrize("scale", ["amax", "pow2"])


def fp8_error(base: Tensor, granularity: str, scale: str) -> Tensor:
    amax = base.abs().amax(1, keepdim=True) if granularity == "row" else base.abs().amax()
    s = amax_to_scale(amax, E4M3, scale)
    return base - round_to_fp8(base * s.reciprocal(), E4M3) * s


def captured(error: Tensor, rows: Tensor) -> Tensor:
    """‖E·P‖² with P the projection onto the rows."""
    q, r = torch.linalg.qr(rows.double().t())
    basis = q[:, r.diagonal().abs() > 0]
    return (error.double() @ basis).square().sum()


@given(
    out=st.integers(8, 128),
    features=st.integers(8, 128),
    rank=st.sampled_from([1, 2, 4, 8, 16, 64]),
    granularity=st.sampled_from(["tensor", "row"]),
    equal_rows=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_randomized_svd_captures_nearly_what_the_full_one_does(
    out, features, rank, granularity, equal_rows, seed
):
    """At least 0.95 of the energy of the best rows of that rank.

    The error of a weight whose rows are all of one size is white noise: the flattest spectrum, and
    the hardest case.
    """
    base = randn(out, features, seed=seed)
    if not equal_rows:
        base = base * randn(out, 1, seed=seed + 1).exp()
    error = fp8_error(base, granularity, "amax")
    rows = low_rank_rows(error, rank, seed)
    assert rows.shape == (rank, features)
    best = torch.linalg.svdvals(error.double())[:rank].square().sum()
    assert captured(error, rows) >= 0.95 * best


@GRANULARITY
def test_white_noise_needs_the_krylov_blocks(granularity):
    """The first block alone captures 0.28 to 0.46 here, three blocks 0.74 to 0.89."""
    error = fp8_error(randn(640, 640), granularity, "amax")
    energy = torch.linalg.svdvals(error.double()).square()
    for rank in (4, 16, 64):
        best = energy[:rank].sum()
        assert captured(error, low_rank_rows(error, rank, seed=0)) >= 0.95 * best, rank


@pytest.mark.parametrize(("out", "features"), [(96, 64), (64, 96), (300, 400), (1, 9), (9, 1)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_an_error_of_low_rank_is_found_exactly(out, features, rank):
    """rowsᵀ·rows = V·S·Vᵀ = (EᵀE)^½, whatever the signs of singular vectors.

    QR, products and SVD are backward stable: together they act on E + D with ‖D‖_F at most
    gamma(12 · stages · max(out, in)) ‖E‖_F (Higham, theorem 19.4, a modest constant for each of the
    12 stages at the least), and ‖|E + D| - |E|‖_F <= √2 ‖D‖_F (Araki and Yamagami).
    """
    error = randn(out, rank, seed=1) @ randn(rank, features, seed=2) / 7
    rows = low_rank_rows(error, rank, seed=0).double()
    _, sigma, right = torch.linalg.svd(error.double(), full_matrices=False)
    expected = right.t() @ (sigma[:, None] * right)
    off = (rows.t() @ rows - expected).norm()
    assert off <= 2**0.5 * gamma(12 * 12 * max(out, features)) * error.double().norm()


def test_a_rank_above_the_size_is_filled_with_zeros():
    rows = low_rank_rows(randn(5, 12), 64, seed=0)
    assert rows.shape == (64, 12)
    assert not rows[5:].any()
    assert rows[:5].any(1).all()


def test_the_svd_depends_on_its_seed_alone():
    error = randn(200, 250)
    torch.manual_seed(1)
    first = low_rank_rows(error, 4, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, low_rank_rows(error, 4, seed=3))
    assert not torch.equal(first, low_rank_rows(error, 4, seed=4))


@GRANULARITY
@pytest.mark.parametrize("init", ["svd", "keep"])
def test_the_private_generator_leaves_the_users_rng_alone(init, granularity):
    state = torch.get_rng_state()
    site_of(randn(24, 40), randn(4, 40), torch.zeros(24, 4), init=init, granularity=granularity)
    assert torch.equal(torch.get_rng_state(), state)


@GRANULARITY
@SCALE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_svd_overwrites_a_fresh_a_with_what_the_gemm_uses(granularity, scale, dtype):
    """lora_A is Â = dq(q(√S·Vᵀ)). Powers of two are exact in either dtype. With "amax" lora_A
    rounds to its dtype, and the state derives its scale from a row's largest element, which is
    rounded too: twice the unit roundoff, and float32's. That is too little to change a code.
    """
    base, lora_a = randn(24, 40), randn(4, 40, seed=1).to(dtype)
    site = site_of(
        base, lora_a, torch.zeros(24, 4), init="svd", granularity=granularity, scale=scale
    )
    used = dequantized(site.state)[24:]
    if scale == "pow2":
        assert torch.equal(lora_a.double(), used)
    else:
        relative = gamma(2, UNIT_ROUNDOFF[dtype]) + gamma(4)
        assert ((lora_a.double() - used).abs() <= relative * used.abs()).all()
    # And it is the cast of √S·Vᵀ of W's own FP8 error.
    rows = low_rank_rows(fp8_error(base, granularity, scale), 4, seed=0)
    bound = fp8_cast_bound(rows, site.state.scale.expand(28, 1)[24:], E4M3)
    assert ((used - rows.double()).abs() <= bound + gamma(2, 2.0**-8) * rows.abs()).all()


@GRANULARITY
@SCALE
@pytest.mark.parametrize("transposed", [False, True], ids=["[out, in]", "[in, out]"])
def test_svd_overwrites_the_a_of_a_constant_base(granularity, scale, transposed):
    """With update="adapter" A has scales of its own, and its cast in the graph is A itself: exactly
    with powers of two, else to the rounding of A's largest element, as above.
    """
    base, lora_a = randn(24, 40), randn(4, 40, seed=1)
    weight = base.t().contiguous().t() if transposed else base
    config = FalqonConfig(init="svd", granularity=granularity, scale=scale)
    init_where_new(weight, lora_a, torch.zeros(24, 4), config)
    spec = str(SiteSpec.from_config(config))
    code, own_scale, _ = proxy_update([lora_a], [torch.zeros(24, 4)], [1.0], [], True, spec)
    used = code.double() * own_scale.double()
    assert ((lora_a.double() - used).abs() <= (scale == "amax") * gamma(6) * used.abs()).all()
    rows = low_rank_rows(fp8_error(base, granularity, scale), 4, seed=0)
    bound = fp8_cast_bound(rows, own_scale.expand(4, 1), E4M3)
    assert ((used - rows.double()).abs() <= bound + gamma(6) * rows.abs()).all()


def test_svd_leaves_an_adapter_that_was_trained():
    lora_a, lora_b = randn(4, 40, seed=1), torch.zeros(24, 4)
    lora_b[5, 2] = 1e-3
    before = lora_a.clone()
    init_where_new(randn(24, 40), lora_a, lora_b, FalqonConfig(init="svd"))
    assert torch.equal(lora_a, before)


def test_the_svd_does_not_depend_on_the_default_dtype():
    error = randn(300, 250)
    expected = low_rank_rows(error, 4, seed=3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(low_rank_rows(error, 4, seed=3), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@GRANULARITY
@pytest.mark.parametrize("dense", [False, True], ids=["one_element", "dense"])
def test_a_with_b_not_zero_is_kept_and_b_is_merged_at_the_start(granularity, dense):
    """W' starts as the cast of base + s·B·Â, with Â and not A; B counts as applied."""
    base, lora_a, lora_b = randn(24, 40), randn(4, 40, seed=1), torch.zeros(24, 4)
    lora_b[5, 2] = 1e-3  # one element is enough to be a loaded adapter
    if dense:
        lora_b += 3 * randn(24, 4, seed=2)
    before = lora_a.clone()
    site = site_of(base, lora_a, lora_b, scaling=2.0, init="svd", granularity=granularity)
    assert torch.equal(lora_a, before)
    assert torch.equal(site.state.applied, lora_b)
    merged = dequantized(site.state)
    exact = base.double() + 2.0 * lora_b.double() @ merged[24:]
    scale = site.state.scale.expand(28, 1)[:24]
    off = gamma(8) * (base.double().abs() + 2.0 * lora_b.double().abs() @ merged[24:].abs())
    bound = off + fp8_cast_bound(exact.abs() + off, scale, E4M3)
    assert ((merged[:24] - exact).abs() <= bound).all()


@GRANULARITY
@pytest.mark.parametrize("b_size", [0.0, 0.1])
def test_keep_never_touches_a(granularity, b_size):
    lora_a, lora_b = randn(4, 40, seed=1), randn(24, 4, seed=2) * b_size
    before_a, before_b = lora_a.clone(), lora_b.clone()
    site_of(randn(24, 40), lora_a, lora_b, init="keep", granularity=granularity)
    assert torch.equal(lora_a, before_a)
    assert torch.equal(lora_b, before_b)


@GRANULARITY
@SCALE
def test_a_weight_without_fp8_error_gives_a_zero_a(granularity, scale):
    """Nothing to describe: no NaN from 0/0, and the state is usable."""
    base = torch.tensor([1.0, -2.0, 0.5, 448.0]).repeat(6, 4)
    lora_a = randn(3, 16)
    site = site_of(
        base, lora_a, torch.zeros(6, 3), init="svd", granularity=granularity, scale=scale
    )
    assert torch.equal(dequantized(site.state)[:6], base.double())
    # The SVD of a matrix of zeros: zeros.
    assert not lora_a.any()
