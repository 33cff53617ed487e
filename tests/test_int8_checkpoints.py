"""INT8 checkpoints of compressed-tensors (W8A8) as bases: loaded as they are, prequantized,
refused.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import falqon_fx
from falqon_fx import FalqonConfig, FalqonConfigError
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.site.base import Base, cast_base
from falqon_fx.site.spec import SiteSpec
from tests.folders import BF16, IDS, WIDE, dense_model, lora
from tests.parameters import slow
from tests.refusals import Change, assert_refused, damaged, lose, put, put_first, settings
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

    folder = damaged(source, tmp_path / "whole", change)
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

    folder = damaged(source, tmp_path / "static", change)
    assert len(falqon_fx.adapters(falqon_fx.load(folder, lora()))) == 7
    with pytest.warns(UserWarning, match="cast again here"):
        falqon_fx.prequantize(folder, tmp_path / "out", lora(), progress=False)
    assert len(falqon_fx.adapters(falqon_fx.load(tmp_path / "out"))) == 7


# -- refused ---------------------------------------------------------------------------------------


SCALE, WEIGHT = f"{UP}.weight_scale", f"{UP}.weight"
NO_BLOCKS = "as its scales, and config.json names no blocks"
DAMAGES: dict[str, tuple[Change, str]] = {
    "no scale": (lose(SCALE), r"holds no scale for it, which is int8 \[96, 64\]"),
    "NaN": (put_first(SCALE, float("nan")), "1 of its 96 scales in .* are NaN"),
    "Inf": (put_first(SCALE, float("inf")), "1 of its 96 scales in .* are Inf"),
    "zero": (put_first(SCALE, 0.0), "1 of its 96 scales in .* are zero"),
    "negative": (put_first(SCALE, -1.0), "1 of its 96 scales in .* are negative"),
    "too few": (put(SCALE, lambda t: t[:5]), rf"bfloat16 \[5, 1\] {NO_BLOCKS}"),
    "too few, alike": (put(SCALE, lambda t: t[:1].expand(5, 1)), rf"\[5, 1\] {NO_BLOCKS}"),
    "in groups": (
        put(SCALE, lambda t: t.repeat(1, 4) * torch.arange(1, 5)),
        rf"\[96, 4\] {NO_BLOCKS}",
    ),
    "integers": (put(SCALE, lambda t: t.int()), r"with scales int32 \[96, 1\]"),
    "FP8 beside it": (
        put(WEIGHT, lambda t: t.float().to(torch.float8_e4m3fn)),
        "has it in FP8, and model.* in INT8",
    ),
    "zero points": (
        put(f"{UP}.weight_zero_point", lambda t: torch.ones(len(t), 1).char(), of=WEIGHT),
        "zero points that are not zero",
    ),
    "another shape": (put(WEIGHT, lambda t: t[:, :32]), r"\[96, 32\].* (\[96, 64\]|model int8)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_file_is_refused_by_name(source, tmp_path, damage):
    change, told = DAMAGES[damage]
    assert_refused(damaged(source, tmp_path / "int8", change), UP, told)


def test_a_weight_beyond_the_scales_in_use_is_refused(source, tmp_path):
    """Its output would be Inf, and the loss NaN."""
    folder = damaged(source, tmp_path / "int8", put_first(SCALE, 1e30))
    assert_refused(folder, UP, "exceeds 65536", in_codes=True)


@pytest.mark.parametrize(
    ("given", "site", "told"),
    [
        ({"num_bits": 4}, "other", "its weights have 4 bits"),
        ({"type": "float"}, "_proj", "has it in INT8, by its config.json weights are FP8"),
        ({"strategy": "group", "group_size": 32}, "other", "its weights have .* by 'group'"),
    ],
    ids=str,
)
def test_other_forms_are_refused(source, tmp_path, given, site, told):
    folder = damaged(source, tmp_path / "other", lambda _: None)

    def change(content: dict[str, Any]) -> None:
        (group,) = content["quantization_config"]["config_groups"].values()
        group["weights"] |= given

    assert_refused(settings(folder, change), site, told)


def test_options_of_fp8_are_refused(source):
    with pytest.raises(FalqonConfigError, match="'fp8' is of FP8"):
        falqon_fx.load(source, lora(), FalqonConfig(adapter_dtype="fp8"))
