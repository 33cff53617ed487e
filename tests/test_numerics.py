from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx.site.numerics import (
    E4M3,
    E5M2,
    FP8_MAX,
    amax_to_scale,
    as_operand,
    as_scale,
    decode_fp8,
    encode_fp8,
    round_to_fp8,
    round_to_scaled_fp8,
)
from tests import tolerances as tol
from tests.floats import FORMATS, INF, NAN, bits, codes, near, values

# Beyond 2**127 the nearest FP8 value times its scale may be 2**128, which float32 does not hold.
FINITE32 = st.floats(-(2.0**127), 2.0**127, width=32)


def torch_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype).float()


def random_floats(count: int, seed: int = 0) -> Tensor:
    """Uniform over float32's bit patterns: every exponent, subnormals, Inf and NaN."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64)
    return pattern.to(torch.int32).view(torch.float32)


# -- nearest ---------------------------------------------------------------------------------------


@FORMATS
def test_fp8_max_is_the_largest_value(dtype):
    assert FP8_MAX[dtype] == torch.finfo(dtype).max == values(dtype).max()


@FORMATS
def test_rounding_keeps_every_fp8_value(dtype):
    value = codes().view(dtype).float()
    value = value[~value.isinf()]
    assert torch.equal(bits(round_to_fp8(value, dtype)), bits(value))


@FORMATS
def test_rounding_equals_torch_on_random_bits(dtype):
    x = random_floats(1 << 20)
    assert torch.equal(bits(round_to_fp8(x, dtype)), bits(torch_cast(x, dtype)))


@FORMATS
def test_rounding_equals_torch_in_range(dtype):
    x = near(dtype, 1 << 20)
    assert torch.equal(bits(round_to_fp8(x, dtype)), bits(torch_cast(x, dtype)))


@FORMATS
def test_midpoints_go_to_the_even_neighbour(dtype):
    value = values(dtype)
    low, high = value[:-1], value[1:]
    middle = (low + high) / 2  # exact: one bit more than FP8 has
    # Even: the last mantissa bit of the code is 0. Of two neighbours just one is.
    even = torch.where(low.to(dtype).view(torch.uint8) & 1 == 0, low, high)
    assert torch.equal(round_to_fp8(middle, dtype), even)
    # One float32 step off the midpoint decides it.
    above = torch.nextafter(middle, torch.tensor(INF))
    below = torch.nextafter(middle, torch.tensor(-INF))
    assert torch.equal(round_to_fp8(above, dtype), high)
    assert torch.equal(round_to_fp8(below, dtype), low)


@FORMATS
def test_one_step_off_a_value_stays(dtype):
    value = values(dtype)
    for direction in (INF, -INF):
        beside = torch.nextafter(value, torch.tensor(direction))
        assert torch.equal(round_to_fp8(beside, dtype), value)


@FORMATS
def test_rounding_saturates_and_keeps_nan_and_signed_zero(dtype):
    largest = FP8_MAX[dtype]
    x = torch.tensor([INF, -INF, 3e38, -1.1 * largest, NAN, 0.0, -0.0, 1e-45, -1e-45])
    expected = torch.tensor([largest, -largest, largest, -largest, NAN, 0.0, -0.0, 0.0, -0.0])
    assert torch.equal(bits(round_to_fp8(x, dtype)), bits(expected))


@FORMATS
def test_rounding_under_inductor_is_bit_equal(dtype):
    """The float tricks survive the compiler: no reassociation, no flushed subnormals."""
    x = torch.cat([random_floats(1 << 16, seed=1), near(dtype, 1 << 16, seed=1)])
    compiled = torch.compile(lambda x: round_to_fp8(x, dtype), fullgraph=True)
    result, expected = compiled(x), round_to_fp8(x, dtype)
    number = ~expected.isnan()
    assert torch.equal(bits(result[number]), bits(expected[number]))
    assert result[~number].isnan().all()


@FORMATS
@pytest.mark.parametrize("exponent", [-100, -9, 0, 7, 90])
def test_rounding_on_a_scaled_grid_equals_rounding_of_the_quotient(dtype, exponent):
    """Scaling by a power of two is exact, so the order of scaling and rounding can't matter."""
    scale = 2.0**exponent
    x = near(dtype, 1 << 16, seed=4)
    x = x[x.abs() <= FP8_MAX[dtype]]
    expected = round_to_fp8(x, dtype) * scale
    result = round_to_scaled_fp8(x * scale, torch.tensor(scale), dtype)
    assert torch.equal(bits(result), bits(expected))
    assert torch.equal(bits(round_to_scaled_fp8(x * scale, scale, dtype)), bits(expected))


# -- bytes -----------------------------------------------------------------------------------------


@FORMATS
def test_encode_inverts_every_code(dtype):
    value = codes().view(dtype).float()
    coded = encode_fp8(value, dtype)
    finite = value.isfinite()
    assert torch.equal(coded[finite], codes()[finite])
    assert coded[value.isnan()].view(dtype).float().isnan().all()


@FORMATS
def test_encode_of_rounded_equals_torch_bytes(dtype):
    x = torch.cat([random_floats(1 << 18, seed=2), near(dtype, 1 << 18, seed=2)])
    x = x[~x.isnan()]
    expected = torch_cast(x, dtype).to(dtype).view(torch.uint8)
    assert torch.equal(encode_fp8(round_to_fp8(x, dtype), dtype), expected)


@FORMATS
def test_encode_does_not_depend_on_the_default_dtype(dtype):
    value = values(dtype)
    expected = encode_fp8(value, dtype)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(encode_fp8(value, dtype), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**100, 2.0**-110])
