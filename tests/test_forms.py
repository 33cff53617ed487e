"""Each form in which FP8 and INT8 weights are published, bit for bit as the package that owns it:
what that writes is read here as it reads it, and it reads what is written here as it is meant.
(NVFP4: `tests/test_nvfp4_numbers.py`, `tests/test_modelopt.py`.)
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.files import blocks
from falqon_fx.files.export_forms import block_size, stored
from falqon_fx.files.fp8_import import _eight_bits
from falqon_fx.site.base import Base, cast_base, check_base
from falqon_fx.site.numerics import E4M3, as_code
from falqon_fx.site.spec import SiteSpec
from tests.strategies import base_weights

transformers_fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
KINDS = st.sampled_from(["fp8", "int8"])
GRANULARITIES = st.sampled_from(["row", "tensor"])
SCALES = st.sampled_from(["pow2", "amax"])
F32 = torch.float32


def cast(weight: Tensor, **options: Any) -> Base:
    return cast_base(weight, SiteSpec.from_config(FalqonConfig(**options)))


def loaded(state: dict[str, Tensor], **settings: Any) -> Base:
    """What `falqon_fx.load` makes of the tensors of a layer, by a ``quantization_config``."""
    tensors = {f"w.{name}": tensor for name, tensor in state.items()}
    return _eight_bits(tensors, settings, Path(), None, lambda path: False).bases["w"]


# -- compressed-tensors ----------------------------------------------------------------------------


def scheme_of(kind: str, **weights: Any) -> Any:
    """Its preset for a kind of weights, and what is changed of it."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    name = {"fp8": "FP8_DYNAMIC", "int8": "W8A8", "blocks": "FP8_BLOCK"}[kind]
    scheme = quantization.preset_name_to_scheme(name, ["Linear"])
    return scheme.model_copy(update={"weights": scheme.weights.model_copy(update=weights)})


