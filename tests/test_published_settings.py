"""What published checkpoints say beside their weights: settings and tensors that change what these
mean, and such that training has no use for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.files.hf import quantization_config
from falqon_fx.site.numerics import E4M3
from tests.folders import lora
from tests.test_block_scales import UP, WAYS, edited, published

safetensors = pytest.importorskip("safetensors.torch")

INV = f"{UP}.weight_scale_inv"


def settings(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the config.json of a folder."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def put(name: str, of: str, value: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    return lambda tensors: tensors.update({name: value(tensors[of]).clone()})


REFUSED = {
    "bits of scales": (
        put(INV, INV, lambda t: t.to(torch.float8_e8m0fnu).view(torch.uint8)),
        rf"{UP}: .* with scales uint8 \[6, 2\]",
    ),
    "two scales": (
        put(f"{UP}.weight_scale", INV, lambda t: 2 * t),
        rf"{UP}: it has scales as {UP}\.weight_scale and as {UP}\.weight_scale_inv",
    ),
    "zero points": (
        put(f"{UP}.weight_zero_point", INV, lambda t: t.char() + 3),
        rf"{UP}: it has zero points that are not zero",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("way", WAYS)
def test_scales_that_mean_something_else_are_refused(tmp_path, what, way):
    change, told = REFUSED[what]
    edited(published(tmp_path / "fp8", True), change)
    with pytest.raises(FalqonError, match=told):
        WAYS[way](tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", WAYS)
def test_fp8_is_never_read_as_integers(tmp_path, way):
    """Bytes under the dtype of integers, with a scale for all of a weight."""
    folder = published(tmp_path / "fp8", True)
    for file in folder.glob("*.safetensors"):
        tensors = safetensors.load_file(file)
        own = {n: t.view(torch.int8) if t.dtype == E4M3 else t for n, t in tensors.items()}
        own = {n: t.flatten()[:1] if n.endswith("_inv") else t for n, t in own.items()}
        safetensors.save_file(own, file, metadata={"format": "pt"})
    with pytest.raises(FalqonError, match=r"weights are INT8, by its config\.json FP8|I8 already"):
        WAYS[way](tmp_path)


def test_what_training_has_no_use_for_is_left_out(tmp_path):
    """Zero points that are zero, of symmetric scales, and with a warning scales of a cache: what
    `prequantize` writes can be loaded.
    """
    folder = published(tmp_path / "fp8", True)

    def more(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.weight_zero_point"] = torch.zeros(6, 2).to(E4M3)
        tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)

    edited(folder, more)
    with pytest.warns(UserWarning, match="holds 1 scales of an FP8 cache"):
        wanted = falqon_fx.adapters(falqon_fx.load(folder, lora()))
    with pytest.warns(UserWarning, match="holds 1 scales of an FP8 cache"):
        WAYS["prequantize"](tmp_path)
    found = falqon_fx.adapters(falqon_fx.load(tmp_path / "out"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[path].base(), state.base()) for path, state in wanted.items())


@pytest.mark.parametrize("way", WAYS)
def test_weights_for_rotated_activations_are_refused(tmp_path, way):
    """SpinQuant's R4 of compressed-tensors; what is of weights alone is in them already."""
    apply = [{"targets": ["re:.*down_proj$"], "location": "weight_input", "inverse": True}]
    scheme: dict[str, Any] = {"type": "hadamard", "head_dim": 32, "apply": apply}
    folder = published(tmp_path / "fp8", True)

    def rotate(content: dict[str, Any]) -> None:
        content["quantization_config"]["transform_config"] = {"config_groups": {"R4": scheme}}

    settings(folder, rotate)
    assert len(falqon_fx.adapters(falqon_fx.load(folder, lora()))) == 14
    apply.append({"targets": ["re:.*down_proj$"], "location": "input"})
    settings(folder, rotate)
    with pytest.raises(FalqonError, match=r"made for a transform of activations \(R4: input\)"):
        WAYS[way](tmp_path)


def test_deepseek_v4_names_the_dtype_of_experts_in_either_place(tmp_path):
    """V4 beside the settings of its quantization, V4.1 among them."""
    given: dict[str, Any] = {"quant_method": "fp8"}
    for content in (
        {"expert_dtype": "fp4", "quantization_config": given},
        {"expert_dtype": "fp8", "quantization_config": {**given, "expert_dtype": "fp4"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert quantization_config(tmp_path) == {**given, "expert_dtype": "fp4"}
    (tmp_path / "config.json").write_text(json.dumps({"expert_dtype": "bf16"}))
    assert quantization_config(tmp_path) == {}
