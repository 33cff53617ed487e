"""Each form in which FP8 weights are published, bit for bit as the package reads it that owns it.
(INT8: `tests/test_int8_checkpoints.py`; NVFP4: `tests/test_nvfp4_numbers.py`.)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx import FalqonConfig
from falqon_fx.files import blocks
from falqon_fx.site.base import Base, cast_base
from falqon_fx.site.numerics import E4M3, as_code
from falqon_fx.site.spec import SiteSpec
from tests.sites import randn
from tests.strategies import SEEDS

transformers_fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
SPREADS = st.sampled_from([0, 2, 6])  # of the exponents of rows and columns


def weight_of(out: int, features: int, spread: int, seed: int) -> Tensor:
    weight = randn(out, features, seed=seed) * (randn(out, 1, seed=seed + 1) * spread).exp2()
    return weight * (randn(1, features, seed=seed + 2) * spread).exp2()


@given(out=st.integers(1, 20), features=st.integers(1, 70), spread=SPREADS, seed=SEEDS)
def test_rows_are_those_of_compressed_tensors(out, features, spread, seed):
    """What it writes is read as it reads it, and what is cast here it reads as it is meant."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = quantization.preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]).weights
    weight = weight_of(out, features, spread, seed)
    low, high = weight.aminmax(dim=1, keepdim=True)
    scale, zero = calculate_qparams(low, high, args)
    code = quantize(weight, scale, zero, args, dtype=E4M3)
    theirs = dequantize(code, scale, None, args)
    assert torch.equal(Base(as_code(code), scale).dequantize(), theirs)
    base = cast_base(weight, SiteSpec.from_config(FalqonConfig()))
    assert torch.equal(dequantize(base.weight, base.scale, None, args), base.dequantize())
    again = quantize(base.dequantize(), base.scale, torch.zeros_like(zero), args, dtype=E4M3)
    assert torch.equal(again.float(), base.weight.float())


@pytest.mark.slow  # that package takes seconds to import
@given(out=st.integers(1, 20), features=st.integers(2, 70), spread=SPREADS, seed=SEEDS)
def test_rows_are_those_of_torchao(out, features, spread, seed):
    torchao: Any = pytest.importorskip("torchao.quantization")
    weight = weight_of(out, features, spread, seed)
    theirs = torchao.Float8Tensor.from_hp(weight, granularity=torchao.PerRow())
    base = Base(as_code(theirs.qdata), theirs.scale.reshape(-1, 1))
    assert torch.equal(base.dequantize(), theirs.dequantize(torch.float32))


@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    scales=st.sampled_from(["float", "ue8m0"]),
    spread=SPREADS,
    seed=SEEDS,
)
def test_blocks_are_those_of_transformers(grid, size, scales, spread, seed):
    settings = SimpleNamespace(weight_block_size=size, scale_fmt=scales)
    quantizer: Any = SimpleNamespace(quantization_config=settings)
    weight = weight_of(grid[0] * size[0], grid[1] * size[1], spread, seed)
    code, scale = transformers_fp8.Fp8Quantize(quantizer)._quantize_one("w", weight).values()
    assert scale.dtype == (torch.float32 if scales == "float" else torch.float8_e8m0fnu)
    theirs = transformers_fp8.Fp8Dequantize(quantizer)._dequantize_one(code, scale, torch.float32)
    assert torch.equal(blocks.dequantize(code, scale, size), theirs)


def test_four_bits_are_those_of_transformers():
    """All bytes under all scales: two codes each, the first in the lower half."""
    codes = torch.arange(256).view(16, 16).to(torch.uint8).view(torch.int8)
    exact = blocks.of_mxfp4(codes)
    assert exact.dtype == E4M3
    read: Any = transformers_fp8.Fp8Dequantize(None)
    for exponent in range(255):
        scale = torch.full((16, 1), exponent).to(torch.uint8).view(torch.float8_e8m0fnu)
        theirs = read._dequantize_one(codes, scale, torch.float32)
        assert torch.equal(blocks.dequantize(exact, scale, blocks.MXFP4), theirs)
