"""`prequantize` that is interrupted goes on, and what it refuses."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import falqon_fx
from falqon_fx import (
    FalqonError,
)
from falqon_fx.files import atomic
from falqon_fx.files.disk import lock
from falqon_fx.files.loading import MANIFEST
from falqon_fx.files.storage import DamagedFileError
from tests import fresh
from tests.folders import dense_model, exported, folder_of, prequantize
from tests.test_checkpoint_refusals import rewrite_format

KILL = """
import sys, time; sys.path.insert(0, {root!r})
import falqon_fx.files.prequantize
p = sys.modules["falqon_fx.files.prequantize"]
convert = p._convert
def slowly(*arguments):
    print("one", flush=True)
    time.sleep(0.02)
    return convert(*arguments)
p._convert = slowly
from pathlib import Path
from tests.folders import prequantize
prequantize(Path({source!r}), Path({out!r}))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_ended(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    out = tmp_path / "out"
    prequantize(source, tmp_path / "whole")
    code = KILL.format(root=str(Path(__file__).parents[1]), source=str(source), out=str(out))
    writer = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    for _ in range(6):
        assert writer.stdout.readline() == b"one\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert not out.exists()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.partial/weights").iterdir()}
    assert 0 < len(done) < 15
    report = prequantize(source, out)
    assert 0 < report.resumed < 14
    assert "from an earlier run" in str(report)
    for path, when in done.items():
        assert (out / "weights" / path.name).stat().st_mtime_ns == when
    for path in (tmp_path / "whole/weights").iterdir():
        assert path.read_bytes() == (out / "weights" / path.name).read_bytes()
    assert not (tmp_path / "out.partial").exists()
    falqon_fx.load(out)


@pytest.mark.parametrize("where", ["plan", "manifest", "rename_into_place"])
def test_a_run_cut_at_its_start_or_end_goes_on(tmp_path, monkeypatch, where):
    """Before there is a plan, before there is a manifest, and before the folder has its name."""
    source = folder_of(dense_model(), tmp_path / "dense")
    out = tmp_path / "out"
    module = importlib.import_module("falqon_fx.files.prequantize")
    cut = {
        "plan": (module.json, "dumps"),
        "manifest": (module.storage, "write_manifest"),
        "rename_into_place": (atomic, "rename_into_place"),
    }

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*cut[where], stop)
        with pytest.raises(KeyboardInterrupt):
            prequantize(source, out)
    assert not out.exists()
    report = prequantize(source, out)
    assert report.resumed == (0 if where == "plan" else report.layers)
    assert not {"records", "writing", "plan.json"} & {path.name for path in out.iterdir()}
    assert not (tmp_path / "out.partial").exists()
    falqon_fx.load(out)


