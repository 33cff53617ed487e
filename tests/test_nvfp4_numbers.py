"""NVFP4: casts, packed bytes and values, against the packages that own the format."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx.config import Scale
from falqon_fx.files import nvfp4_import
from falqon_fx.files.export_forms import Packed, stored
from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.site import nvfp4
from falqon_fx.site.numerics import E2M1, E4M3, LARGEST, round_to_fp8
from tests import tolerances as tol

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BF16, F32 = torch.bfloat16, torch.float32


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Any number of rows and blocks, blocks that differ by up to 2**24 (so that their scales are
    subnormal or 0), zeros, and ties; all of it subnormal in float32, or near the largest taken.
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
    size = draw(st.sampled_from([2.0**-132, 2.0**-40, 0.02, 1.0, 8192.0]))
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


@given(weight=weights(), mode=st.sampled_from(["pow2", "amax"]))
def test_it_is_that_of_compressed_tensors_both_ways(weight, mode):
    """Codes and block scales bit for bit, as `save_fp8` casts them: in that package's steps, which
    divide by g = 1 / s. What it decodes, in bfloat16, is what is decoded here, bit for bit where s
    is a power of two. Elsewhere it takes S / g, and here it is S · (1 / g), which has one rounding
    more.
    """
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight = weight.float()  # in 16 bits that package rounds scales to 16 bits first
    scheme = quantization.preset_name_to_scheme("NVFP4A16", ["Linear"])
    divisor = nvfp4.divisor_for(weight.abs().amax(), mode)
    if mode == "amax" and weight.abs().amax() > 2.0**-80:  # below, s is 2**-100 here, and 1 there
        assert torch.equal(divisor.reshape(1), generate_gparam(weight.amin(), weight.amax()))
    ours = Packed(nvfp4.cast(weight, 1 / divisor, divisor), 1 / divisor, divisor)
    written = {each.name: each.of(ours) for each in stored("nvfp4", weight.shape, None)}
    blocks = weight.view(len(weight), -1, 16)
    theirs_scale, _ = calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=divisor.reshape(1)
    )
    state = {"weight": weight, "weight_scale": theirs_scale.float()}
    state["weight_global_scale"] = divisor.reshape(1)
    theirs = NVFP4PackedCompressor.compress(state, scheme)
    assert written.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name
    decoded = NVFP4PackedCompressor.decompress(theirs, scheme)["weight"]
    names = nvfp4_import.names_of([f"w.{name}" for name in theirs], Path())["w"]
    tensors = {f"w.{name}": tensor for name, tensor in theirs.items()}
    base = nvfp4_import.base_of("w", names, tensors, Path())
    if mode == "pow2":
        assert torch.equal(decoded, base.dequantize().to(BF16))
        assert torch.equal(decoded, nvfp4.decode(base.code, base.scale, BF16))
        return
    # S / g and the product there; 1 / g, S · (1 / g) and the product here; one to bfloat16.
    exact = base.dequantize().double()
    bound = tol.rounded_bound(exact, tol.gamma(5) * exact.abs(), BF16)
    tol.assert_within(decoded, exact, bound)


@given(weight=weights(), mode=st.sampled_from(["pow2", "amax"]))
def test_it_is_that_of_torchao_both_ways(weight, mode):
    """What is cast here is decoded there, and the other way, bit for bit in float32. Its own cast
    multiplies by 1 / S: where a quotient is a tie, that decides otherwise; and a scale that would
    be below 2**-6 is that.
    """
    torchao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    packed, scale = cast(weight, mode)
    codes, block_scales = nvfp4.parted(packed)
    of_blocks = block_scales.view(E4M3)
    known = torchao.NVFP4Tensor(codes, of_blocks, 16, F32, scale, None, False, False, None)
    assert torch.equal(known.dequantize(F32), nvfp4.decode(packed, scale, F32))
    # Of a tensor in bfloat16 it rounds S · s to that.
    given = weight if mode == "pow2" else weight.float()
    made = torchao.NVFP4Tensor.to_nvfp4(given, per_tensor_scale=scale)
    theirs = nvfp4.joined(made.qdata, made.scale.view(torch.uint8))
    assert torch.equal(made.dequantize(F32), nvfp4.decode(theirs, scale, F32))
    normal = weight.float().view(*of_blocks.shape, 16).abs().amax(-1) / (6 * scale) > 2.0**-6
    if mode == "pow2":
        assert torch.equal(
            made.scale[normal].view(torch.uint8), of_blocks[normal].view(torch.uint8)
        )
        scaled = weight.float().view(*normal.shape, 16) / (of_blocks.float() * scale).unsqueeze(2)
        middle = (VALUES[1:] + VALUES[:-1]) / 2
        # Two roundings of float32 there, one here.
        near = 4 * tol.UNIT_ROUNDOFF[F32] * middle
        tie = ((scaled.abs().unsqueeze(-1) - middle).abs() <= near).any(-1)
        same = (normal.unsqueeze(2) & ~tie).flatten(1)
        found, wanted = (nvfp4.decode(p, scale, F32)[same] for p in (theirs, packed))
        assert torch.equal(found, wanted)


def test_scales_cover_and_stay_normal():
    for mode in ("pow2", "amax"):
        for amax in (0.0, 2.0**-130, 1e-20, 0.02, 2688.0, 65535.0):
            scale = float(nvfp4.tensor_scale(torch.tensor(amax), mode))
            assert scale * LARGEST[E2M1] * LARGEST[E4M3] >= amax * (1 - 2.0**-22)
            assert scale >= 2.0**-100
    assert float(nvfp4.tensor_scale(torch.tensor(0.0), "amax")) == 1.0
    assert float(nvfp4.tensor_scale(torch.tensor(2688.0), "pow2")) == 1.0
    assert not nvfp4.decode(*cast(torch.zeros(2, 32), "pow2"), F32).any()
