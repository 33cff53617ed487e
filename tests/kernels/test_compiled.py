"""Compiled code for a CPU: made once, kept where nobody else can write, never run when damaged."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from falqon_fx.kernels.cpu import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

SOURCE = 'extern "C" void falqon_fill(long *to) { *to = 42; }\n'
PLANTED = """
#include <cstdio>
static int owned = std::fclose(std::fopen("{mark}", "w"));
extern "C" void falqon_fill(long *to) {{ *to = 13; }}
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "fill.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were compiled, without what all of them start with."""
    numbers = Path(build.__file__).with_name("numbers.cpp").read_text()
    texts: list[str] = []
    whole = build._compile

    def counting(compiler: tuple[str, ...], text: str) -> bytes:
        texts.append(text.removeprefix(numbers))
        return whole(compiler, text)

    monkeypatch.setattr(build, "_compile", counting)
    return texts


def answer(source: Path) -> int:
    library: Any = build.compiled(source, ["fill"], "nothing is filled")
    value = ctypes.c_long()
    library.falqon_fill(ctypes.byref(value))
    return value.value


def folder(source: Path) -> Path:
    return source.parent / "cache" / f"compiled-{os.geteuid()}"


def kept(source: Path) -> Path:
    (file,) = folder(source).iterdir()
    return file


def planted(source: Path) -> bytes:
    """A library that leaves a mark when it is loaded."""
    text = PLANTED.format(mark=source.parent / "owned")
    return build._compile(build._compiler(), text)


def test_it_is_made_once_and_kept_for_this_user_alone(source, made):
    assert [answer(source), answer(source)] == [42, 42]
    assert len(made) == 1
    assert stat.S_IMODE(folder(source).stat().st_mode) == 0o700
    assert stat.S_IMODE(folder(source).parent.stat().st_mode) == 0o700
    assert kept(source).stat().st_mode & 0o077 == 0


def test_damaged_code_is_made_anew(source, made):
    answer(source)
    file = kept(source)
    whole = file.read_bytes()
    cuts = [whole[: len(whole) * i // 15] for i in range(15)]
    flips = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, 4096, 273)]
    for i, damaged in enumerate([*cuts, *flips, whole + b"x"]):
        file.write_bytes(damaged)
        assert answer(source) == 42
        assert len(made) == i + 2
        assert kept(source).read_bytes() == whole


def test_a_file_that_is_cut_off_while_it_runs_does_no_harm(source):
    library: Any = build.compiled(source, ["fill"], "nothing is filled")
    os.truncate(kept(source), 0)
    value = ctypes.c_long()
    library.falqon_fill(ctypes.byref(value))
    assert value.value == 42


@pytest.mark.parametrize("how", ["link", "writable", "other", "pipe", "folder"])
def test_a_file_that_is_not_ours_alone_is_not_run(how, source, made):
    """Under the name that its content has, which is no secret."""
    if how == "other" and os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    answer(source)
    stem = kept(source).name.rpartition("-")[0]
    kept(source).unlink()
    code = planted(source)
    file = folder(source) / f"{stem}-{hashlib.sha256(code).hexdigest()}"
    if how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "link":
        (source.parent / "elsewhere").write_bytes(code)
        file.symlink_to(source.parent / "elsewhere")
    else:
        file.write_bytes(code)
        file.chmod(0o666 if how == "writable" else 0o644)
        os.chown(file, 12345 if how == "other" else -1, -1)
    made.clear()
    assert answer(source) == 42
    assert made == [SOURCE]
    assert not (source.parent / "owned").exists()


@pytest.mark.parametrize("how", ["link", "writable", "other", "file"])
def test_a_folder_that_is_not_ours_alone_is_not_used(how, source, made, caplog):
    if how == "other" and os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    answer(source)
    stem = kept(source).name.rpartition("-")[0]
    code = planted(source)
    kept(source).unlink()
    (folder(source) / f"{stem}-{hashlib.sha256(code).hexdigest()}").write_bytes(code)
    if how == "link":
        folder(source).rename(source.parent / "elsewhere")
        folder(source).symlink_to(source.parent / "elsewhere")
    elif how == "writable":
        folder(source).chmod(0o777)
    elif how == "other":
        os.chown(folder(source), 12345, -1)
    else:
        shutil.rmtree(folder(source))
        folder(source).touch()
    made.clear()
    with caplog.at_level(logging.WARNING):
        assert answer(source) == 42
    assert made == [SOURCE]
    assert not (source.parent / "owned").exists()
    assert str(folder(source)) in caplog.text
    assert "set FALQON_CACHE" in caplog.text


