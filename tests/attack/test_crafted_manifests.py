"""Crafted manifests, indexes and configs; names that become paths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import falqon_fx
from falqon_fx.files.checkpoint import MANIFEST
from falqon_fx.files.storage import DamagedFileError
from tests.attack import harness
from tests.attack.checkpoints import lora, tiny
from tests.attack.crafted import FILES, INDEX, changed, model_and_optimizer, quietly

# -- names that become paths -----------------------------------------------------------------------


OUTSIDE = [
    "../victim.safetensors",
    "/etc/passwd",
    "a/../../victim",
    "..",
    ".",
    "",
    "a\0b",
    "\ud800",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_names_a_file_outside_is_refused(tmp_path, name):
    tiny().save_pretrained(tmp_path / "dense", max_shard_size="12KB")
    file = tmp_path / "dense" / INDEX
    index = json.loads(file.read_text())
    tensor = next(iter(index["weight_map"]))
    index["weight_map"][tensor] = name
    file.write_text(json.dumps(index))
    (tmp_path / "victim.safetensors").write_bytes(b"victim")
    calls: list[Callable[[], Any]] = [
        lambda: falqon_fx.load(tmp_path / "dense"),
        lambda: falqon_fx.prequantize(tmp_path / "dense", tmp_path / "out", progress=False),
    ]
    for call in calls:
        with pytest.raises(DamagedFileError, match="which is no file in its folder"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path, name):
    saved, _ = model_and_optimizer()
    falqon_fx.save_checkpoint(saved, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    (entry,) = manifest["files"].values()
    harness.resealed(tmp_path / "run" / MANIFEST, {**manifest, "files": {name: entry}})
    with pytest.raises(DamagedFileError, match="which is no file in its folder"):
        falqon_fx.load_checkpoint(saved, tmp_path / "run")


# -- crafted manifests, indexes and configs --------------------------------------------------------


def check(
    call: Callable[[], Any], state: Callable[[], Any], folders: Path, own: Sequence[str] = ()
) -> None:
    """A crafted file may describe another whole state; all else is a refusal. Either way nothing
    is written in the folders or around them but what is its ``own``.
    """
    root = folders.parent
    before = harness.surroundings(root, [f"{folders.name}/{name}" for name in own])
    (found,) = harness.verdicts([lambda: harness.verdict(call, state, None)])
    assert not found.startswith("bad") or found.startswith("bad: neither"), found
    after = harness.surroundings(root, [f"{folders.name}/{name}" for name in own])
    assert not harness.changes(before, after)


FEW, MANY = settings(max_examples=8), settings(max_examples=120)


def craft_checkpoint(folders: Path, update: Any, data: Any) -> None:
    folder = folders / update
    whole = (folder / MANIFEST).read_bytes()
    model, optimizer = model_and_optimizer(update, 1)
    try:
        harness.resealed(folder / MANIFEST, data.draw(changed(json.loads(whole))))
        check(
            lambda: falqon_fx.load_checkpoint(model, folder, optimizer=optimizer),
            lambda: harness.contents(model, optimizer.state_dict()),
            folders,
        )
    finally:
        (folder / MANIFEST).write_bytes(whole)


def craft_file(folder: Path, name: str, call: Callable[[], Any], data: Any) -> None:
    whole = (folder / name).read_bytes()
    made = [""]

    def load() -> None:
        made[0] = harness.contents(quietly(call))

    content = data.draw(changed(json.loads(whole)))
    try:
        if name == "falqon.json" and isinstance(content, dict):
            harness.resealed(folder / name, content)
        else:
            (folder / name).write_text(json.dumps(content))
        check(load, lambda: made[0], folder.parent)
    finally:
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("update", ["adapter", "rows"])
@FEW
@given(data=st.data())
def test_a_few_crafted_checkpoints(folders, update, data):
    craft_checkpoint(folders, update, data)


@pytest.mark.parametrize(("kind", "name"), FILES)
@FEW
@given(data=st.data())
def test_a_few_crafted_files(folders, kind, name, data):
    craft_file(folders / kind, name, lambda: falqon_fx.load(folders / kind), data)


def craft_index(folders: Path, data: Any) -> None:
    """Of the source of `prequantize`, which leaves a whole folder or none."""
    file, out = folders / "dense" / INDEX, folders / "out"
    whole = file.read_bytes()
    try:
        file.write_text(json.dumps(data.draw(changed(json.loads(whole)))))
        check(
            lambda: falqon_fx.prequantize(
                folders / "dense", out, lora(), workers=1, progress=False
            ),
            lambda: harness.tree(out) if out.exists() else {},
            folders,
            ("out", "out.partial"),
        )
    finally:
        file.write_bytes(whole)
        for left in (out, out.with_name("out.partial")):
            shutil.rmtree(left, ignore_errors=True)


@FEW
@given(data=st.data())
def test_a_few_crafted_indexes(folders, data):
    craft_index(folders, data)


@pytest.mark.slow
@pytest.mark.parametrize("update", ["adapter", "rows"])
@MANY
@given(data=st.data())
def test_many_crafted_checkpoints(folders, update, data):
    craft_checkpoint(folders, update, data)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), FILES)
@MANY
@given(data=st.data())
def test_many_crafted_files(folders, kind, name, data):
    craft_file(folders / kind, name, lambda: falqon_fx.load(folders / kind), data)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_many_crafted_indexes(folders, data):
    craft_index(folders, data)
