"""The activation cast, interpreted, against the CPU composition of `falqon_fx.site.numerics`.

Bytes and scales are equal bit for bit. Only NaN is compared as NaN: the sign and payload that a NaN
carries out of arithmetic are up to the processor.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falqon_fx.kernels import loader
from falqon_fx.kernels.activation_cast.launch import activation_cast
from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.render import render
from falqon_fx.site.numerics import (
    E4M3,
    FP8_DTYPES,
    FP8_MAX,
    amax_to_scale,
    encode_fp8,
    round_to_fp8,
)
from tests.parameters import each_value

# numpy, which the interpreter computes with, announces what NaN and Inf rows do on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -3e-39, 6e-8, 448.0, 3.4e38]
NAN_BYTE = 0x7F


def reference(x, spec):
    """Bytes [n, width] and scale of x, NaN bytes canonical."""
    value = x.to(torch.float32)
    magnitude = value.abs()
    amax = magnitude.amax(1, keepdim=True) if spec.granularity == "row" else magnitude.amax()
    scale = amax_to_scale(amax, FP8_DTYPES[spec.fp8], spec.scale)
    rounded = round_to_fp8(value * (1.0 / scale), FP8_DTYPES[spec.fp8])
    code = encode_fp8(rounded, FP8_DTYPES[spec.fp8])
    return torch.where(rounded.isnan(), NAN_BYTE, code), scale


def check(x, spec):
    q, scale = activation_cast(x, spec)
    code, expected_scale = reference(x, spec)
    assert q.dtype == FP8_DTYPES[spec.fp8]
    assert q.shape == x.shape
    assert scale.shape == expected_scale.shape
    torch.testing.assert_close(q.view(torch.uint8), code, rtol=0, atol=0)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    return q, scale


@st.composite
def specs(draw, dtype, granularity):
    return ActivationCastSpec(
        input_dtype=dtype,
        fp8=draw(st.sampled_from(sorted(FP8_DTYPES))),
        granularity=granularity,
        scale=draw(st.sampled_from(["amax", "pow2"])),
        cast="integer",
        block_rows=draw(st.sampled_from([1, 4])),
        block_width=draw(st.sampled_from([16, 64])),
        loop=granularity == "row" and draw(st.booleans()),
        programs=draw(st.sampled_from([1, 4])) if granularity == "tensor" else 1,
    )


@st.composite
def inputs(draw, dtype, max_width):
    """x [n, width] of any layout, its magnitudes far apart, with special values strewn in."""
    n = draw(st.integers(1, 9))
    width = draw(st.integers(1, max_width))
    layout = draw(st.sampled_from(["contiguous", "row stride", "expanded", "inner stride", "t"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    exponent = draw(st.integers(-42, 36))
    x = torch.randn(n, 2 * width + 3, generator=generator)
    x = x * 10.0**exponent * 10.0 ** torch.randint(-4, 1, x.shape, generator=generator)
    x = x.to(DTYPES[dtype])
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    if draw(st.booleans()):
        x[draw(st.integers(0, n - 1))] = 0
    if layout == "contiguous":
        return x[:, :width].contiguous()
    if layout == "row stride":
        return x[:, 3 : 3 + width]
    if layout == "expanded":
        return x[0, :width].expand(n, width)
    if layout == "inner stride":
        return x[:, : 2 * width : 2]
    return x[:, :width].t().contiguous().t()


@each_value(granularity=["tensor", "row"], dtype=DTYPES.keys())
@given(data=st.data())
def test_equals_reference_bit_for_bit(dtype, granularity, data):
    spec = data.draw(specs(dtype, granularity))
    max_width = 150 if spec.granularity == "tensor" or spec.loop else spec.block_width
    check(data.draw(inputs(spec.input_dtype, max_width)), spec)


def small_spec(**changes):
    base = ActivationCastSpec(
        input_dtype="float32",
        fp8="e4m3",
        granularity="row",
        scale="amax",
        cast="integer",
        block_rows=64,
        block_width=256,
    )
    return replace(base, **changes)


def behind_maximum(values, fp8):
    """Rows [n, 256] that hold ``values`` and start with fp8_max, so that all have one scale."""
    values = torch.cat([values, values.new_zeros(-len(values) % 255)]).view(-1, 255)
    maximum = torch.full((len(values), 1), FP8_MAX[FP8_DTYPES[fp8]], dtype=values.dtype)
    return torch.cat([maximum, values], dim=1)


@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_value_at_scale_one(dtype, fp8):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[dtype])
    x = behind_maximum(patterns[patterns.abs() <= FP8_MAX[FP8_DTYPES[fp8]]], fp8)
    _, scale = check(x, small_spec(input_dtype=dtype, fp8=fp8, scale="pow2"))
    assert (scale == 1).all()


@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_every_tie_and_its_float32_neighbours(fp8):
    codes = torch.arange(128, dtype=torch.uint8).view(FP8_DTYPES[fp8]).float()
    codes = codes[codes.isfinite()]
    ties = (codes[1:] + codes[:-1]) / 2
    around = torch.cat([codes, ties, ties.nextafter(codes[1:]), ties.nextafter(codes[:-1])])
    x = behind_maximum(torch.cat([around, -around]), fp8)
    q, scale = check(x, small_spec(fp8=fp8, scale="pow2"))
    assert (scale == 1).all()
    rounded = q.float().flatten()[1 : 1 + len(codes)]
    torch.testing.assert_close(rounded, codes, rtol=0, atol=0)


ENCODE_ALONE = """

