"""What is written lies in the folder that was named, and what is removed was the library's own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.files import atomic
from falqon_fx.files.checkpoint import MANIFEST
from falqon_fx.files.units import file_of
from tests.attack import harness
from tests.folders import dense_model, folder_of, prequantize
from tests.models import tiny_llama
from tests.test_storage import Layers, generation_in

safetensors = pytest.importorskip("safetensors.torch")


def save(folder: Path, generation: int) -> None:
    falqon_fx.save_checkpoint(Layers(generation), folder, extra={"generation": generation})


def prepared_llama() -> torch.nn.Module:
    model = tiny_llama()
    falqon_fx.prepare(model, progress=False)
    return model


def export(model: torch.nn.Module, out: Path) -> None:
    falqon_fx.save_fp8(model, out, progress=False)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link in a folder."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


# -- what is removed -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file", "link to a folder", "interrupted prequantize"])
def test_an_export_leaves_what_has_names_near_its_own(tmp_path, kind):
    near = tmp_path / "near"
    near.mkdir()
    (near / "victim").mkdir()
    (near / "victim/model.safetensors").write_text("mine")
    partial = near / "runs.partial"
    if kind == "file":
        partial.write_text("mine")
    elif kind == "link to a folder":
        partial.symlink_to("victim")
    elif kind == "folder":
        shutil.copytree(near / "victim", partial)
    else:
        interrupted(folder_of(dense_model(), tmp_path / "dense"), near / "runs")
        assert len(list((partial / "weights").iterdir())) > 10
    before = contents(near)
    export(prepared_llama(), near / "runs")
    after = contents(near)
    assert {name: content for name, content in after.items() if name in before} == before
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {"runs"}


def interrupted(source: Path, out: Path) -> None:
    """`prequantize`, stopped before its folder gets its name."""
    with harness.interrupted():
        prequantize(source, out)


def test_a_checkpoint_leaves_the_files_of_others_in_its_folder(tmp_path):
    """Also those whose names are like its own, and those that a manifest from elsewhere names."""
    folder, victim = tmp_path / "run", tmp_path / "victim.safetensors"
    save(folder, 1)
    victim.write_text("mine")
    mine = ["tensors-mine.safetensors", "tensors-0123456789ab.safetensors", ".partial/mine"]
    (folder / ".partial").mkdir()
    for name in mine:
        (folder / name).write_text("mine")
    (folder / "tensors-ffffffffffff.safetensors").symlink_to(victim)
    content = json.loads((folder / MANIFEST).read_text())
    (ours,) = content["files"]
    content["files"] |= {"../victim.safetensors": {}, str(victim): {}, ".partial": {}}
    content["replaces"] = ["../victim.safetensors", "tensors-ffffffffffff.safetensors", 3, None]
    (folder / MANIFEST).write_text(json.dumps(content))
    save(folder, 2)
    assert generation_in(folder) == 2
    assert all((folder / name).read_text() == "mine" for name in mine)
    assert victim.read_text() == "mine"
    assert not (folder / ours).exists()


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', "[" * 100_000, '{"files": {"a": "b"}}'])
def test_a_checkpoint_over_a_damaged_manifest_removes_nothing(tmp_path, text):
    save(tmp_path, 1)
    (old,) = tmp_path.glob("tensors-*")
    (tmp_path / MANIFEST).write_text(text)
    save(tmp_path, 2)
    assert generation_in(tmp_path) == 2
    assert old.exists()


def test_a_save_that_was_killed_after_it_counted_is_tidied_up_by_the_next(tmp_path, monkeypatch):
    """The old file is named by the new manifest as one that it replaces."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "remove", lambda path: None)  # as if killed before
        save(tmp_path, 2)
    assert len(list(tmp_path.glob("tensors-*"))) == 2
    assert generation_in(tmp_path) == 2
    for generation in (3, 4, 5):
        save(tmp_path, generation)
        assert generation_in(tmp_path) == generation
        assert len(list(tmp_path.iterdir())) == 2
    assert len(json.loads((tmp_path / MANIFEST).read_text())["replaces"]) == 1  # it doesn't grow


