"""A checkpoint is whole or it is the one before: killed writers, damaged files, full disks."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import falqon_fx
from falqon_fx.errors import FalqonError
from falqon_fx.files.atomic import new_folder
from falqon_fx.files.copies import copy_tensors
from falqon_fx.files.disk import lock
from falqon_fx.files.storage import save_tensors
from falqon_fx.files.trees import unshared
from falqon_fx.kernels.cpu import native as cpu
from tests import fresh

KILLS = 200


class Layers(nn.Module):
    """Parameters that all hold the number of their generation: a mixture would show."""

    def __init__(self, generation: int = 0) -> None:
        super().__init__()
        self.layers = nn.ParameterList(
            nn.Parameter(torch.full((64, 512), float(generation))) for _ in range(12)
        )

    def generation(self) -> int:
        found = {value for layer in self.layers for value in layer.unique().tolist()}
        assert len(found) == 1, f"a mixture of {found}"
        return int(found.pop())


def kill_writers(folder: Path, kills: int) -> tuple[int, int]:
    """Kill writers that save one generation after the other; check what each leaves. Returns the
    last generation and how many saves were cut in the middle.

    All is done in forks of this process, which itself never starts a thread that a fork would lack.
    """
    torch.set_num_threads(1)
    # The least of three: a machine that paused in one would make all of this last for hours.
    one_save = min(float(in_a_fork(lambda: time_a_save(folder))) for _ in range(3))
    chance, last, cut = random.Random(0), 0, 0
    for _ in range(kills):
        writer = os.fork()
        if writer == 0:
            save_for_ever(folder, last)
        time.sleep(chance.uniform(0, 3 * one_save))
        os.kill(writer, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(writer, 0)[1]) == signal.SIGKILL
        cut += any("partial" in path.name for path in folder.iterdir())
        generation = int(in_a_fork(lambda: generation_in(folder)))
        assert generation >= last
        last = generation
    return last, cut


def in_a_fork(function: Callable[[], object]) -> str:
    """What ``function`` returns in a child of this process, as text."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(theirs, "w") as pipe:
            pipe.write(str(function()))
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return text


def time_a_save(folder: Path) -> float:
    """Of the first save of a process, which takes the longest."""
    start = time.perf_counter()
    falqon_fx.save_checkpoint(Layers(), folder, extra={"generation": 0})
    return time.perf_counter() - start


def generation_in(folder: Path) -> int:
    loaded = Layers(-1)
    stated = falqon_fx.load_checkpoint(loaded, folder)["generation"]
    assert loaded.generation() == stated
    return loaded.generation()


def save_for_ever(folder: Path, generation: int) -> NoReturn:
    while True:
        generation += 1
        falqon_fx.save_checkpoint(Layers(generation), folder, extra={"generation": generation})


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint():
    """Kill -9 at 200 random moments of a process that saves without a pause: what is left loads
    with right checksums, is one generation in all its tensors, and never an older one than before.

    In memory, where a save is quick: what a kill can do to it is the same as on a disk.
    """
    code = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from tests.test_storage import kill_writers
print(*kill_writers(Path({folder!r}), {kills}))
"""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as temporary:
        folder = Path(temporary, "run")
        text = code.format(root=str(Path(__file__).parents[1]), folder=str(folder), kills=KILLS)
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        last, cut = map(int, done.stdout.split())
        assert last > 20  # saves went through
        assert cut > 20  # and were cut in the middle
        # What killed writers left behind is gone after the next save.
        falqon_fx.save_checkpoint(Layers(1), folder)
        assert len(list(folder.iterdir())) == 2


SAVE = """
import falqon_fx
from tests.test_storage import Layers
for _ in range(40):
    falqon_fx.save_checkpoint(Layers({number}), {folder!r}, extra={{"generation": {number}}})
