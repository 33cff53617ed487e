"""INT8 and NVFP4 bases as `save_fp8` writes them: what compressed-tensors itself would write."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.config import Scale
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.site import nvfp4
from falqon_fx.site.numerics import E4M3
from tests.exports import dense, export, in_fp8, read, sites, wide_llama
from tests.folders import IDS, lora
from tests.models import fill_b
from tests.parameters import slow
from tests.test_int8_checkpoints import written
from tests.test_nvfp4_checkpoints import by_compressed_tensors
from tests.test_nvfp4_numbers import weights
from tests.training import adam

compressed_tensors = pytest.importorskip("compressed_tensors")
safetensors = pytest.importorskip("safetensors.torch")

PRESETS = {"int8": ("W8A8", "int-quantized"), "nvfp4": ("NVFP4A16", "nvfp4-pack-quantized")}
FUSED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
QKV = [f"model.layers.0.self_attn.{name}" for name in FUSED[0]]
# What `save_fp8` leaves out of the config; nothing there is of the weights.
LEFT_OUT = {
    "global_compression_ratio", "moe_sparsity_config", "sparsity_config", "transform_config",
    "version",
}  # fmt: skip


def by_the_package(model: Any, folder: Path, kind: str, scales: dict[str, Tensor]) -> Path:
    """What the package writes of a dense model in float32 with these scales: of rows in INT8, of a
    whole weight, inverted, in NVFP4.
    """
    from compressed_tensors import quantization
    from compressed_tensors.quantization.utils import calculate_qparams

    preset, form = PRESETS[kind]
    group = quantization.preset_name_to_scheme(preset, ["Linear"])
    config = quantization.QuantizationConfig(
        config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="frozen"
    )
    quantization.apply_quantization_config(model, config)
    for path, scale in scales.items():
        module: Any = model.get_submodule(path)
        if kind == "nvfp4":
            blocks = module.weight.detach().view(len(module.weight), -1, 16)
            module.weight_global_scale.data = scale.clone()
            given = blocks.amin(-1), blocks.amax(-1), group.weights, scale
            scale, _ = calculate_qparams(*given)
        module.weight_scale.data = scale
    compressor = compressed_tensors.ModelCompressor.from_pretrained_model(
        model, quantization_format=form
    )
    compressor.compress_model(model)
    model.save_pretrained(folder / "out")
    compressor.update_config(folder / "out")
    return folder


def global_scales(model: nn.Module, scale: Scale) -> dict[str, Tensor]:
    """As the package makes them, but one, the least, for layers that are fused."""
    from compressed_tensors.quantization.utils import generate_gparam

    named = model.named_modules()
    linears = {
        p: m.weight.detach() for p, m in named if isinstance(m, nn.Linear) and "head" not in p
    }
    own = {path: generate_gparam(w.amin(), w.amax()) for path, w in linears.items()}
    found = {}
    for path in own:
        parent, _, name = path.rpartition(".")
        group = next((each for each in FUSED if name in each), (name,))
        least = min((own[f"{parent}.{n}"] for n in group), key=float)
        found[path] = least if scale == "amax" else 2.0 ** least.log2().floor()
    return found


def settings(folder: Path) -> dict[str, Any]:
    """How the weights are quantized, by config.json."""
    found: dict[str, Any] = json.loads((folder / "out/config.json").read_text())
    (group,) = found["quantization_config"].pop("config_groups").values()
    for name in ("weights", "input_activations"):
        of_numbers = group.pop(name) or {}
        found[name] = {n: v for n, v in of_numbers.items() if v is not None}
    own = {n: v for n, v in found["quantization_config"].items() if n not in LEFT_OUT}
    return {**own, **group, **{n: found[n] for n in ("weights", "input_activations")}}


@pytest.mark.parametrize(
    ("kind", "scale", "at_hand"),
    [
        ("nvfp4", "amax", "folder"),
        ("int8", "amax", "folder"),
        slow("nvfp4", "pow2", "model"),
        slow("nvfp4", "pow2", "folder"),
        slow("int8", "pow2", "model"),
    ],
)
def test_it_is_what_the_package_writes_of_the_merged_weights(tmp_path, kind, scale, at_hand):
    """Tensors bit for bit, and the config, of W + s·B·A with the original W. (Of INT8 what the
    package writes of the same numbers: it divides by a scale that is multiplied by here.) Both
    packages read the same numbers in it.
    """
    model = wide_llama(target_modules="all-linear")
    fill_b(model, 0.05)
    merged = copy.deepcopy(model).merge_and_unload()
    copy.deepcopy(model).unload().save_pretrained(tmp_path / "original")
    original = {"base": tmp_path / "original"} if at_hand == "folder" else {}
    in_fp8(model, at_hand == "folder", b_size=0, base_dtype=kind, scale=scale)
    report = export(model, tmp_path, **original)
    assert report.cast_from == dict.fromkeys(report.layers, "base weight")
    assert len(report.layers) == 14
    assert f"14 layers in {kind.upper()} (compressed-tensors)" in str(report)
    found, as_read = read(tmp_path), dense(tmp_path)
    if kind == "nvfp4":
        scales = global_scales(merged, scale)
    else:
        merged, scales = dense(tmp_path), {p: found[f"{p}.weight_scale"] for p in report.layers}
    wanted = read(by_the_package(merged, tmp_path / "theirs", kind, scales))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert settings(tmp_path) == settings(tmp_path / "theirs")
    loaded = falqon_fx.load(tmp_path / "out", lora()).get_base_model()
    for path in report.layers:
        ours = loaded.get_submodule(path).get_base_layer().base().dequantize()
        theirs = as_read.get_submodule(path).weight
        # The package decodes NVFP4 in bfloat16, which has all of it where s is a power of two.
        bound = 2.0**-8 if (kind, scale) == ("nvfp4", "amax") else 0.0
        assert ((ours - theirs).abs() <= bound * theirs.abs()).all(), path


def test_what_no_adapter_changes_keeps_its_numbers(tmp_path):
    """Where layers that are fused share a scale, too: block scales move by a power of two. An
    adapter that is served beside it then has the base that it was trained on.
    """
    model = in_fp8(wide_llama(target_modules="all-linear"), True, base_dtype="nvfp4")
    layers = {p: m for p, m in model.named_modules() if isinstance(m, Fp8Linear)}
    names = {p: p.removeprefix("base_model.model.").removesuffix(".base_layer") for p in layers}
    own = {names[path]: layer.base().scale for path, layer in layers.items()}
    assert any(float(own[path]) != float(own[QKV[0]]) for path in QKV)
    model.base_model.set_adapter([])
    report = export(model, tmp_path)
    assert report.cast_from == dict.fromkeys(own, "unchanged")
    found = read(tmp_path)
    assert len({float(found[f"{path}.weight_global_scale"]) for path in QKV}) == 1
    loaded = falqon_fx.load(tmp_path / "out", lora()).get_base_model()
    for path, layer in layers.items():
        again = loaded.get_submodule(names[path]).get_base_layer().base()
        assert torch.equal(again.dequantize(), layer.base().dequantize()), path


@pytest.mark.parametrize("kind", [slow("int8"), "nvfp4"])
def test_a_published_base_is_trained_resumed_and_exported(tmp_path, kind):
    """Layers without an adapter keep the bytes that were published."""
    folder = {"int8": written, "nvfp4": by_compressed_tensors}[kind](tmp_path / "published")
    given = lora(target_modules=["q_proj", "down_proj"])
    model = falqon_fx.load(folder, given).train()
    config = FalqonConfig(base_dtype=kind, scale="amax", inner="eager")
    run = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    optimizer = adam(model)

    def steps(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            losses.append(run(IDS, labels=IDS).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return [float(loss.detach()) for loss in losses]

    first = steps(3)
    falqon_fx.save_checkpoint(model, tmp_path / "kept", optimizer=optimizer)
    wanted = steps(2)
    assert wanted[-1] < first[0]
    falqon_fx.load_checkpoint(model, tmp_path / "kept", optimizer=optimizer)
    assert steps(2) == wanted
    other = falqon_fx.load(folder, given)
    falqon_fx.load_checkpoint(other, tmp_path / "kept", optimizer=adam(other))
    report = falqon_fx.save_fp8(other, tmp_path / "out", progress=False)
    adapted = {path for path in report.layers if path.endswith(("q_proj", "down_proj"))}
    assert {report.cast_from[path] for path in adapted} == {f"{kind.upper()} weight"}
    alone = f"{QKV[0].removesuffix('q_proj')}o_proj."
    found, before = read(tmp_path), safetensors.load_file(folder / "model.safetensors")
    names = [name for name in before if name.startswith(alone)]
    assert len(names) == {"int8": 2, "nvfp4": 3}[kind]
    for name in names:
        wide = found[name].to(before[name].dtype)  # the package has W8A8's scales in bfloat16
        assert torch.equal(wide.view(torch.uint8), before[name].view(torch.uint8)), name


@pytest.mark.parametrize(("kind", "b_size"), [("nvfp4", 0.05), ("nvfp4", 0.001), ("fp8", 0.05)])
def test_what_a_second_cast_leaves_of_an_adapter_is_said(tmp_path, kind, b_size):
    """Of one that moves W by 70% nearly all; of one that moves it by 1% in four bits nothing."""
    model = in_fp8(wide_llama(), True, b_size=b_size, base_dtype=kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = export(model, tmp_path)
    before = {path: site.base() for path, site in sites(model).items()}
    again = dense(tmp_path)
    kept = added = 0.0
    for path, site in sites(model).items():
        moved = site.merged() - before[path]
        kept += float(((again.get_submodule(path).weight - before[path]) * moved).sum())
        added += float(moved.square().sum())
    assert report.left == pytest.approx(kept / added, abs=1e-4)
    few = report.left < 0.5  # from there on it is warned of
    assert few is (b_size < 0.01)
    told = [str(w.message) for w in caught if "of what the adapters add" in str(w.message)]
    assert len(told) == few
    sources = {report.cast_from[path] for path in before}
    assert sources == {f"{kind.upper()} weight"}
    assert report.cast_from["model.layers.0.mlp.down_proj"] == "unchanged"
    assert f"cast a second time, from {kind.upper()} weights" in str(report)
    assert f"{report.left:.0%} of what their adapters add is left" in str(report)


@given(weight=weights(), shift=st.integers(0, 12), mode=st.sampled_from(["pow2", "amax"]))
def test_block_scales_move_exactly_or_not_at_all(weight, shift, mode):
    scale = nvfp4.tensor_scale(weight.float().abs().amax(), mode)
    packed, divisor = nvfp4.cast(weight, scale), nvfp4.divisor_of(scale)
    assert nvfp4.rescaled(packed, scale, divisor) is packed
    moved = nvfp4.rescaled(packed, scale, divisor * 2.0**-shift)
    before = nvfp4.decode(packed, scale, torch.float32)
    if moved is not None:
        other = 1 / (divisor * 2.0**-shift)
        assert torch.equal(nvfp4.parted(moved)[0], nvfp4.parted(packed)[0])
        # Where no float32 has s as its reciprocal, the nearest has it but for one rounding.
        error = (nvfp4.decode(moved, other, torch.float32) - before).abs()
        assert (error <= (2.0**-22 if mode == "amax" else 0.0) * before.abs()).all()
    elif mode == "pow2":
        assert float(nvfp4.parted(packed)[1].view(E4M3).float().min()) < 2.0 ** (shift - 6)


@pytest.mark.parametrize("kind", ["int8", "nvfp4"])
def test_the_fp8_form_has_no_place_for_them(tmp_path, kind):
    model = in_fp8(wide_llama(), True, b_size=0, base_dtype=kind)
    with pytest.raises(FalqonError, match=f"its base weight is {kind.upper()}, which the fp8 form"):
        export(model, tmp_path, form="fp8")
    assert not list(tmp_path.iterdir())


def test_bases_of_two_kinds_are_refused(tmp_path):
    model = wide_llama()
    some = FalqonConfig(base_dtype="nvfp4", include=["*layers.0*"])
    falqon_fx.prepare(model, some, progress=False)
    falqon_fx.prepare(model, FalqonConfig(base_dtype="int8"), progress=False)
    with pytest.raises(FalqonError, match=r"and others of the model are (NVFP4|INT8)"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())
