"""INT8 checkpoints of compressed-tensors (W8A8) as bases: loaded as they are, prequantized,
refused.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import falqon_fx
from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.site.base import Base, cast_base
from falqon_fx.site.spec import SiteSpec
from tests.folders import BF16, IDS, WIDE, dense_model, lora
from tests.parameters import slow
from tests.sites import randn
from tests.strategies import SEEDS

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
compressed_tensors = pytest.importorskip("compressed_tensors")

UP = "model.layers.0.mlp.up_proj"
CONFIG = FalqonConfig(base_dtype="int8", scale="amax", inner="eager")


def qparams(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Scales and zero points of rows, as the package makes them."""
    from compressed_tensors.quantization.utils import calculate_qparams

    low, high = weight.aminmax(dim=1, keepdim=True)
    found: tuple[Tensor, Tensor] = calculate_qparams(low, high, args)
    return found


def written(folder: Path, dtype: torch.dtype = BF16, shard: str = "5GB") -> Path:
    """A Llama in W8A8, written by the real package: int8 weights, one scale per row."""
    from compressed_tensors import quantization

    torch.manual_seed(0)
    model = dense_model(dtype=dtype, num_hidden_layers=1, **WIDE)
    group = quantization.preset_name_to_scheme("W8A8", ["Linear"])
    config = quantization.QuantizationConfig(
        config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="frozen"
    )
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            scale, _ = qparams(module.weight, module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    compressor = compressed_tensors.ModelCompressor.from_pretrained_model(
        model, quantization_format="int-quantized"
    )
    compressor.compress_model(model)
    model.save_pretrained(folder, max_shard_size=shard)
    compressor.update_config(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("int8"), shard="20KB")


@functools.cache
def tensors_in(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {n: t for file in files for n, t in safetensors.load_file(file).items()}


def test_its_weights_are_taken_as_they_are(source):
    """Bytes and scales, sharded with an index; what it computes is what transformers does with the
    weights decoded, and compiled code is told by name what they are.
    """
    assert len(list(source.glob("*.safetensors"))) > 1
    tensors, model = tensors_in(source), falqon_fx.load(source, lora(target_modules=["q_proj"]))
    layers = {p: m for p, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert len(layers) == 7
    for path, layer in layers.items():
        name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
        assert layer.code.dtype == torch.int8
        assert torch.equal(layer.code, tensors[f"{name}.weight"])
        assert torch.equal(layer.base().scale, tensors[f"{name}.weight_scale"].float())
    config = transformers.CompressedTensorsConfig(dequantize=True)
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=config
    )
    exact = model.get_submodule(f"base_model.model.{UP}").base().dequantize()
    by_package = dense.get_submodule(UP).weight.float()
    assert ((exact - by_package).abs() <= 2.0**-8 * by_package.abs()).all()  # in bfloat16
    run = torch.compile(model, backend="falqon", options=dict[str, Any](config=CONFIG))
    loss = run(IDS, labels=IDS).loss
    loss.backward()
    assert loss.isfinite()
    with pytest.raises(BackendCompilerFailed, match="used base_dtype='int8', granularity='row'"):
        torch.compile(model, backend="falqon", options={"inner": "eager"})(IDS)


@given(
    out=st.integers(1, 20),
    features=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, BF16]),
    spread=st.integers(0, 8),
    seed=SEEDS,
)
def test_it_is_read_bit_for_bit_as_the_package_does(out, features, dtype, spread, seed):
    """Its codes go down to -128, which ours do not."""
    from compressed_tensors import quantization
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    args = quantization.preset_name_to_scheme("W8A8", ["Linear"]).weights
    weight = randn(out, features, seed=seed) * (randn(out, 1, seed=seed + 1) * spread).exp2()
    scale, zero = qparams(weight.to(dtype), args)
    code = quantize(weight.to(dtype), scale, zero, args, dtype=torch.int8)
    theirs = dequantize(code, scale.float(), None, args)
    assert code.dtype == torch.int8
    assert torch.equal(Base(code, scale.float()).dequantize(), theirs.float())


