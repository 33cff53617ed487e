"""FP8 checkpoints of others are loaded as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import (
    FalqonConfig,
    FalqonConfigError,
    FalqonError,
)
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests.folders import BF16, IDS, dense_model, exported, folder_of, lora
from tests.parameters import slow
from tests.refusals import (
    Change,
    assert_load_refuses,
    assert_refused,
    damaged,
    lose,
    put,
    put_byte,
    put_first,
    settings,
)

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize("form", ["compressed-tensors", "fp8"])
@pytest.mark.parametrize("scale", ["pow2", "amax"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["all", "q_proj"])
def test_fp8_weights_are_taken_as_they_are(tmp_path, form, scale, targets):
    exported(tmp_path / "fp8", form, scale=scale)
    tensors = safetensors.load_file(tmp_path / "fp8/model.safetensors")
    model = falqon_fx.load(tmp_path / "fp8", lora(target_modules=targets))
    end = "weight_scale" if form == "compressed-tensors" else "weight_scale_inv"
    count = 0
    for path, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
            weight, out = tensors[f"{name}.weight"], module.out_features
            assert weight.dtype == E4M3
            assert torch.equal(module.code, weight.view(torch.uint8))
            given = tensors[f"{name}.{end}"]
            expected = given if form == "compressed-tensors" else given[0, 0].expand(out, 1)
            assert torch.equal(module.base().scale, expected)
            assert f"{scale} " in module.spec_text
            assert (module.dtype, module.path) == (BF16, f"base_model.model.{name}")
            adapted = targets == "all-linear" or "q_proj" in path
            assert path.endswith(".base_layer") is adapted
            count += 1
    assert count == 14
    assert len(falqon_fx.adapters(model)) == (14 if targets == "all-linear" else 2)


def test_an_index_says_which_file_holds_an_fp8_weight(tmp_path):
    """Others of the name, in files that are left from before, are not looked at."""
    exported(tmp_path / "fp8")
    (file,) = (tmp_path / "fp8").glob("*.safetensors")
    tensors = safetensors.load_file(file)
    norm = "model.norm.weight"
    index = dict.fromkeys(tensors, "a.safetensors") | {norm: "b.safetensors"}
    first = {name: t for name, t in tensors.items() if name != norm}
    safetensors.save_file(first | {norm: tensors[norm] + 1}, file.with_name("a.safetensors"))
    stale = {name: torch.zeros_like(t) for name, t in first.items()}
    safetensors.save_file(stale | {norm: tensors[norm]}, file.with_name("b.safetensors"))
    file.unlink()
    written = tmp_path / "fp8/model.safetensors.index.json"
    written.write_text(json.dumps({"weight_map": index}))
    model = falqon_fx.load(tmp_path / "fp8", lora())
    assert torch.equal(model.get_parameter(f"base_model.model.{norm}"), tensors[norm])
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(f"base_model.model.{name}.base_layer")
    assert torch.equal(layer.code, tensors[f"{name}.weight"].view(torch.uint8))
    written.write_text(json.dumps({"weight_map": {**index, "more": "b.safetensors"}}))
    with pytest.raises(FalqonError, match=r"more: .* says that b\.safetensors holds it"):
        falqon_fx.load(tmp_path / "fp8", lora())


@pytest.mark.parametrize("scheme", ["FP8", "FP8_DYNAMIC"], ids=["tensor", "channel"])
def test_what_compressed_tensors_wrote_is_taken_as_it_is(tmp_path, scheme):
    """Scales a tensor with static activations, and scales a row, from the real package; in bf16."""
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization

    model = dense_model()
    group = quantization.preset_name_to_scheme(scheme, ["Linear"])
    config = quantization.QuantizationConfig(
        config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="frozen"
    )
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            amax = module.weight.abs().amax(None if scheme == "FP8" else 1, keepdim=True)
            module.weight_scale.data.copy_((amax / 448).reshape(module.weight_scale.shape))
    compressor = compressed_tensors.ModelCompressor.from_pretrained_model(
        model, quantization_format="float-quantized"
    )
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    assert_taken_as_it_is(tmp_path, ".weight_scale")


def test_the_fp8_form_with_a_scale_a_tensor_is_taken_as_it_is(tmp_path):
    """As AutoFP8 wrote it: scalars in float32, activations with a static scale."""
    model = dense_model()
    settings = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    model.config.quantization_config = settings
    model.config.save_pretrained(tmp_path)
    tensors = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            scale = module.weight.abs().amax().float() / 448
            tensors[f"{path}.weight"] = (module.weight.float() / scale).to(E4M3)
            tensors[f"{path}.weight_scale"] = scale
            tensors[f"{path}.input_scale"] = torch.tensor(0.01)
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_taken_as_it_is(tmp_path, ".weight_scale")


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.output_scale",)])
def test_scales_of_a_cache_are_left_out_with_a_warning(tmp_path, names):
    exported(tmp_path / "fp8")
    file = tmp_path / "fp8/model.safetensors"
    tensors = safetensors.load_file(file)
    tensors |= {f"model.layers.{i}.self_attn.{n}": torch.ones(1) for i in (0, 1) for n in names}
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"holds {2 * len(names)} scales of an FP8 cache"):
        model = falqon_fx.load(tmp_path / "fp8", lora())
    assert len(falqon_fx.adapters(model)) == 14


def assert_taken_as_it_is(folder: Path, end: str) -> None:
    tensors = safetensors.load_file(folder / "model.safetensors")
    states = falqon_fx.adapters(falqon_fx.load(folder, lora()))
    assert len(states) == 14
    for path, state in states.items():
        name = path.removeprefix("base_model.model.")
        weight, scale = tensors[f"{name}.weight"], tensors[name + end].float()
        assert torch.equal(state.weight.view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(state.scale, scale.reshape(-1, 1).expand(len(weight), 1))


def test_an_fp8_model_computes_what_transformers_does(tmp_path):
    exported(tmp_path / "fp8", dtype=torch.float32)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.float32, quantization_config=config
    )
    model = falqon_fx.load(tmp_path / "fp8", lora(target_modules=["q_proj"]))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize("scale", ["pow2", slow("amax")])
def test_an_fp8_model_trains_and_is_exported_again(tmp_path, scale):
    """The base stays what it was; a layer's bytes change where its adapter was trained."""
    exported(tmp_path / "fp8", scale=scale)
    targets = {"target_modules": ["q_proj", "down_proj"]}
    model = falqon_fx.load(tmp_path / "fp8", lora(**targets)).train()
    options = {"config": FalqonConfig(inner="eager", scale=scale)}
    compiled = torch.compile(model, backend="falqon", options=options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    for _ in range(3):
        compiled(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = safetensors.load_file(tmp_path / "fp8/model.safetensors")
    report = falqon_fx.save_fp8(model, tmp_path / "again", progress=False)
    after = safetensors.load_file(tmp_path / "again/model.safetensors")
    sites = falqon_fx.adapters(model)
    assert len(sites) == 4
    plan = SiteSpec.from_config(FalqonConfig(scale=scale))
    for path, source in report.cast_from.items():
        name, site = f"{path}.weight", sites.get(f"base_model.model.{path}")
        old, new = (found[name].view(torch.uint8) for found in (before, after))
        assert source == ("unchanged" if site is None else "FP8 weight")
        if site is None:
            assert torch.equal(new, old)
            continue
        assert torch.equal(site.weight.view(torch.uint8), old)
        ((a, b, scaling),) = site.adapters
        expected = cast_base(site.base() + (b @ a).detach() * scaling, plan)
        assert torch.equal(new, expected.code)
        assert torch.equal(after[f"{name}_scale"], expected.scale)
        assert not torch.equal(new, old)


def test_rows_of_others_are_not_written(tmp_path):
    exported(tmp_path / "fp8")
    with pytest.raises(FalqonConfigError, match="'rows' would write into the weights of"):
        falqon_fx.load(tmp_path / "fp8", lora(), FalqonConfig(update="rows"))


def test_a_dense_checkpoint_is_not_loaded_as_fp8(tmp_path):
    folder_of(dense_model(), tmp_path / "dense")
    with pytest.raises(FalqonError, match=r"Call falqon_fx\.prequantize on it"):
        falqon_fx.load(tmp_path / "dense")


def test_other_quantizations_are_refused(source, tmp_path):
    folder = damaged(source, tmp_path / "fp8", lambda _: None)

    def change(content: dict[str, Any]) -> None:
        content["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4

    assert_refused(settings(folder, change), "fp8", "4 bits of type 'float'")


# -- damaged ---------------------------------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj"
SCALE, WEIGHT = f"{UP}.weight_scale", f"{UP}.weight"
DAMAGES: dict[str, tuple[Change, str]] = {
    "no scale": (lose(SCALE), r"holds no scale for it, which is float8_e4m3fn \[48, 32\]"),
    "too few": (put(SCALE, lambda t: t[1:]), r"float32 \[47, 1\] as its scales.* names no blocks"),
    "too few, alike": (put(SCALE, lambda _: torch.ones(47, 1)), r"\[47, 1\] as its scales"),
    "turned": (put(SCALE, lambda t: t.t()), r"float32 \[1, 48\] as its scales"),
    "integers": (put(SCALE, lambda t: t.int()), r"scales int32 \[48, 1\]"),
    "INT8 beside it": (put(WEIGHT, lambda t: t.float().char()), "has it in INT8, and .* in FP8"),
    "E5M2": (
        put(WEIGHT, lambda t: t.float().to(torch.float8_e5m2)),
        r"float8_e5m2 \[48, 32\] for it",
    ),
}
# Of values that `prequantize` doesn't come to: it takes no FP8 with a scale per row.
OF_LOAD: dict[str, tuple[Change, str]] = {
    "NaN": (put_first(SCALE, float("nan")), "1 of its 48 scales in .* are NaN"),
    "Inf": (put_first(SCALE, float("inf")), "1 of its 48 scales in .* are Inf"),
    "zero": (put_first(SCALE, 0.0), "1 of its 48 scales in .* are zero"),
    "negative": (put_first(SCALE, -1.0), "1 of its 48 scales in .* are negative"),
    "huge": (put_first(SCALE, 2.0**100), "exceeds 65536"),
    "code": (put_byte(WEIGHT, 0xFF), "1 of its FP8 bytes in .* are NaN"),
    "another shape": (put(WEIGHT, lambda t: t[:, :16]), r"\[48, 16\] as its code, the model"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("fp8")
    exported(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_by_name(source, tmp_path, damage):
    change, told = DAMAGES[damage]
    assert_refused(damaged(source, tmp_path / "fp8", change), UP, told)


@pytest.mark.parametrize("damage", OF_LOAD)
def test_damaged_values_are_refused_by_name(source, tmp_path, damage):
    change, told = OF_LOAD[damage]
    assert_load_refuses(damaged(source, tmp_path / "fp8", change), UP, told)


def test_prequantize_sends_whole_rows_to_load(source, tmp_path):
    with pytest.raises(FalqonError, match=r"_proj: its weight is FP8 already.*load takes it as"):
        falqon_fx.prequantize(source, tmp_path / "out", lora(), progress=False)
    assert not [*tmp_path.iterdir()]
    assert len(falqon_fx.adapters(falqon_fx.load(source, lora()))) == 14