"""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("what", ["tensors", "checkpoint.json"])
def test_a_save_interrupted_around_a_rename_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, moment, what
):
    """Ctrl-C, unlike a kill, runs the clean-up, which must not take what counts already."""
    falqon_fx.save_checkpoint(Layers(1), tmp_path, extra={"generation": 1})
    rename = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if moment == "after":
            rename(source, target)
        if target.name.startswith(what):
            raise KeyboardInterrupt
        if moment == "before":
            rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            falqon_fx.save_checkpoint(Layers(2), tmp_path, extra={"generation": 2})
    counts = (moment, what) == ("after", "checkpoint.json")
    assert generation_in(tmp_path) == (2 if counts else 1)
    assert len(list(tmp_path.iterdir())) == 2
    falqon_fx.save_checkpoint(Layers(3), tmp_path, extra={"generation": 3})
    assert len(list(tmp_path.iterdir())) == 2


def test_two_processes_that_save_into_one_folder_take_turns(tmp_path):
    """And who loads meanwhile gets what one of them saved."""
    falqon_fx.save_checkpoint(Layers(1), tmp_path, extra={"generation": 1})
    writers = [fresh.start(SAVE.format(folder=str(tmp_path), number=number)) for number in (1, 2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(generation_in(tmp_path))
    assert [writer.wait().returncode for writer in writers] == [0, 0]
    assert seen == {1, 2}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_lock_does_not_outlive_its_end_in_a_process_forked_meanwhile(tmp_path):
    with lock(tmp_path):
        sleeper = os.fork()
        if sleeper == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with lock(tmp_path, wait=False):
            pass
    finally:
        os.kill(sleeper, signal.SIGKILL)
        os.waitpid(sleeper, 0)


@pytest.mark.parametrize("name", ["with a space", "gr\u00fc\u00df \u4f60", "a'b\"c", "link"])
def test_folders_of_any_name(tmp_path, name):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folder = tmp_path / name
    falqon_fx.save_checkpoint(Layers(1), folder, extra={"generation": 1})
    falqon_fx.save_checkpoint(Layers(2), folder, extra={"generation": 2})
    assert generation_in(folder) == 2
    shutil.rmtree(tmp_path / "real")  # the link points at what isn't there yet
    shutil.rmtree(folder, ignore_errors=True)
    falqon_fx.save_checkpoint(Layers(3), folder, extra={"generation": 3})
    assert generation_in(folder) == 3
    shutil.rmtree(tmp_path / "real", ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as inside:
        (inside / "whole").touch()
    assert (folder / "whole").exists()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("inside", [".", "deep/er"])
def test_a_file_in_the_way_is_refused(tmp_path, inside):
    (tmp_path / "file").touch()
    with pytest.raises(FalqonError, match="can't be written there"):
        falqon_fx.save_checkpoint(Layers(1), tmp_path / "file" / inside)
    with (
        pytest.raises(FalqonError, match=r"can't be written there|exists already"),
        new_folder(tmp_path / "file" / inside),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    for folder in (Path("/sys/kernel"), Path("/sys/kernel/falqon")):
        with pytest.raises(FalqonError, match="can't be written there"):
            falqon_fx.save_checkpoint(Layers(1), folder)
    with (
        pytest.raises(FalqonError, match="can't be written there"),
        new_folder(Path("/sys/kernel/falqon")),
    ):
        pass


# -- full disks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1000, 1_000_000])  # the first in a header, the other in the data
def test_a_full_disk_is_a_clear_error_and_leaves_the_old_checkpoint(tmp_path, limit):
    """A process whose files may not pass ``limit`` bytes gets the kernel's refusal in a write."""
    falqon_fx.save_checkpoint(Layers(1), tmp_path, extra={"generation": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code = f"""
import resource, signal, falqon_fx
from tests.test_storage import Layers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    falqon_fx.save_checkpoint(Layers(2), {str(tmp_path)!r})
except falqon_fx.FalqonError as error:
    print(error)
"""
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout
    assert "Free some space" in done.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    loaded = Layers()
    falqon_fx.load_checkpoint(loaded, tmp_path)
    assert loaded.generation() == 1


ON_A_SMALL_DISK = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
import falqon_fx
from tests.test_storage import Layers, generation_in
folder = Path({folder!r}, "run")
falqon_fx.save_checkpoint(Layers(1), folder, extra={{"generation": 1}})
before = sorted(folder.iterdir())
try:
    falqon_fx.save_checkpoint(Layers(2), folder, extra={{"generation": 2}})
except falqon_fx.FalqonError as error:
    print(error)
assert sorted(folder.iterdir()) == before
print("holds", generation_in(folder))
"""


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 2 MiB, which has room for one checkpoint of 1.5."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    small = f"mount -t tmpfs -o size=2m none '{tmp_path}'"
    if shutil.which("unshare") is None or subprocess.run([*mount, small]).returncode:
        pytest.skip("no file system can be mounted here")
    code = ON_A_SMALL_DISK.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path))
    command = [*mount, f'{small} && exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the disk is full (0 MiB are free)" in done.stdout
    assert "holds 1" in done.stdout


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    final = tmp_path / "out"
    with pytest.raises(FalqonError, match="No such file"), new_folder(final) as folder:
        (folder / "half").rename(folder / "whole")
    with pytest.raises(KeyError), new_folder(final):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with new_folder(final) as folder:
        (folder / "whole").write_text("whole")
        assert not final.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- tensors ---------------------------------------------------------------------------------------


def test_memory_that_tensors_share_is_written_once_where_it_is_the_same(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    named = {"a": weight, "tied": weight, "view": weight[1:], "t": weight.t(), "other": weight + 1}
    kept, same = unshared(named.items())
    assert same == {"tied": "a"}
    save_file(kept, tmp_path / "x")  # refuses shared memory
    for name, tensor in kept.items():
        assert torch.equal(tensor, named[name])


def test_a_file_has_the_rights_of_any_new_file(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.ones(2)})
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(FalqonError, match="t: safetensors have no complex128"):
        save_tensors(tmp_path / "x", {"t": torch.ones(2, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


def test_empty_tensors_and_scalars_survive(tmp_path):
    model = nn.Module()
    for name, tensor in {
        "a": torch.empty(0, 3),
        "b": torch.empty(0),
        "s": torch.tensor(2.5),
    }.items():
        model.register_buffer(name, tensor)
    falqon_fx.save_checkpoint(model, tmp_path)
    model.s.zero_()
    falqon_fx.load_checkpoint(model, tmp_path)
    assert model.s == 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "ATen"])
def test_tensors_are_copied_in_place_whatever_their_layout(dtype, compiled, monkeypatch):
    if compiled and cpu.library() is None:
        pytest.skip("no C++ compiler")
    if not compiled:
        monkeypatch.setattr(cpu, "copy", lambda pairs: False)
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    plain, turned = torch.zeros_like(values), torch.zeros(values.mT.shape, dtype=dtype).mT
    assert not turned.is_contiguous()
    targets = [plain, turned]
    if dtype.is_floating_point:  # else torch has no parameters
        targets += [nn.Parameter(t.clone()) for t in targets]
    versions = [target._version for target in targets]
    empty, scalar = torch.zeros(0, 3), torch.tensor(1.0)
    pairs = [(target, values) for target in targets]
    copy_tensors([*pairs, pairs[0], (empty, torch.ones(0, 3)), (scalar, torch.tensor(2.5))])
    assert all(torch.equal(target, values) for target in targets)
    assert scalar == 2.5
    # Autograd must see that what it saved was changed.
    assert all(t._version > old for t, old in zip(targets, versions, strict=True))
