"""`save_fp8`: what the real engines' packages read back is what was trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.files.export_layers import ExportLayer
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests.exports import (
    F32,
    assert_one_cast_off,
    by_rows,
    export,
    in_fp8,
    layers_in,
    lora_modules,
    merged_by_peft,
    read,
    sites,
)
from tests.models import tiny_llama
from tests.parameters import PREPARED_OR_NOT, each_pair, each_value

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("compressed_tensors")


@each_pair(
    scale=["pow2", "amax"],
    granularity=["tensor", "row"],
    prepared=PREPARED_OR_NOT,
)
def test_without_a_trained_adapter_the_bytes_are_those_trained_on(
    tmp_path, prepared, granularity, scale
):
    options = {"granularity": granularity, "scale": scale}
    model = in_fp8(tiny_llama(), prepared, b_size=0, **options)
    expected = {path: (s.weight.clone(), s.scale.clone()) for path, s in sites(model).items()}
    report = export(model, tmp_path)
    assert len(expected) == 14
    assert report.cast_from == dict.fromkeys(expected, "unchanged")
    check_folder(tmp_path, expected, dict(model.get_base_model().named_parameters()))


@each_pair(
    scale=["pow2", "amax"],
    granularity=["tensor", "row"],
    prepared=PREPARED_OR_NOT,
)
def test_with_rows_the_bytes_are_those_trained_on(tmp_path, prepared, granularity, scale):
    model = by_rows(tiny_llama(), prepared, granularity=granularity, scale=scale)
    expected = {}
    for path, state in sites(model).items():
        out = len(state.applied)
        of_rows = state.scale[:out] if granularity == "row" else state.scale
        expected[path] = state.weight[:out].clone(), of_rows.clone()
    report = export(model, tmp_path)
    assert report.flushed.rows == 0
    assert report.cast_from == dict.fromkeys(expected, "unchanged")
    assert len(expected) == 14
    check_folder(tmp_path, expected, dict(model.get_base_model().named_parameters()))


def check_folder(
    folder: Path, expected: dict[str, tuple[Tensor, Tensor]], parameters: dict[str, Tensor]
) -> None:
    """Weights and scales are the expected ones, all other tensors the model's."""
    tensors = read(folder)
    for path, (weight, scale) in expected.items():
        found, of_rows = tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"]
        assert found.dtype == E4M3
        assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8))
        assert (of_rows.dtype, of_rows.shape) == (F32, (len(weight), 1))
        assert torch.equal(of_rows, scale.expand(len(weight), 1))
    others = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in expected}
    assert set(others) == {n for n in parameters if "base_layer" not in n and "lora_" not in n}
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in others.items())


@each_value(
    scale=["pow2", "amax"], granularity=["tensor", "row"], at_hand=["model", "folder", "nothing"]
)
def test_a_trained_adapter_is_cast_with_its_weight_at_once(tmp_path, at_hand, granularity, scale):
    """q(W + s·B·A), bit for bit, of the base weight where the model or a folder has it, else of
    dq(W); and the report says which.
    """
    model = tiny_llama()
    weights = {path: m.base_layer.weight.detach().clone() for path, m in lora_modules(model)}
    model.get_base_model().save_pretrained(tmp_path / "plain")
    stored = safetensors.load_file(tmp_path / "plain/model.safetensors")
    names = {n: n.replace(".base_layer", "") for n in stored}
    safetensors.save_file(
        {names[n]: t for n, t in stored.items() if "lora_" not in n},
        tmp_path / "plain/model.safetensors",
    )
    options = {"granularity": granularity, "scale": scale}
    model = in_fp8(model, at_hand != "model", **options)
    if at_hand == "nothing":
        weights = {path: site.base() for path, site in sites(model).items()}
    arguments = {"base": tmp_path / "plain"} if at_hand == "folder" else {}
    report = export(model, tmp_path, **arguments)

    source = "FP8 weight" if at_hand == "nothing" else "base weight"
    assert report.cast_from == dict.fromkeys(weights, source)
    assert ("14 were cast a second time" in str(report)) is (at_hand == "nothing")
    assert (report.left is None) is (at_hand != "nothing")
    spec = SiteSpec.from_config(FalqonConfig(**options))
    found = layers_in(tmp_path)
    assert len(found) == 14
    for path, module in lora_modules(model):
        a, b = (part.default.weight.detach() for part in (module.lora_A, module.lora_B))
        expected = cast_base(weights[path] + (b @ a) * 2.0, spec)
        assert torch.equal(found[path].code, expected.code)
        assert torch.equal(found[path].scale, expected.scale.expand(len(b), 1))
    if at_hand != "folder":
        assert_one_cast_off(tmp_path, merged_by_peft(model))


def test_each_layer_is_cast_once_and_as_it_is_written(tmp_path, monkeypatch):
    """Not all at once: as much memory is needed as a file holds, not as the model does."""
    cast, written, seen = ExportLayer.cast, falqon_fx.files.storage.save_tensors, []
    monkeypatch.setattr(
        ExportLayer, "cast", lambda self, left: seen.append(self.path) or cast(self, left)
    )
    monkeypatch.setattr(
        falqon_fx.files.storage, "save_tensors", lambda *args: seen.append("file") or written(*args)
    )
    report = export(in_fp8(tiny_llama(), True), tmp_path, max_shard_size="20KB")
    assert Counter(seen) == {**dict.fromkeys(report.layers, 1), "file": seen.count("file")}
    first = seen.index("file")
    assert 0 < first < 14  # of the 14 layers
