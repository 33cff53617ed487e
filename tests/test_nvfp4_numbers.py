"""NVFP4: casts, packed bytes and values, against the packages that own the format."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx.config import Scale
from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.site import nvfp4
from falqon_fx.site.numerics import E2M1, E4M3, LARGEST, round_to_fp8
from tests import tolerances as tol

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BF16, F32 = torch.bfloat16, torch.float32


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Any number of rows and blocks, blocks that differ by up to 2**24 (so that their scales are
    subnormal or 0), zeros, and ties.
    """
    out, count = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    weight = torch.randn(out, count * 16, generator=generator)
    spread = draw(st.sampled_from([0, 4, 24]))
    exponents = torch.randint(0, spread + 1, (out, count), generator=generator)
    weight *= (2.0 ** -exponents.float()).repeat_interleave(16, 1)
    if draw(st.booleans()):  # halves of E2M1's steps, of which many are ties
        weight = (weight * 8).round() / 8
    if draw(st.booleans()):
        weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0.0
        weight[0, :16] = 0.0
    size = draw(st.sampled_from([2.0**-40, 0.02, 1.0, 1000.0]))
    return (weight * size).to(draw(st.sampled_from([F32, BF16])))


def cast(weight: Tensor, mode: Scale) -> tuple[Tensor, Tensor]:
    scale = nvfp4.tensor_scale(weight.abs().amax(), mode)
    return nvfp4.cast(weight, scale), scale


@pytest.fixture(params=["compiled", "aten"])
def way(request, monkeypatch):
    """Decoding as compiled code and as ATen's operations."""
    if request.param == "aten":
        monkeypatch.setattr(cpu, "decode_nvfp4", lambda *_: None)
    elif cpu.library() is None:
        pytest.skip("no C++ compiler")


def test_e2m1_is_rounded_to_the_nearest_ties_to_even():
    middle = (VALUES[1:] + VALUES[:-1]) / 2
    even = torch.where(torch.arange(7) % 2 == 0, VALUES[:-1], VALUES[1:])
    for sign in (1.0, -1.0):
        assert torch.equal(round_to_fp8(sign * VALUES, E2M1), sign * VALUES)
        assert torch.equal(round_to_fp8(sign * middle, E2M1), sign * even)
        above = torch.nextafter(middle, torch.tensor(9.0))
        assert torch.equal(round_to_fp8(sign * above, E2M1), sign * VALUES[1:])
    assert torch.equal(round_to_fp8(torch.tensor([-9.0, 9.0]), E2M1), torch.tensor([-6.0, 6.0]))


def test_every_code_and_scale_decodes_exactly(way):
    """All bytes of codes under all scales are exact in bfloat16, and times a power of two."""
    scales = torch.arange(127, dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.uint8).view(32, 8)  # rows of a block
    rows = nvfp4.joined(codes.repeat(127, 1), scales.repeat_interleave(32).unsqueeze(1))
    low, high = codes.repeat(127, 1) & 15, codes.repeat(127, 1) >> 4
    index = torch.stack([low, high], 2).flatten(1).int()
    value = VALUES.double()[index & 7] * (1.0 - 2.0 * (index >> 3))
    exact = value * scales.view(E4M3).double().repeat_interleave(32).unsqueeze(1)
    for factor, dtype in itertools.product((1.0, 2.0**-9, 2.0**9), (BF16, F32)):
        assert torch.equal(nvfp4.decode(rows, factor, dtype).double(), exact * factor)
        to = torch.empty(rows.shape[0], 16, dtype=dtype)
        assert nvfp4.decode(rows, torch.tensor(factor), dtype, to) is to
        assert torch.equal(to.double(), exact * factor)


