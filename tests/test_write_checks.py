"""File systems as they are, and files that were changed since."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed.checkpoint as dcp

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.files import atomic, disk
from falqon_fx.files.checkpoint import MANIFEST
from tests import fresh
from tests.folders import dense_model, folder_of, prequantize
from tests.models import fill_b, tiny_mlp
from tests.test_storage import Layers, generation_in
from tests.test_writes import contents, interrupted, save


def failing(number: int, when: Callable[..., bool] = lambda *_: True) -> Any:
    """Makes a function of the operating system fail."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def fails(*arguments: Any, **options: Any) -> Any:
            if when(*arguments):
                raise OSError(number, os.strerror(number))
            return function(*arguments, **options)

        return fails

    return wrap


def is_folder(handle: int) -> bool:
    return Path(f"/proc/self/fd/{handle}").is_dir()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_saves_and_loads_succeed_with_a_warning(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", failing(number)(fcntl.flock))
    with pytest.warns(UserWarning, match="has no locks: let no two processes save there") as seen:
        for generation in (1, 2):
            save(tmp_path / "run", generation)
        assert generation_in(tmp_path / "run") == 2
    assert len(seen) == 1
    assert len(list((tmp_path / "run").iterdir())) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with atomic.new_folder(tmp_path / "out"):  # needs none
            pass


@pytest.mark.parametrize("call", ["open", "flock"])
def test_a_folder_that_may_not_be_read_is_not_to_be_named_anew(tmp_path, monkeypatch, call):
    """A remedy for who saves is none for who loads."""
    save(tmp_path, 1)
    failed = failing(errno.EACCES, lambda first, *_: call == "flock" or first == tmp_path)
    owner: Any = fcntl if call == "flock" else os
    monkeypatch.setattr(owner, call, failed(getattr(owner, call)))
    with pytest.raises(FalqonError, match="See that it is there and yours to read") as caught:
        falqon_fx.load_checkpoint(Layers(0), tmp_path)
    assert caught.value.site == str(tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_without_fsync_of_folders_a_save_succeeds_with_a_warning(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing(number, is_folder)(os.fsync))
    with pytest.warns(UserWarning, match="can't flush to the disk"):
        save(tmp_path / "run", 1)
    assert generation_in(tmp_path / "run") == 1


def test_a_warning_about_the_file_system_comes_once(tmp_path):
    code = f"""
import errno, fcntl
from pathlib import Path
from falqon_fx.files.disk import lock
def fails(*_):
    raise OSError(errno.ENOSYS, "no")
fcntl.flock = fails
for _ in range(3):
    with lock(Path({str(tmp_path)!r})):
        pass
"""
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("has no locks") == 1


def test_a_disk_that_fails_to_confirm_says_that_the_save_is_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)
    renamed: list[str] = []
    replace = os.replace

    def noting(source: Path, target: Path) -> None:
        replace(source, target)
        renamed.append(Path(target).name)

    monkeypatch.setattr(os, "replace", noting)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, lambda _: MANIFEST in renamed)(os.fsync))
    with pytest.raises(FalqonError, match=r"it is whole and has its name, but the disk failed"):
        save(tmp_path, 2)
    assert generation_in(tmp_path) == 2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_failing_disk_is_explained(tmp_path, monkeypatch, number):
    save(tmp_path, 1)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(number)(os.fsync))
        with pytest.raises(FalqonError, match=r"failed .*; nothing has changed under this name"):
            save(tmp_path, 2)
        with pytest.raises(FalqonError, match="nothing has changed under this name"):
            save(tmp_path / "new/deep", 2)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_removed_after_a_save_is_a_warning(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        in_it = lambda path, **_: Path(path).parent == tmp_path  # noqa: E731
        patch.setattr(os, "unlink", failing(errno.EACCES, in_it)(os.unlink))
        with pytest.warns(UserWarning, match="no longer needed but can't be removed"):
            save(tmp_path, 2)
    assert generation_in(tmp_path) == 2
    save(tmp_path, 3)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_rename_whose_answer_was_lost_is_seen_to_be_done(tmp_path, monkeypatch):
    """NFS asks again, and hears that there is nothing to rename."""
    replace = os.replace

    def lost(source: Path, target: Path) -> NoReturn:
        replace(source, target)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "replace", lost)
    save(tmp_path / "run", 1)
    save(tmp_path / "run", 2)
    assert generation_in(tmp_path / "run") == 2
    with atomic.new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert (tmp_path / "out/whole").exists()


def run_together(number: int, work: Callable[[int], None]) -> list[BaseException]:
    """Threads that start at once; what they raised."""
    raised: list[BaseException] = []
    barrier = threading.Barrier(number, timeout=60)

    def run(i: int) -> None:
        barrier.wait()
        try:
            work(i)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.filterwarnings("ignore:falqon")
def test_of_writers_of_one_folder_none_loses_its_work(tmp_path, monkeypatch, locks):
    """The first gets the name; the others are told where theirs is."""
    if not locks:
        monkeypatch.setattr(fcntl, "flock", failing(errno.ENOSYS)(fcntl.flock))
    for turn in range(20):
        out, inside = tmp_path / str(turn) / "out", threading.Barrier(4, timeout=60)

        def write(i: int, out: Path = out, inside: threading.Barrier = inside) -> None:
            with atomic.new_folder(out) as folder:
                inside.wait()
                (folder / "whole").write_text(str(i))

        raised = run_together(4, write)
        assert len(raised) == 3
        assert all(isinstance(error, FalqonError) for error in raised), raised
        assert all("another process made it meanwhile" in str(error) for error in raised)
        found = sorted((path / "whole").read_text() for path in out.parent.iterdir())
        assert found == ["0", "1", "2", "3"]
        kept = [path for path in out.parent.iterdir() if path != out]
        assert all(any(str(path) in str(error) for error in raised) for path in kept)


