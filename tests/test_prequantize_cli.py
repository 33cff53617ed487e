"""`falqon-fx prequantize` and `falqon-fx export`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from pydantic import TypeAdapter

import falqon_fx
from falqon_fx import (
    ExportReport,
    FalqonConfig,
    PrequantizeReport,
)
from falqon_fx_cli.main import main
from tests.folders import BF16, IDS, dense_model, exported, folder_of, lora, prequantize
from tests.models import fill_b
from tests.parameters import slow

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


def run(*arguments: str) -> int:
    return main(arguments)


def test_prequantize_and_export_on_the_command_line(tmp_path, capsys):
    source = folder_of(dense_model(), tmp_path / "dense")
    assert run("prequantize", str(source), str(tmp_path / "json"), "--json") == 0
    made = TypeAdapter(PrequantizeReport).validate_json(capsys.readouterr().out)
    assert (made.directory, made.layers) == (tmp_path / "json", 14)
    out, serving = tmp_path / "out", tmp_path / "serving"
    assert (
        run("prequantize", str(source), str(out), "--rank", "4", "--workers", "2", "--quiet") == 0
    )
    assert "14 layers in FP8" in capsys.readouterr().out
    model = falqon_fx.load(out)
    fill_b(model, 0.05)
    falqon_fx.save_checkpoint(model, tmp_path / "trained")
    arguments = ["--checkpoint", str(tmp_path / "trained"), "--quiet"]
    assert run("export", str(out), str(serving), *arguments) == 0
    printed = capsys.readouterr().out
    assert "14 layers in FP8" in printed
    assert "14 were cast a second time" in printed
    falqon_fx.save_fp8(model, tmp_path / "expected", progress=False)
    assert read(serving) == read(tmp_path / "expected")
    arguments = ["--base", str(source), *arguments]
    assert run("export", str(out), str(tmp_path / "once"), *arguments, "--json") == 0
    report = TypeAdapter(ExportReport).validate_json(capsys.readouterr().out)
    assert list(report.cast_from.values()) == ["base weight"] * 14
    assert read(tmp_path / "once") != read(serving)


def read(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("prepared", [slow(False, id="unprepared"), True])
def test_export_of_a_checkpoint_over_the_dense_model_on_the_command_line(
    tmp_path, capsys, prepared
):
    """Cast from the folder's base weights, whether the checkpoint has FP8 ones or not."""
    source = folder_of(dense_model(), tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=BF16)
    model = peft.get_peft_model(dense, lora())
    model.save_pretrained(tmp_path / "adapter")
    config = FalqonConfig(inner="eager")
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    torch.compile(model, backend="falqon", options=dict[str, Any](config=config))(IDS)
    fill_b(model, 0.05)
    falqon_fx.save_checkpoint(model, tmp_path / "trained")
    falqon_fx.save_fp8(model, tmp_path / "expected", base=source, progress=False)
    arguments = ["--adapter", str(tmp_path / "adapter"), "--quiet"]
    arguments += ["--checkpoint", str(tmp_path / "trained")]
    assert run("export", str(source), str(tmp_path / "out"), *arguments) == 0
    assert "14 were cast from their base weights" in capsys.readouterr().out
    assert read(tmp_path / "out") == read(tmp_path / "expected")


