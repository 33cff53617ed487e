"""NVFP4 as NVIDIA's ModelOpt writes it: a folder that it wrote (`tests/modelopt/write.py`), and its
steps, which that folder confirms, on any weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from torch import Tensor

import falqon_fx
from falqon_fx.files import nvfp4_import
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.site import nvfp4
from falqon_fx.site.base import Base
from falqon_fx.site.numerics import E4M3
from tests.folders import lora
from tests.modelopt import steps
from tests.test_nvfp4_numbers import weights

safetensors = pytest.importorskip("safetensors.torch")

FOLDER = Path(__file__).parent / "modelopt"
ENDS = ("weight", "weight_scale", "weight_scale_2")
FUSED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]  # share the largest scale


def check_cast(weight: Tensor, scale: Tensor, codes: Tensor, of_blocks: Tensor) -> None:
    """A cast here is what ModelOpt has, bit for bit, where E4M3 has a block's scale. Where that
    would round to 0, ModelOpt takes the least, 2**-9, or 1 for zeros; here it is 0.125 with codes
    of 0, as in compressed-tensors: lost is what lies below 6 · 2**-10 · s.
    """
    own_codes, own = nvfp4.parted(nvfp4.cast(weight, scale))
    own_codes, codes = (t.unflatten(1, (-1, 8)) for t in (own_codes, codes))
    largest = weight.float().abs().unflatten(1, (-1, 16)).amax(-1)
    lost = (largest / (6 * scale)).to(E4M3).float() == 0
    assert torch.equal(own[~lost], of_blocks.view(torch.uint8)[~lost])
    assert torch.equal(own_codes[~lost], codes[~lost])
    assert bool((own.view(E4M3).float()[lost] == 0.125).all())
    assert not (own_codes[lost] & 0x77).any()
    least = torch.where(largest[lost] == 0, 1.0, 2.0**-9)
    assert torch.equal(of_blocks.float()[lost], least)


def base_of(codes: Tensor, of_blocks: Tensor, scale: Tensor) -> Base:
    """As `falqon_fx.load` reads it."""
    tensors = {f"w.{end}": t for end, t in zip(ENDS, (codes, of_blocks, scale), strict=True)}
    return nvfp4_import.base_of("w", nvfp4_import.names_of(tensors, FOLDER)["w"], tensors, FOLDER)


def test_what_it_wrote_is_what_its_steps_give_and_is_read_bit_for_bit():
    wrote = safetensors.load_file(FOLDER / "wrote/model.safetensors")
    dense = safetensors.load_file(FOLDER / "dense.safetensors")
    model = falqon_fx.load(FOLDER / "wrote", lora(target_modules=["q_proj"]))
    layers = {p: m for p, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert len(layers) == len(dense) == 7
    for path, layer in layers.items():
        name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
        codes, of_blocks, scale = (wrote[f"{name}.{end}"] for end in ENDS)
        weight, last = dense[f"{name}.weight"], name.rpartition(".")[2]
        group = next((g for g in FUSED if last in g), (last,))
        scales = [steps.scale_of(w) for n, w in dense.items() if n.split(".")[-2] in group]
        assert torch.equal(scale, torch.stack(scales).amax())
        by_steps = steps.cast(weight, scale)
        assert torch.equal(by_steps[0], codes)
        assert torch.equal(by_steps[1].view(torch.uint8), of_blocks.view(torch.uint8))
        check_cast(weight, scale, codes, of_blocks)
        assert torch.equal(layer.code, nvfp4.joined(codes, of_blocks.view(torch.uint8)))
        assert torch.equal(layer.base().dequantize(), steps.decode(codes, of_blocks, scale))


@given(weight=weights())
def test_its_steps_are_ours_both_ways(weight):
    """What it casts is read as it reads it, and what is cast here has its bytes."""
    scale = steps.scale_of(weight)
    assume(scale >= 2.0**-100)  # down to there S · s is no subnormal; of zeros its s is 0
    assert torch.equal(nvfp4.tensor_scale(weight.abs().amax(), "amax"), scale)
    codes, of_blocks = steps.cast(weight, scale)
    wanted = steps.decode(codes, of_blocks, scale)
    assert torch.equal(base_of(codes, of_blocks, scale).dequantize(), wanted)
    check_cast(weight, scale, codes, of_blocks)
    packed = nvfp4.cast(weight, scale)
    codes, blocks = nvfp4.parted(packed)
    decoded = steps.decode(codes, blocks.view(E4M3), scale)
    assert torch.equal(decoded, nvfp4.decode(packed, scale, torch.float32))