@pytest.mark.parametrize("base_dtype", ["int8", slow("fp8")])
def test_prequantize_casts_what_it_decodes(source, tmp_path, base_dtype):
    """In either dtype, with a warning: it is a second cast."""
    config = FalqonConfig(base_dtype=base_dtype)
    with pytest.warns(UserWarning, match="cast again here, which costs about what"):
        falqon_fx.prequantize(source, tmp_path / "out", lora(), config, progress=False)
    model, spec = falqon_fx.load(tmp_path / "out"), SiteSpec.from_config(config)
    for path, state in falqon_fx.adapters(model).items():
        name = path.removeprefix("base_model.model.")
        code, scale = (tensors_in(source)[f"{name}.{end}"] for end in ("weight", "weight_scale"))
        wanted = cast_base(code.float() * scale.float(), spec)
        assert state.weight.dtype == wanted.weight.dtype
        assert torch.equal(state.weight.view(torch.uint8), wanted.weight.view(torch.uint8))
        assert torch.equal(state.scale, wanted.scale)


@pytest.mark.parametrize("shape", [(1,), (), (1, 1)], ids=str)
def test_one_scale_for_all_of_a_weight_is_taken(source, tmp_path, shape):
    """By `load` as it is; `prequantize` casts what it decodes."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"][3].reshape(shape)

    folder = changed(source, tmp_path / "whole", change)
    base = falqon_fx.adapters(falqon_fx.load(folder, lora()))[f"base_model.model.{UP}"].base()
    code, scale = (tensors_in(source)[f"{UP}.{end}"] for end in ("weight", "weight_scale"))
    assert torch.equal(base, code.float() * scale[3].float())
    config = FalqonConfig(base_dtype="int8")
    with pytest.warns(UserWarning, match="cast again here"):
        falqon_fx.prequantize(folder, tmp_path / "out", lora(), config, progress=False)
    again = falqon_fx.adapters(falqon_fx.load(tmp_path / "out"))[f"base_model.model.{UP}"]
    assert torch.equal(again.base(), cast_base(base, SiteSpec.from_config(config)).dequantize())


def test_static_scales_of_activations_are_left_out(source, tmp_path):
    """x is cast by its own largest values."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.input_scale"] = torch.tensor([0.01])
        tensors[f"{UP}.input_zero_point"] = torch.tensor([3], dtype=torch.int8)

    folder = changed(source, tmp_path / "static", change)
    assert len(falqon_fx.adapters(falqon_fx.load(folder, lora()))) == 7
    with pytest.warns(UserWarning, match="cast again here"):
        falqon_fx.prequantize(folder, tmp_path / "out", lora(), progress=False)
    assert len(falqon_fx.adapters(falqon_fx.load(tmp_path / "out"))) == 7


# -- refused ---------------------------------------------------------------------------------------


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy with other tensors, in one file."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source / name, folder)
    tensors = dict(tensors_in(source))
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def settings_of(folder: Path, **given: Any) -> Path:
    """A copy of the folder's config.json with other arguments of the weights."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["weights"] |= given
    file.write_text(json.dumps(config))
    return folder


def _lose_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{UP}.weight_scale"]


def _nan_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].clone().fill_(float("nan"))


def _short_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"][:5].clone()


def _in_groups(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].repeat(1, 4) * torch.arange(1, 5)


def _mixed(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].float().to(torch.float8_e4m3fn)


def _zero_points(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight_zero_point"] = torch.ones(len(tensors[f"{UP}.weight"]), 1).char()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_lose_scale, "holds no scale for it"),
        (_nan_scale, "scales in .* are NaN"),
        (_short_scale, f"{UP}"),
        (_in_groups, f"{UP}"),
        (_mixed, "its weights are FP8, INT8"),
        (_zero_points, "zero points"),
    ],
)
def test_a_bad_file_is_refused_by_name(source, tmp_path, change, told):
    folder = changed(source, tmp_path / "bad", change)
    with pytest.raises(FalqonError, match=told):
        falqon_fx.load(folder, lora())


@pytest.mark.parametrize(
    "change", [_lose_scale, _nan_scale, _short_scale, _in_groups, _zero_points]
)
def test_prequantize_refuses_the_same(source, tmp_path, change):
    folder = changed(source, tmp_path / "bad", change)
    with pytest.raises(FalqonError, match="up_proj"):
        falqon_fx.prequantize(folder, tmp_path / "out", lora(), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given", [{"num_bits": 4}, {"type": "float"}, {"strategy": "group", "group_size": 32}], ids=str
)
def test_other_forms_are_refused(source, tmp_path, given):
    folder = settings_of(changed(source, tmp_path / "other", lambda _: None), **given)
    with pytest.raises(FalqonError, match=r"its weights (have|are)"):
        falqon_fx.load(folder, lora())


def test_options_of_fp8_are_refused(source):
    with pytest.raises(FalqonConfigError, match="'fp8' is of FP8"):
        falqon_fx.load(source, lora(), FalqonConfig(adapter_dtype="fp8"))