def test_a_cache_folder_that_cannot_be_written_costs_only_time(source, monkeypatch, made, caplog):
    blocker = source.parent / "blocker"  # refused to every user, root included
    blocker.touch()
    monkeypatch.setenv("FALQON_CACHE", str(blocker / "cache"))
    with caplog.at_level(logging.WARNING):
        assert [answer(source), answer(source)] == [42, 42]
    assert len(made) == 2
    assert "made anew in each process" in caplog.text


def refuse(*args: Any, **named: Any) -> Any:
    raise PermissionError(13, "Permission denied")


def test_a_cache_folder_that_cannot_be_read_costs_only_time(source, monkeypatch, made, caplog):
    answer(source)
    monkeypatch.setattr(os, "listdir", refuse)
    with caplog.at_level(logging.WARNING):
        assert answer(source) == 42
    assert len(made) == 2
    assert "made anew in each process" in caplog.text
    assert "C++ compiler" not in caplog.text


def test_code_is_run_where_a_file_aside_cannot_be_removed(source, monkeypatch, caplog):
    unlink = os.unlink

    def in_our_folder(path: Any, **options: Any) -> None:
        if str(path).startswith("."):
            refuse()
        unlink(path, **options)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(os, "unlink", in_our_folder)
    with caplog.at_level(logging.WARNING):
        assert build.compiled(source, ["fill"], "") is not None
    assert "C++ compiler" not in caplog.text


@pytest.mark.parametrize("fails", ["memfd_create", "CDLL"])
def test_where_memory_may_not_run_a_file_does(source, monkeypatch, fails):
    load = ctypes.CDLL
    if fails == "CDLL":
        monkeypatch.setattr(
            ctypes, "CDLL", lambda path: refuse() if path.startswith("/proc/") else load(path)
        )
    else:
        monkeypatch.setattr(os, "memfd_create", refuse)
    before = len(os.listdir("/proc/self/fd"))
    assert answer(source) == 42
    assert len(os.listdir("/proc/self/fd")) == before


def test_where_no_file_may_run_the_remedy_is_another_folder(source, monkeypatch, caplog):
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with caplog.at_level(logging.WARNING):
        assert build.compiled(source, ["fill"], "nothing is filled") is None
    assert "nothing is filled. Remedy: set TMPDIR" in caplog.text
    assert "C++ compiler" not in caplog.text


def test_a_full_disk_leaves_nothing_behind(source, monkeypatch, caplog):
    def full(*args: Any, **folders: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        assert answer(source) == 42
    assert "No space left" in caplog.text
    assert list(folder(source).iterdir()) == []


def test_another_cpu_compiler_or_flag_has_code_of_its_own(source, monkeypatch, made):
    """Machines of a cluster share a home."""
    answer(source)
    monkeypatch.setattr(build, "_target", lambda compiler: "#define __OTHER_CPU__ 1")
    answer(source)
    monkeypatch.setenv("CXX", "g++ -O1")
    answer(source)
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    answer(source)
    assert len(made) == 4
    assert len(list(folder(source).iterdir())) == 4


def test_the_key_knows_the_instruction_sets_of_this_cpu():
    """What ``-march=native`` stands for is what the compiler defines for it."""

    def macros(*flags: str) -> set[str]:
        command = ["g++", *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return set(done.stdout.splitlines())

    told = build._target(("g++",))
    assert macros("-march=native") - macros() <= set(told.splitlines())
    assert "__VERSION__" in told


def test_many_at_once_find_whole_code(source):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: build._kept("fill", SOURCE), range(8)))
    assert set(found) == {kept(source).read_bytes()}


def test_torchs_folder_in_tmp_is_not_looked_at(source, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(source.parent / "inductor"))
    assert answer(source) == 42
    assert not (source.parent / "inductor").exists()
