"""A change of any file is found by its checksum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import falqon_fx
from falqon_fx.files import seals
from falqon_fx.files.storage import DamagedFileError
from tests.folders import dense_model, folder_of, lora, prequantize
from tests.test_writes import export, prepared_llama


def prequantized(folder: Path) -> Callable[[Path], Any]:
    prequantize(folder_of(dense_model(), folder.with_name("dense")), folder)
    return falqon_fx.load


def exported(folder: Path) -> Callable[[Path], Any]:
    export(prepared_llama(), folder)
    return lambda path: falqon_fx.load(path, lora())


@pytest.mark.parametrize("make", [prequantized, exported])
def test_a_change_of_any_file_is_found(tmp_path, make):
    """One character of each, and a file more or less."""
    folder = tmp_path / "out"
    load = make(folder)
    load(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    named = [path for path in files if path.suffix == ".json"]
    assert {path.name for path in named} >= {"config.json", "generation_config.json", "falqon.json"}
    for path in named + [path for path in files if path.suffix == ".safetensors"][:3]:
        whole = path.read_bytes()
        for content in (whole[:-3] + b"7" + whole[-2:], whole[:-1]):
            path.write_bytes(content)
            with pytest.raises(DamagedFileError, match=path.name.replace(".", r"\.")):
                load(folder)
        path.unlink()
        if path.name != "falqon.json":
            with pytest.raises(DamagedFileError, match="it is missing"):
                load(folder)
        path.write_bytes(whole)
    for name in ("model-2.safetensors", "model.safetensors.index.json"):
        (folder / name).write_bytes(b"{}")
        with pytest.raises(DamagedFileError, match=r"falqon\.json does not name it"):
            load(folder)
        (folder / name).unlink()
    (folder / "notes.txt").touch()  # what makes no model may be added
    load(folder)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_single_values_of_a_config_are_sealed(tmp_path, file):
    """Each of these would give another model without a word."""
    folder = tmp_path / "out"
    prequantized(folder)
    whole = (folder / file).read_text()
    values: dict[str, dict[str, Any]] = {
        "config.json": {"rms_norm_eps": 0.1, "hidden_act": "gelu", "rope_parameters": None},
        "adapter_config.json": {"lora_alpha": 9, "use_rslora": True, "lora_dropout": 0.5},
    }
    for key, value in values[file].items():
        content = json.loads(whole)
        assert content[key] != value
        (folder / file).write_text(json.dumps({**content, key: value}))
        with pytest.raises(DamagedFileError, match=file.replace(".", r"\.")):
            falqon_fx.load(folder)
    falqon_fx.load(folder, verify=False)


def test_an_export_without_its_manifest_is_a_checkpoint_like_those_of_others(tmp_path):
    load = exported(tmp_path / "out")
    (tmp_path / "out/falqon.json").unlink()
    load(tmp_path / "out")


def test_every_file_of_an_export_is_sealed(tmp_path):
    exported(tmp_path / "out")
    content = json.loads((tmp_path / "out/falqon.json").read_text())
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"falqon.json"}
    assert content["files"].keys() == files
    assert content["format"] == seals.EXPORT