@given(weight=weights(), mode=st.sampled_from(["pow2", "amax"]))
def test_a_cast_is_to_the_nearest(weight, mode):
    """|error| <= half of E2M1's step at the value's place, under the scale that its block got, or,
    where that scale was rounded down, what lies beyond 6.
    """
    packed, scale = cast(weight, mode)
    assert packed.shape == (len(weight), 9, weight.shape[1] // 16)
    codes, block_scales = nvfp4.parted(packed)
    of_blocks = block_scales.view(E4M3).double() * scale.double()
    unit = of_blocks.repeat_interleave(16, 1)
    found = nvfp4.decode(packed, scale, F32).double()
    scaled = weight.double() / unit
    step = torch.where(scaled.abs() < 2, 0.5, torch.where(scaled.abs() < 4, 1.0, 2.0))
    beyond = (scaled.abs() - 6).clamp(min=0)
    # Two roundings of float32 on the way: of S · s and of the quotient.
    slack = 4 * tol.UNIT_ROUNDOFF[F32] * scaled.abs()
    assert bool(((found / unit - scaled).abs() <= torch.maximum(step / 2, beyond) + slack).all())
    # S is rounded by 2**-4 of itself at most where it is normal.
    assert bool((scaled.abs() <= 6 / (1 - 2.0**-4))[unit > 2.0**-6 * scale].all())
    assert torch.equal(nvfp4.joined(codes, block_scales), packed)


@given(weight=weights())
def test_bytes_are_those_of_compressed_tensors(weight):
    """Codes and block scales bit for bit, both ways; s is a power of two, since that package
    divides by 1 / s.
    """
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = weight.float()  # in 16 bits that package rounds scales to 16 bits first
    scheme = quantization.preset_name_to_scheme("NVFP4A16", ["Linear"])
    packed, scale = cast(weight, "pow2")
    blocks = weight.view(len(weight), -1, 16)
    theirs_scale, _ = calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=1 / scale.reshape(1)
    )
    state = {"weight": weight, "weight_scale": theirs_scale.float()}
    state["weight_global_scale"] = 1 / scale.reshape(1)
    theirs = NVFP4PackedCompressor.compress(state, scheme)
    codes, block_scales = nvfp4.parted(packed)
    assert torch.equal(theirs["weight_packed"], codes)
    assert torch.equal(theirs["weight_scale"].view(torch.uint8), block_scales)
    decoded = NVFP4PackedCompressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(decoded, nvfp4.decode(packed, scale, BF16))


@pytest.mark.slow  # that package takes seconds to import
@given(weight=weights(), mode=st.sampled_from(["pow2", "amax"]))
def test_values_are_those_of_torchao(weight, mode):
    """Decoded in float32, bit for bit; its own cast differs where a scale is subnormal or 0."""
    torchao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    packed, scale = cast(weight, mode)
    codes, block_scales = nvfp4.parted(packed)
    of_blocks = block_scales.view(E4M3)
    known = torchao.NVFP4Tensor(codes, of_blocks, 16, F32, scale, None, False, False, None)
    assert torch.equal(known.dequantize(F32), nvfp4.decode(packed, scale, F32))
    zeros = (weight.view(len(weight), -1, 16) == 0).all(-1).any()
    if bool((of_blocks.float() > 2.0**-6).all()) and mode == "pow2" and not zeros:
        of_theirs, theirs = torchao.nvfp4_quantize(weight, 16, scale)
        assert torch.equal(of_theirs.view(torch.uint8), block_scales)
        # It multiplies by 1 / S: where a quotient is a tie, that decides otherwise.
        scaled = weight.float().view(len(weight), -1, 16) / (of_blocks.float() * scale).unsqueeze(2)
        tie = (scaled.abs().unsqueeze(-1) - (VALUES[1:] + VALUES[:-1]) / 2).abs().amin(-1) < 1e-6
        if not tie.any():  # and it keeps the sign of -0
            decoded = nvfp4.decode(nvfp4.joined(theirs, block_scales), scale, F32)
            assert torch.equal(decoded, nvfp4.decode(packed, scale, F32))


def test_scales_cover_and_stay_normal():
    for mode in ("pow2", "amax"):
        for amax in (0.0, 2.0**-130, 1e-20, 0.02, 2688.0, 65535.0):
            scale = float(nvfp4.tensor_scale(torch.tensor(amax), mode))
            assert scale * LARGEST[E2M1] * LARGEST[E4M3] >= amax * (1 - 2.0**-22)
            assert scale >= 2.0**-100
    assert float(nvfp4.tensor_scale(torch.tensor(0.0), "amax")) == 1.0
    assert float(nvfp4.tensor_scale(torch.tensor(2688.0), "pow2")) == 1.0
    assert not nvfp4.decode(*cast(torch.zeros(2, 32), "pow2"), F32).any()