def test_a_folder_that_another_process_works_in_is_refused(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    (tmp_path / "out.partial").mkdir()
    with (
        lock(tmp_path / "out.partial"),
        pytest.raises(FalqonError, match="another process is writing"),
    ):
        prequantize(source, tmp_path / "out")


def test_a_partial_folder_of_something_else_is_left_alone(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine").touch()
    with pytest.raises(FalqonError, match="of another run"):
        prequantize(source, tmp_path / "out")
    assert (tmp_path / "out.partial/mine").exists()


def test_a_partial_folder_of_other_options_is_refused(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    dense = dense_model()
    with torch.no_grad():
        dense.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    bad = folder_of(dense, tmp_path / "bad")
    with pytest.raises(FalqonError, match="NaN or Inf"):
        prequantize(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FalqonError, match="of another run"):
        prequantize(source, tmp_path / "out", r=8)


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(FalqonError, match="exists already"):
        prequantize(tmp_path, tmp_path / "out")


def test_a_folder_of_an_older_format_is_refused_with_the_remedy(tmp_path):
    prequantize(folder_of(dense_model(), tmp_path / "dense"), tmp_path / "out")
    rewrite_format(tmp_path / "out" / MANIFEST, "falqon_fx.prequantized.1")
    with pytest.raises(FalqonError, match=r"its format is 'falqon_fx\.prequantized\.1'.* Call "):
        falqon_fx.load(tmp_path / "out")


def test_an_adapter_that_starts_from_the_dense_weight_is_refused(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out", use_dora=True)
    with pytest.raises(FalqonError, match=r"lora_magnitude_vector.*: it starts from the dense"):
        falqon_fx.load(tmp_path / "out")


def test_an_adapter_config_that_names_code_to_import_is_refused(tmp_path, monkeypatch):
    prequantize(folder_of(dense_model(), tmp_path / "dense"), tmp_path / "out")
    (tmp_path / "code/megatron").mkdir(parents=True)
    (tmp_path / "code/megatron/__init__.py").touch()
    module = tmp_path / "code/megatron/core.py"
    module.write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path / "code")
    config = tmp_path / "out/adapter_config.json"
    content = json.loads(config.read_text())
    content |= {"megatron_config": {"any": 1}, "megatron_core": "megatron.core"}
    config.write_text(json.dumps(content))
    with pytest.raises(FalqonError, match="Megatron's layers"):
        falqon_fx.load(tmp_path / "out", verify=False)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FalqonError, match=r"there is no config\.json in it"):
        prequantize(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FalqonError, match="there are no safetensors in it"):
        prequantize(tmp_path, tmp_path / "out")


def sharded(folder: Path) -> Path:
    """A checkpoint of two files or more with an index."""
    folder_of(dense_model(), folder, "20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_a_tensor_in_two_files_is_refused_unless_an_index_says_which(tmp_path):
    source = sharded(tmp_path / "dense")
    prequantize(source, tmp_path / "whole")
    first, *_, last = sorted(source.glob("*.safetensors"))
    shutil.copyfile(first, source / "old.safetensors")
    prequantize(source, tmp_path / "indexed")  # does not look into the file
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(FalqonError, match=rf"{first.name} and old\.safetensors both hold it"):
        prequantize(source, tmp_path / "out")


def test_an_index_that_is_wrong_is_refused(tmp_path):
    source = sharded(tmp_path / "dense")
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name, right = next(iter(index["weight_map"].items()))
    for wrong, said in (
        (next(f for f in index["weight_map"].values() if f != right), "says that .* holds it"),
        ("gone.safetensors", "names gone.safetensors, which is missing"),
    ):
        changed = {**index["weight_map"], name: wrong}
        file.write_text(json.dumps({**index, "weight_map": changed}))
        with pytest.raises(FalqonError, match=said):
            prequantize(source, tmp_path / "out")


def test_a_source_whose_header_would_be_huge_is_refused(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    (file,) = source.glob("*.safetensors")
    whole = bytearray(file.read_bytes())
    whole[:8] = (1 << 62).to_bytes(8, "little")
    file.write_bytes(whole)
    with pytest.raises(DamagedFileError, match=r"model\.safetensors: it is not a safetensors file"):
        prequantize(source, tmp_path / "out")


def test_a_truncated_source_is_named(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    exported(tmp_path / "fp8")
    for folder, function in (
        (source, lambda: prequantize(source, tmp_path / "out")),
        (tmp_path / "fp8", lambda: falqon_fx.load(tmp_path / "fp8")),
    ):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(DamagedFileError, match=r"model\.safetensors: it is not a whole"):
            function()


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_done(tmp_path):
    """A process whose files may not pass 7000 bytes, which is less than the largest."""
    source = folder_of(dense_model(), tmp_path / "dense")
    code = f"""
import resource, signal, falqon_fx
from pathlib import Path
from tests.folders import prequantize
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))
try:
    prequantize(Path({str(source)!r}), Path({str(tmp_path / "out")!r}))
except falqon_fx.FalqonError as error:
    print(error)
"""
    done = fresh.run(code, warnings="ignore")
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout
    assert not (tmp_path / "out").exists()
    prequantize(source, tmp_path / "out")
    falqon_fx.load(tmp_path / "out")


def test_a_damaged_weight_is_named(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out")
    (file,) = (tmp_path / "out/weights").glob("*.layers.0.mlp.up_proj.safetensors")
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 4
    file.write_bytes(whole)
    with pytest.raises(DamagedFileError, match=r"layers\.0\.mlp\.up_proj.*checksum of tensor"):
        falqon_fx.load(tmp_path / "out")
    falqon_fx.load(tmp_path / "out", verify=False)