def killed_aside(parent: Path, name: str = "") -> Path:
    """A folder as a killed writer leaves it; its name may say that another machine did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "remove", lambda path: None)
        with atomic.aside(parent) as path:
            (path / "half").touch()
    return path.rename(parent / name) if name else path


def test_what_killed_writers_left_is_gone_after_the_next_export(tmp_path):
    killed_aside(tmp_path)
    with atomic.new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/whole",
    ]


OTHER = f".falqon-{'0' * 6}-0123456789ab.partial"


def test_what_living_writers_and_others_have_aside_stays(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    ours = killed_aside(tmp_path).name[:15]  # with this machine's mark
    link = tmp_path / f"{ours}0123456789ab.partial"
    link.symlink_to(elsewhere)
    file = tmp_path / f"{ours}1123456789ab.partial"
    file.write_text("mine")
    other = killed_aside(tmp_path, OTHER)
    with atomic.aside(tmp_path) as living:
        (living / "half").touch()
        with atomic.new_folder(tmp_path / "out"):
            pass
        assert (living / "half").exists()
    assert (elsewhere / "mine").exists()
    assert link.is_symlink()
    assert file.read_text() == "mine"
    assert other.exists()
    os.utime(other, (0, 0))  # left for longer than a day
    dead, me = killed_aside(tmp_path), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with atomic.new_folder(tmp_path / "second"):
        pass
    assert other.exists()  # another user's
    assert dead.exists()
    monkeypatch.undo()
    with atomic.new_folder(tmp_path / "third"):
        pass
    assert not other.exists()
    assert not dead.exists()


@pytest.mark.parametrize("where", ["", "weights", "records"])
def test_prequantize_does_not_write_through_links(tmp_path, where):
    source, out = folder_of(dense_model(), tmp_path / "dense"), tmp_path / "out"
    victim = tmp_path / "victim"
    victim.mkdir()
    partial = tmp_path / "out.partial"
    if where:
        interrupted(source, out)
        shutil.rmtree(partial / where)
    (partial / where).symlink_to(victim)
    with pytest.raises(FalqonError, match="it is a link to elsewhere"):
        prequantize(source, out)
    assert not list(victim.iterdir())


@pytest.mark.parametrize("name", ["weights", "records", "mine"])
def test_a_partial_folder_without_a_plan_is_nobodys_to_take(tmp_path, name):
    source = folder_of(dense_model(), tmp_path / "dense")
    (tmp_path / "out.partial" / name).mkdir(parents=True)
    with pytest.raises(FalqonError, match="it is of another run"):
        prequantize(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == [name]


# -- names -----------------------------------------------------------------------------------------


NAMES = [
    "../../victim/model",
    "/{root}/victim/model",
    "a/b",
    "x" * 300,
    "small",
    "\x1b[2J",
    "ü",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_the_model_does_not_have_is_refused_before_anything_is_written(
    tmp_path, name
):
    name = name.replace("{root}", str(tmp_path))
    source = folder_of(dense_model(), tmp_path / "dense")
    large = torch.ones(1 << 18)  # MiB: a file of its own
    safetensors.save_file({name: large}, source / "more.safetensors", metadata={"format": "pt"})
    before = contents(tmp_path)
    with pytest.raises(FalqonError, match="but not in the model") as refused:
        prequantize(source, tmp_path / "out")
    assert contents(tmp_path) == before
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_any_name_has_a_file_in_the_folder(tmp_path, name):
    """Each file has a number, and of the name what any file system takes."""
    file = tmp_path / file_of(7, name)
    assert file.resolve().parent == tmp_path / "weights"
    assert file.name.isascii()
    assert len(file.name) < 130


def test_known_files_of_the_source_are_copied_and_no_others(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    known = {"tokenizer.json", "LICENSE", "README.md", "vocab.txt"}
    other = {".env", "plan.json", "falqon.json", "modeling.py", "training_args.bin", "records"}
    for name in known | other:
        (source / name).write_text("{}")
    prequantize(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == known | {
        "config.json", "generation_config.json", "adapter_config.json", "falqon.json", "weights",
    }  # fmt: skip
    assert json.loads((tmp_path / "out/falqon.json").read_text())["format"]


def test_a_link_out_of_the_source_is_refused_and_one_inside_is_copied(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    source = folder_of(dense_model(), tmp_path / "dense")
    (source / "tokenizer.json").symlink_to(secret)
    model = prepared_llama()
    model.get_base_model().config._name_or_path = str(source)
    for write in (lambda out: prequantize(source, out), lambda out: export(model, out)):
        with pytest.raises(FalqonError, match=r"tokenizer\.json: it is a link out of the model's"):
            write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("generation_config.json")
    prequantize(source, tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").is_symlink()


def test_a_snapshot_of_the_hubs_cache_is_copied(tmp_path):
    """Where every file is a link to ``blobs``."""
    plain = folder_of(dense_model(), tmp_path / "plain")
    source, blobs = tmp_path / "models--x/snapshots/0", tmp_path / "models--x/blobs"
    source.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(plain.iterdir())):
        path.rename(blobs / str(i))
        (source / path.name).symlink_to(f"../../blobs/{i}")
    prequantize(source, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    falqon_fx.load(tmp_path / "out")