@pytest.mark.parametrize("form", ["compressed-tensors", "fp8"])
def test_export_of_a_peft_adapter_on_the_command_line(tmp_path, capsys, form):
    dense = dense_model()
    source = folder_of(dense, tmp_path / "dense")
    model = peft.get_peft_model(dense, lora())
    fill_b(model, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    arguments = ("--adapter", str(tmp_path / "adapter"), "--form", form, "--quiet")
    assert run("export", str(source), str(tmp_path / "out"), *arguments) == 0
    printed = capsys.readouterr().out
    assert f"14 layers in FP8 ({form})" in printed
    assert "14 were cast from their base weights" in printed
    assert run("export", str(source), str(tmp_path / "other")) == 1
    assert "--adapter: is missing" in capsys.readouterr().err


def trained_folders(tmp_path: Path) -> tuple[Path, Path]:
    """A prequantized model, and the adapter that was trained on it, with a tokenizer of its own."""
    source = folder_of(dense_model(), tmp_path / "dense")
    (source / "tokenizer.json").write_text("{}")
    prequantize(source, tmp_path / "fp8")
    model = falqon_fx.load(tmp_path / "fp8")
    fill_b(model, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    falqon_fx.save_fp8(model, tmp_path / "expected", progress=False)
    return tmp_path / "fp8", tmp_path / "adapter"


def test_export_of_an_adapter_that_was_trained_on_a_prequantized_model(tmp_path, capsys):
    """It is used, and the tokenizer is written: the adapter's, where it has one."""
    fp8, adapter = trained_folders(tmp_path)
    words = ["--adapter", str(adapter), "--quiet"]
    assert run("export", str(fp8), str(tmp_path / "out"), *words) == 0
    assert "without training" not in capsys.readouterr().out
    assert read(tmp_path / "out") == read(tmp_path / "expected")
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    (adapter / "tokenizer.json").write_text('{"added_tokens": []}')
    assert run("export", str(fp8), str(tmp_path / "again"), *words, "--json") == 0
    report = TypeAdapter(ExportReport).validate_json(capsys.readouterr().out)
    assert "tokenizer.json" in report.files
    assert "added_tokens" in (tmp_path / "again/tokenizer.json").read_text()
    assert run("export", str(fp8), str(tmp_path / "untrained"), "--quiet") == 0
    assert "this is the model without training" in capsys.readouterr().out


def test_export_refuses_an_adapter_that_it_would_ignore(tmp_path, capsys):
    """Wholly, or some of its tensors. PEFT says nothing, or warns."""
    fp8, adapter = trained_folders(tmp_path)
    file = adapter / "adapter_model.safetensors"
    whole = safetensors.load_file(file)
    dense, out = tmp_path / "dense", tmp_path / "out"

    def refused(model: Path, *words: str) -> str:
        assert run("export", str(model), str(out), *words, "--quiet") in (1, 2)
        assert not out.exists()
        return " ".join(capsys.readouterr().err.split())

    assert "'does-not-exist' does not exist" in refused(fp8, "--adapter", "does-not-exist")
    assert "its config can't be read" in refused(fp8, "--adapter", str(dense))
    first = next(iter(whole))
    for model in (fp8, dense):
        safetensors.save_file({n: t for n, t in whole.items() if n != first}, file)
        said = refused(model, "--adapter", str(adapter))
        assert f"1 LoRA tensors are in it or in the model alone, first {first}" in said
        safetensors.save_file(
            {n.replace("layers.1.", "layers.7."): t for n, t in whole.items()}, file
        )
        assert "LoRA tensors are in it or in the model alone" in refused(
            model, "--adapter", str(adapter)
        )
        safetensors.save_file({n: t[:, :5].contiguous() for n, t in whole.items()}, file)
        assert "it doesn't fit" in refused(model, "--adapter", str(adapter))
        file.unlink()
        assert "it has neither adapter_model.safetensors" in refused(
            model, "--adapter", str(adapter)
        )


def test_export_checks_its_words_before_it_loads_a_model(tmp_path, capsys, monkeypatch):
    fp8, adapter = trained_folders(tmp_path)
    monkeypatch.setattr("falqon_fx_cli.export.Export._trained_model", None)
    (tmp_path / "empty").mkdir()
    for words, said in (
        ([str(fp8), str(tmp_path / "dense")], "exists already"),
        ([str(fp8), "out", "--max-shard-size", "large"], "is no size of a file"),
        ([str(tmp_path / "empty"), "out"], "it has no config.json"),
        ([str(fp8), "out", "--base", str(tmp_path / "empty")], "it has no config.json"),
        ([str(fp8), "out", "--checkpoint", str(tmp_path / "empty")], "there is no checkpoint.json"),
        ([str(tmp_path / "dense"), "out"], "--adapter: is missing"),
        ([str(fp8), "out", "--base-dtype", "int8"], "are cast already"),
    ):
        assert run("export", *words, "--json") == 1
        found = capsys.readouterr()
        assert said in found.err
        assert said in json.loads(found.out)["error"]
    model = falqon_fx.load(fp8)
    falqon_fx.save_checkpoint(model, tmp_path / "trained")
    words = ["--adapter", str(adapter), "--checkpoint", str(tmp_path / "trained")]
    assert run("export", str(fp8), "out", *words) == 1
    assert "brings its own adapter" in capsys.readouterr().err
    monkeypatch.undo()
    words = [str(tmp_path / "dense"), str(tmp_path / "four"), "--adapter", str(adapter)]
    assert run("export", *words, "--base-dtype", "nvfp4", "--quiet") == 0
    said = capsys.readouterr().out
    assert "14 layers in NVFP4" in said
    assert "14 were cast from their base weights" in said


def test_export_of_an_adapter_that_was_trained_on_an_fp8_checkpoint(tmp_path, capsys):
    """As others publish it: its own weights are the base."""
    exported(tmp_path / "fp8")
    model = falqon_fx.load(tmp_path / "fp8", lora())
    fill_b(model, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    falqon_fx.save_fp8(model, tmp_path / "expected", progress=False)
    words = [str(tmp_path / "fp8"), str(tmp_path / "out")]
    assert run("export", *words, "--adapter", str(tmp_path / "adapter"), "--quiet") == 0
    assert "14 were cast a second time" in capsys.readouterr().out
    assert read(tmp_path / "out") == read(tmp_path / "expected")


@pytest.mark.parametrize("where", ["terminal", "pipe", "quiet"])
def test_export_shows_its_progress_on_a_terminal_alone(tmp_path, capsys, where):
    """And leaves the report there, not the bar."""
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "fp8")
    arguments = ["--max-shard-size", "10KB", *(["--quiet"] if where == "quiet" else [])]
    rich.reconfigure(force_terminal=where != "pipe", force_interactive=where != "pipe", width=80)
    try:
        assert run("export", str(tmp_path / "fp8"), str(tmp_path / "out"), *arguments) == 0
    finally:
        rich.reconfigure()
    printed = capsys.readouterr()
    assert ("exporting" in printed.out) is (where == "terminal")
    assert "14 layers in FP8" in printed.out
    assert "exporting" not in printed.err
    if where == "terminal":
        steps = re.findall(r"([\d.]+)/([\d.]+) kB", printed.out)
        assert steps[-1][0] == steps[-1][1] == max(whole for _, whole in steps)