def test_decode_is_exact_for_pow2_scales(scale, out_dtype):
    value = codes().view(E4M3).double()
    code = codes()[value.isfinite()]
    expected = value[value.isfinite()] * scale
    for given_scale in (scale, torch.tensor(scale)):
        for given_code in (code, code.view(E4M3)):
            decoded = decode_fp8(given_code, given_scale, out_dtype)
            assert decoded.dtype == out_dtype
            assert torch.equal(decoded.double(), expected)
    assert decode_fp8(torch.tensor([128], dtype=torch.uint8), 1.0, out_dtype).signbit().all()


@given(st.floats(2.0**-110, 2.0**110, width=32))
def test_decode_rounds_once_in_float32(scale):
    """value·scale is computed exactly and rounded: what float32 multiplication does."""
    value = codes().view(E4M3).float()
    code, value = codes()[value.isfinite()], value[value.isfinite()]
    scale = torch.tensor(scale)
    assert torch.equal(decode_fp8(code, scale, torch.float32), value * scale)
    assert torch.equal(decode_fp8(code, scale, torch.bfloat16), (value * scale).bfloat16())


def test_bytes_and_bits_are_read_as_what_they_are():
    """A prepared layer holds its weight as uint8 and its scales as int32."""
    weight, scale = torch.tensor([[1.5, -2.0]]).to(E4M3), torch.tensor([[0.3], [-0.0]])
    for code in (weight, weight.view(torch.uint8)):
        assert as_operand(code).dtype == E4M3
        assert torch.equal(as_operand(code).float(), weight.float())
    for given_scale in (scale, scale.view(torch.int32)):
        assert torch.equal(bits(as_scale(given_scale)), bits(scale))


def test_decode_broadcasts_row_scales():
    code = codes()[:126].view(9, 14)
    scale = torch.arange(1, 10, dtype=torch.float32).unsqueeze(1) / 3
    expected = code.view(E4M3).float() * scale
    assert torch.equal(decode_fp8(code, scale, torch.float32), expected)


# -- scale -----------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("mode", ["amax", "pow2"])
def test_scale_of_zero_nan_and_inf(dtype, mode):
    scale = amax_to_scale(torch.tensor([0.0, -0.0, NAN, INF]), dtype, mode)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert scale[2].isnan()
    assert scale[3] == INF


@FORMATS
@pytest.mark.parametrize("mode", ["amax", "pow2"])
def test_scale_and_its_inverse_are_finite_for_every_amax(dtype, mode):
    largest = torch.finfo(torch.float32).max
    amax = torch.tensor([1e-45, 1e-40, 2.0**-126, 1e-30, 1.0, 1e30, largest])
    scale = amax_to_scale(amax, dtype, mode)
    assert scale.dtype == torch.float32
    assert scale.isfinite().all()
    assert (1 / scale).isfinite().all()
    assert (scale > 0).all()


@FORMATS
@pytest.mark.parametrize("amax_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scale_is_float32_whatever_amax_is(dtype, amax_dtype):
    amax = torch.tensor([3.0, 448.0], dtype=amax_dtype)
    expected = amax_to_scale(amax.float(), dtype, "amax")
    assert torch.equal(amax_to_scale(amax, dtype, "amax"), expected)


@FORMATS
def test_amax_scale_within_two_roundings(dtype):
    amax = random_floats(1 << 16, seed=3).abs()
    amax = amax[amax.isfinite() & (amax / FP8_MAX[dtype] >= 2.0**-126)]
    exact = amax.double() / FP8_MAX[dtype]
    bound = tol.amax_scale_relative_bound() * exact
    tol.assert_within(amax_to_scale(amax, dtype, "amax"), exact, bound)


@FORMATS
def test_pow2_scale_is_the_smallest_that_covers(dtype):
    """At and beside every power of two times fp8_max, where one float32 step decides."""
    exponents = torch.arange(-110, 111, dtype=torch.float64)
    edge = (FP8_MAX[dtype] * exponents.exp2()).float()
    edge = edge[edge.isfinite()].view(torch.int32).unsqueeze(1)
    beside = (edge + torch.arange(-8, 9, dtype=torch.int32)).view(torch.float32).flatten()
    amax = torch.cat([beside[beside.isfinite()], near(dtype, 1 << 16).abs()])
    scale = amax_to_scale(amax, dtype, "pow2")
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    low, high = tol.pow2_scale_range(amax, dtype)
    assert (scale.double() >= low).all()
    assert (scale.double() < high).all()


def test_all_zero_group_casts_to_zeros():
    x = torch.zeros(4)
    scale = amax_to_scale(x.abs().amax(), E4M3, "amax")
    assert torch.equal(round_to_fp8(x / scale, E4M3) * scale, x)


@given(
    st.lists(FINITE32, min_size=1, max_size=40),
    st.sampled_from([E4M3, E5M2]),
    st.sampled_from(["amax", "pow2"]),
)
def test_cast_error_within_bound(numbers, dtype, mode):
    x = torch.tensor(numbers, dtype=torch.float32)
    scale = amax_to_scale(x.abs().amax(), dtype, mode)
    bound = tol.fp8_cast_bound(x, scale, dtype)
    for scaled in (x / scale, x * (1 / scale)):
        tol.assert_within(round_to_fp8(scaled, dtype) * scale, x, bound)


@FORMATS
def test_cast_bound_is_tight(dtype):
    """The bound is not slack: values just past a midpoint come within 1e-5 of it."""
    value = values(dtype)
    middle = (value[1:] + value[:-1]) / 2
    error = (round_to_fp8(middle, dtype) - middle).abs().double()
    assert (error / tol.fp8_cast_bound(middle, 1.0, dtype)).max() > 1 - 1e-5