def test_a_folder_that_another_made_meanwhile_is_not_removed(tmp_path, monkeypatch):
    made = Path.mkdir

    def later(path: Path, *arguments: Any, **options: Any) -> None:
        if path == tmp_path / "deep":
            made(path)  # by another process
        made(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", later)
    with pytest.raises(KeyError), atomic.made_folder(tmp_path / "deep" / "out"):
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["deep"]


def test_machines_of_one_name_are_told_apart(monkeypatch):
    def boot(number: str) -> str:
        monkeypatch.setattr(Path, "read_text", lambda path, **_: number)
        return atomic._machine()

    assert boot("a\n") == boot("a\n") != boot("b\n")
    monkeypatch.setattr(Path, "read_text", failing(errno.ENOENT)(Path.read_text))
    assert len(atomic._machine()) == 6


@pytest.mark.filterwarnings("ignore:falqon")
def test_savers_into_one_folder_without_locks_leave_a_whole_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOSYS)(fcntl.flock))

    def save_often(i: int) -> None:
        for _ in range(6):
            save(tmp_path, i)

    raised = run_together(6, save_often)
    assert raised == []
    assert generation_in(tmp_path) in range(6)


HOME = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from tests.attack.writers import *
for writer in (Save(), Export(), Prequantize()):
    folder = Path({folder!r}, type(writer).__name__)
    (folder / "work").mkdir(parents=True)
    writer.prepare(folder)
    writer.act(folder)
    assert writer.state(folder) == "new"
falqon_fx.load(folder / "work/out")
"""


@pytest.mark.slow
def test_a_home_that_cannot_be_written_to_is_no_obstacle(tmp_path):
    code = HOME.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path))
    kept = {n: v for n, v in os.environ.items() if n not in ("FALQON_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**kept, "HOME": "/proc/nothing"},
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_moved_while_a_saver_waits_for_it_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with disk.lock(folder):
        waiting = threading.Thread(target=lambda: raised.extend(run_together(1, lambda _: wait())))
        raised: list[BaseException] = []

        def wait() -> None:
            with disk.lock(folder):
                pass

        waiting.start()
        while not _waits_for(folder):
            pass
        folder.rename(tmp_path / "moved")
    waiting.join()
    assert "another process moved or removed it" in str(raised[0])


def _waits_for(folder: Path) -> bool:
    inode = f":{folder.stat().st_ino} "
    return any("->" in line and inode in line for line in Path("/proc/locks").open())


def test_touched_files_do_not_keep_a_run_from_going_on(tmp_path):
    source, out = folder_of(dense_model(), tmp_path / "dense"), tmp_path / "out"
    interrupted(source, out)
    for path in source.iterdir():
        os.utime(path, (1e9, 1e9))
    moved = source.rename(tmp_path / "moved")
    report = prequantize(moved, out)
    assert report.resumed == report.layers


def test_weights_that_changed_since_are_cast_anew(tmp_path):
    """Though neither the files' sizes nor their times tell."""
    model, out = dense_model(), tmp_path / "out"
    source = folder_of(model, tmp_path / "dense")
    interrupted(source, out)
    (file,) = source.glob("*.safetensors")
    times = file.stat()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 0.75
    folder_of(model, source)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    report = prequantize(source, out)
    assert report.resumed == report.layers - 1
    prequantize(source, tmp_path / "fresh")
    for path in (out / "weights").iterdir():
        assert path.read_bytes() == (tmp_path / "fresh/weights" / path.name).read_bytes()


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"described": 3}', "[" * 100_000])
def test_a_damaged_record_is_work_that_is_not_done(tmp_path, damage):
    source, out = folder_of(dense_model(), tmp_path / "dense"), tmp_path / "out"
    interrupted(source, out)
    for file in (tmp_path / "out.partial/records").iterdir():
        file.write_text(damage)
    assert prequantize(source, out).resumed == 0
    falqon_fx.load(out)


def test_a_file_that_was_changed_since_is_made_anew(tmp_path):
    """Its size and its record tell nothing."""
    source, out = folder_of(dense_model(), tmp_path / "dense"), tmp_path / "out"
    interrupted(source, out)
    changed = next((tmp_path / "out.partial/weights").glob("*up_proj*"))
    whole = changed.read_bytes()
    changed.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    incomplete = next((tmp_path / "out.partial/records").glob("*down_proj*"))
    record = json.loads(incomplete.read_text())
    del record["described"]["header"]
    incomplete.write_text(json.dumps(record))
    report = prequantize(source, out)
    assert report.resumed == report.layers - 2
    assert (out / "weights" / changed.name).read_bytes() == whole
    falqon_fx.load(out)


def test_a_mixture_that_an_interrupted_distributed_save_left_is_refused(tmp_path):
    """DCP writes over its files in place, and its metadata last."""
    model = tiny_mlp()
    fill_b(model, 0.1)
    dcp.save({"falqon": falqon_fx.CheckpointState(model)}, checkpoint_id=tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    old = file.read_bytes()
    fill_b(model, 0.2, seed=1)
    dcp.save({"falqon": falqon_fx.CheckpointState(model)}, checkpoint_id=tmp_path)
    new = file.read_bytes()
    assert len(new) == len(old)
    differ = [i for i in range(len(new)) if new[i] != old[i]]
    half = differ[len(differ) // 2]
    file.write_bytes(new[:half] + old[half:])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((FalqonError, dcp.api.CheckpointException), match="interrupted"):
        dcp.load({"falqon": falqon_fx.CheckpointState(model)}, checkpoint_id=tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