def compressed(weight: Tensor, low: Tensor, high: Tensor, scheme: Any) -> dict[str, Tensor]:
    """What it writes of a weight whose scales are for the groups with these extremes."""
    from compressed_tensors.compressors import NaiveQuantizationCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scale, zero = calculate_qparams(low, high, scheme.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    found: dict[str, Tensor] = NaiveQuantizationCompressor.compress(state, scheme)
    return found


def decompressed(state: dict[str, Tensor], scheme: Any) -> Tensor:
    from compressed_tensors.compressors import NaiveQuantizationCompressor

    weight: Tensor = NaiveQuantizationCompressor.decompress(state, scheme)["weight"]
    return weight


@given(weight=base_weights(), kind=KINDS, granularity=GRANULARITIES, scale=SCALES)
def test_compressed_tensors_reads_what_is_written(weight, kind, granularity, scale):
    """Numbers bit for bit; and it casts them to the same bytes again."""
    base, scheme = (
        cast(weight, base_dtype=kind, granularity=granularity, scale=scale),
        scheme_of(kind),
    )
    state = {each.name: each.of(base) for each in stored(kind, weight.shape, None)}
    theirs = decompressed(state, scheme)
    assert theirs.dtype == F32
    assert torch.equal(theirs, base.dequantize())
    from compressed_tensors.quantization.lifecycle.forward import quantize

    dtype = state["weight"].dtype
    again = quantize(theirs, state["weight_scale"], None, scheme.weights, dtype=dtype)
    assert torch.equal(again.float(), state["weight"].float())
    assert torch.equal(loaded(state, **config_of(scheme)).dequantize(), theirs)


def config_of(scheme: Any) -> dict[str, Any]:
    groups = {"group_0": {"weights": scheme.weights.model_dump(mode="json")}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@given(weight=base_weights(), kind=KINDS, strategy=st.sampled_from(["channel", "tensor"]))
def test_what_compressed_tensors_writes_is_read(weight, kind, strategy):
    """In the dtype of its scales, that of W: it rounds code · scale to that, which float32 holds.
    Its INT8 codes go down to -128, which ours do not.
    """
    scheme = scheme_of(kind, strategy=strategy)
    rows = weight if strategy == "channel" else weight.reshape(1, -1)
    low, high = rows.aminmax(dim=1, keepdim=True)
    state = compressed(weight, low, high, scheme)
    theirs, base = decompressed(state, scheme), loaded(state, **config_of(scheme))
    assert theirs.dtype == weight.dtype
    assert torch.equal(base.weight.float(), state["weight"].float())
    assert torch.equal(base.dequantize().to(theirs.dtype), theirs)


@given(weight=base_weights(), rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_what_compressed_tensors_writes_in_blocks_is_read(weight, rows, columns):
    """Any size of block, with parts of blocks at the edges. (Here no such folder is written.)"""
    scheme = scheme_of("blocks", block_structure=[rows, columns])
    out, features = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -features % columns, 0, -out % rows))
    of_blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
    flat = of_blocks.flatten(2)
    state = compressed(weight, flat.amin(-1), flat.amax(-1), scheme)
    theirs, size = decompressed(state, scheme), (rows, columns)
    assert blocks.block_size(config_of(scheme), Path()) == size
    code, scale = state["weight"], state["weight_scale"]
    assert blocks.check_grid("w", code, scale, size, "w") == size
    assert torch.equal(blocks.dequantize(code, scale, size).to(theirs.dtype), theirs)


# -- torchao ---------------------------------------------------------------------------------------


@given(weight=base_weights(), granularity=GRANULARITIES, scale=SCALES)
def test_torchao_reads_what_is_cast(weight, granularity, scale):
    torchao: Any = pytest.importorskip("torchao.quantization")
    base = cast(weight, granularity=granularity, scale=scale)
    size = [1 if granularity == "row" else len(weight), weight.shape[1]]
    theirs = torchao.Float8Tensor(base.weight, base.scale.reshape(-1, 1), size, dtype=F32)
    assert torch.equal(theirs.dequantize(), base.dequantize())


@given(
    weight=base_weights(columns=(2, 70)),  # rows of one weight it doesn't cast
    granularity=st.sampled_from(["PerRow", "PerTensor"]),
)
def test_what_torchao_casts_is_read(weight, granularity):
    """Of a row whose scale is 0 or rounds to it, it makes NaN, which is refused."""
    torchao: Any = pytest.importorskip("torchao.quantization")
    by = getattr(torchao, granularity)()
    theirs = torchao.Float8Tensor.from_hp(weight, granularity=by)
    scale = theirs.scale.reshape(-1, 1) if granularity == "PerRow" else theirs.scale.reshape(())
    base = Base(as_code(theirs.qdata), scale)
    if not scale.all():
        with pytest.raises(FalqonError, match=f"{int((scale == 0).sum())} of its .* are zero"):
            check_base("w", base, "w")
        return
    check_base("w", base, "w")
    assert torch.equal(base.dequantize(), theirs.dequantize(F32))


# -- transformers ----------------------------------------------------------------------------------


@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    scales=st.sampled_from(["float", "ue8m0"]),
    data=st.data(),
)
def test_what_transformers_writes_in_blocks_is_read(grid, size, scales, data):
    """Numbers whose 448 / amax is finite; of smaller ones it makes NaN."""
    rows, columns = (n * of_block for n, of_block in zip(grid, size, strict=True))
    weight = data.draw(base_weights((rows, rows), (columns, columns), least=2.0**-100))
    settings = SimpleNamespace(weight_block_size=size, scale_fmt=scales)
    quantizer: Any = SimpleNamespace(quantization_config=settings)
    code, scale = transformers_fp8.Fp8Quantize(quantizer)._quantize_one("w", weight).values()
    assert scale.dtype == (F32 if scales == "float" else torch.float8_e8m0fnu)
    theirs = transformers_fp8.Fp8Dequantize(quantizer)._dequantize_one(code, scale, F32)
    assert blocks.check_grid("w", code, scale, size, "w") == size
    assert torch.equal(blocks.dequantize(code, scale, size), theirs)


@given(
    weight=base_weights((1, 96), (1, 96)),
    others=st.lists(st.integers(1, 96), max_size=2),
    scale=SCALES,
)
def test_transformers_reads_what_is_written_in_the_fp8_form(weight, others, scale):
    """One scale for all of a weight, said once a block; blocks divide all sides of all layers."""
    base = cast(weight, granularity="tensor", scale=scale)
    layers: Any = [SimpleNamespace(shape=s) for s in (weight.shape, *((n, n) for n in others))]
    block = block_size(layers)
    assert all(side % block == 0 for layer in layers for side in layer.shape)
    state = {each.name: each.of(base) for each in stored("fp8", weight.shape, block)}
    code, scales = state["weight"], state["weight_scale_inv"]
    theirs = transformers_fp8.Fp8Dequantize(None)._dequantize_one(code, scales, F32)
    assert torch.equal(theirs, base.dequantize())
    again = loaded(state, quant_method="fp8", weight_block_size=[block, block])
    assert torch.equal(again.code, base.code)
    assert torch.equal(again.scale, base.scale.expand(len(weight), 1))


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
