import errno
import inspect
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from falqon_fx.kernels.activation_cast.launch import activation_cast
from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.cache import cache_folder, store
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.render import render
from tests import fresh

SPEC = ActivationCastSpec.for_width(
    32, input_dtype="float32", granularity="row", scale="pow2", cast="integer"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A fresh cache folder, with no module loaded from an earlier one."""
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path / "cache"))
    load.cache_clear()
    yield tmp_path / "cache"
    load.cache_clear()


def assert_works():
    q, scale = activation_cast(torch.tensor([[7.0, -3.5]]), SPEC)
    assert (q.float() * scale).tolist() == [[7.0, -3.5]]


def test_source_is_written_once_under_its_hash(folder):
    module = load(SPEC, interpret=True)
    (path,) = folder.iterdir()
    assert str(path) == module.__file__
    assert path.read_text() == render(SPEC)
    assert path.name.startswith(SPEC.name)
    written = path.stat().st_mtime_ns
    load.cache_clear()
    load(SPEC, interpret=True)
    assert path.stat().st_mtime_ns == written


def test_interpreted_and_compiled_modules_live_side_by_side(folder):
    assert isinstance(load(SPEC, interpret=True).cast_rows, InterpretedFunction)
    assert isinstance(load(SPEC, interpret=False).cast_rows, JITFunction)
    assert load(SPEC, interpret=True) is load(SPEC, interpret=True)


@pytest.mark.parametrize("damage", [b"", b"raise SystemExit", b"\xff\xfe\x00"])
def test_damaged_file_is_rebuilt(folder, damage):
    path = Path(load(SPEC, interpret=True).__file__)
    path.write_bytes(damage)
    load.cache_clear()
    assert_works()
    assert path.read_text() == render(SPEC)


def test_damage_after_loading_does_not_reach_triton(folder):
    module = load(SPEC, interpret=False)
    Path(module.__file__).write_bytes(b"raise SystemExit")
    assert inspect.getsource(module.encode.fn) in render(SPEC)
    assert "0x7F" in inspect.getsource(module.encode.fn)


def test_unwritable_folder_works_from_memory_with_one_warning(tmp_path, monkeypatch):
    # A file where a folder should be: refused to every user, root included.
    blocker = tmp_path / "file"
    blocker.touch()
    monkeypatch.setenv("FALQON_CACHE", str(blocker / "cache"))
    load.cache_clear()
    with pytest.warns(RuntimeWarning, match="set FALQON_CACHE") as caught:
        assert_works()
        load.cache_clear()
        assert_works()
        load(SPEC, interpret=False)
    assert len(caught) == 1
    load.cache_clear()


def test_failed_write_leaves_nothing_behind(folder, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source)

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(RuntimeWarning, match="No space left") as caught:
        assert_works()
        load.cache_clear()
        assert_works()
    assert len(caught) == 1
    assert list(folder.iterdir()) == []


def test_processes_that_store_at_once_never_see_a_partial_file(tmp_path):
    code = f"""
from pathlib import Path
from falqon_fx.kernels.cache import store

source, folder = "x = 1\\n" * 20000, Path({str(tmp_path)!r})
for _ in range(300):
    path = store(source, "kernel", folder)
    try:
        assert path.read_text() == source
    except FileNotFoundError:  # the other process has just removed it
        pass
    path.unlink(missing_ok=True)  # so that both keep writing
store(source, "kernel", folder)
"""
    processes = [fresh.start(code, warnings="error") for _ in range(2)]
    for process in processes:
        done = process.wait()
        assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 1


def test_store_is_silent_where_it_can_write(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = store("x = 1\n", "kernel", tmp_path / "a" / "b")
    assert path.read_text() == "x = 1\n"


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FALQON_CACHE", "/chosen")
    assert cache_folder() == Path("/chosen")
    monkeypatch.delenv("FALQON_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/falqon-fx")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/falqon-fx")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path("/home/someone/Library/Caches/falqon-fx")