@triton.jit
def encode_alone(value_ptr, code_ptr):
    index = tl.arange(0, 65536)
    tl.store(code_ptr + index, encode(tl.load(value_ptr + index)))
"""


@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_encode_saturates_and_keeps_nan(fp8, monkeypatch):
    # Scaled values never reach the range where encoding saturates: call it without the scale.
    monkeypatch.setattr(loader, "render", lambda spec: render(spec) + ENCODE_ALONE)
    kernels = loader.load.__wrapped__(small_spec(fp8=fp8), interpret=True)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (65536,), generator=generator).to(torch.int32)
    value = bits.view(torch.float32)
    value[: len(SPECIAL)] = torch.tensor(SPECIAL)
    code = torch.empty(65536, dtype=torch.uint8)
    kernels.encode_alone[(1,)](value, code)
    expected = encode_fp8(round_to_fp8(value, FP8_DTYPES[fp8]), FP8_DTYPES[fp8])
    expected = torch.where(value.isnan(), NAN_BYTE, expected)
    torch.testing.assert_close(code, expected, rtol=0, atol=0)
    assert (code.view(FP8_DTYPES[fp8]).float().abs() == FP8_MAX[FP8_DTYPES[fp8]]).sum() > 1000


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_bit_patterns(dtype, granularity):
    generator = torch.Generator().manual_seed(0)
    word = torch.int32 if dtype == "float32" else torch.int16
    info = torch.iinfo(word)
    bits = torch.randint(info.min, info.max + 1, (96, 256), generator=generator).to(word)
    x = bits.view(DTYPES[dtype])
    x[::2].nan_to_num_(1.0, 2.0, 3.0)  # rows without NaN and Inf too
    check(x, small_spec(input_dtype=dtype, granularity=granularity))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_zeros_get_scale_one(fp8, granularity):
    x = torch.zeros(3, 20)
    x[1] = -0.0
    q, scale = check(x, small_spec(fp8=fp8, granularity=granularity))
    assert (scale == 1).all()
    assert q.view(torch.uint8).unique().tolist() == [0x00, 0x80]


@pytest.mark.parametrize("scale_mode", ["amax", "pow2"])
def test_nan_and_inf_stay_in_their_row(scale_mode):
    x = torch.ones(4, 20)
    x[1, 7] = float("nan")
    x[2, 7] = -float("inf")
    q, scale = check(x, small_spec(scale=scale_mode))
    assert scale.flatten().isfinite().tolist() == [True, False, False, True]
    assert q.float()[1].isnan().all()
    assert q.float()[2].isnan().nonzero().flatten().tolist() == [7]
    assert q.float()[[0, 3]].isfinite().all()


def test_nan_reaches_the_tensor_scale_from_any_tile():
    x = torch.ones(6, 100)
    x[5, 99] = float("nan")
    spec = small_spec(granularity="tensor", block_rows=2, block_width=32, programs=4)
    _, scale = check(x, spec)
    assert scale.isnan()


def test_amax_that_lands_above_the_maximum_becomes_it():
    # amax * (1 / 448) may round down, and amax / scale then lies above 448.
    amax = torch.rand(4096, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    q, scale = check(amax, small_spec(block_rows=512, block_width=16))
    assert (amax * (1.0 / scale) > 448).any()
    assert (q.float() == 448).all()


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("shape", [(0, 8), (0, 0), (3, 0)])
def test_empty_input_launches_nothing(shape, granularity, monkeypatch):
    monkeypatch.setattr("falqon_fx.kernels.activation_cast.launch.load", None)
    q, scale = activation_cast(torch.empty(shape), small_spec(granularity=granularity))
    assert q.shape == shape
    assert q.dtype == E4M3
    assert scale.shape == ((shape[0], 1) if granularity == "row" else ())
    assert scale.dtype == torch.float32
    assert (scale == 1).all()


def test_nothing_is_written_beside_the_outputs():
    # A masked store that missed its mask would hit the next row.
    x = torch.randn(5, 17)
    spec = small_spec(block_rows=2, block_width=32)
    check(x, spec)
    check(x[:3], spec)
    assert activation_cast(x, spec)[0].is_contiguous()


@pytest.mark.parametrize(
    ("x", "changes", "error", "message"),
    [
        (torch.ones(4), {}, ValueError, r"shape \(4,\), expected \[n, width\]"),
        (torch.ones(2, 2, 2), {}, ValueError, "shape"),
        (torch.ones(2, 2).half(), {}, TypeError, "x is torch.float16"),
        (torch.ones(2, 300), {}, ValueError, "rows of 300 do not fit"),
        (torch.ones(2, 2), {"cast": "hardware"}, ValueError, "use cast='integer'"),
    ],
)
def test_bad_input_is_explained(x, changes, error, message):
    with pytest.raises(error, match=message):
        activation_cast(x, small_spec(**changes))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU with FP8",
)
@pytest.mark.parametrize("cast", ["hardware", "integer"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype, fp8, granularity, cast):
    x = torch.randn(300, 4096, generator=torch.Generator().manual_seed(0))
    x = (x * 10.0 ** torch.arange(-4, 1)[torch.arange(300) % 5, None]).to(DTYPES[dtype])
    x[7, 11] = float("nan") if granularity == "row" else 0.0
    spec = ActivationCastSpec.for_width(
        4096, input_dtype=dtype, fp8=fp8, granularity=granularity, cast=cast
    )
    q, scale = activation_cast(x.cuda(), spec)
    code, expected_scale = reference(x, spec)
    torch.testing.assert_close(q.cpu().view(torch.uint8), code, rtol=0, atol=0)
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=0, atol=0, equal_nan=True)
