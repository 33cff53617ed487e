"""A checkpoint is whole or it is the one before: killed writers, damaged files, full disks."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import falqon_fx
from falqon_fx.errors import FalqonError
from falqon_fx.files import manifests, seals, storage
from falqon_fx.files.atomic import new_folder
from falqon_fx.files.checkpoint import MANIFEST
from falqon_fx.files.copies import copy_tensors
from falqon_fx.files.disk import lock
from falqon_fx.files.storage import DamagedFileError, read_header, save_tensors
from falqon_fx.files.trees import unshared
from falqon_fx.kernels.cpu import native as cpu
from tests.models import fill_b, tiny_mlp

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
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
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
    root = str(Path(__file__).parents[1])
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE.format(root=root, folder=str(tmp_path), number=number)]
        )
        for number in (1, 2)
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(generation_in(tmp_path))
    assert [writer.returncode for writer in writers] == [0, 0]
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


# -- damaged files ---------------------------------------------------------------------------------


def saved(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_mlp()
    fill_b(model, 0.1)
    falqon_fx.prepare(model, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    falqon_fx.save_checkpoint(model, folder, optimizer=optimizer, extra={"t": torch.ones(3)})
    return model


def refused(folder: Path, model: nn.Module) -> str:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DamagedFileError) as caught:
        falqon_fx.load_checkpoint(model, folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("which", ["tensors", "checkpoint"])
def test_every_flipped_bit_is_found(tmp_path, which):
    """In the headers, the padding, the data and the manifest alike, and the file is named."""
    model = saved(tmp_path)
    (file,) = tmp_path.glob(f"{which}*")
    whole, chance = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little") if which != "checkpoint" else 300
    places = [*range(8), *(chance.randrange(header) for _ in range(40))]
    places += [chance.randrange(len(whole)) for _ in range(40)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        assert file.name in refused(tmp_path, model)
    file.write_bytes(whole)
    falqon_fx.load_checkpoint(model, tmp_path)


def test_a_flipped_bit_names_the_tensor(tmp_path):
    model = saved(tmp_path)
    (file,) = tmp_path.glob("tensors-*")
    whole = bytearray(file.read_bytes())
    start = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + start])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        changed = bytearray(whole)
        changed[8 + start + entry["data_offsets"][0]] ^= 1
        file.write_bytes(changed)
        assert f"the checksum of tensor {name!r} is wrong" in refused(tmp_path, model)


@pytest.mark.parametrize("which", ["tensors", "checkpoint"])
def test_a_truncated_file_is_refused(tmp_path, which):
    model = saved(tmp_path)
    (file,) = tmp_path.glob(f"{which}*")
    whole = file.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert file.name in refused(tmp_path, model)
    file.write_bytes(whole + b"\0")
    assert file.name in refused(tmp_path, model)


def test_a_missing_file_is_refused(tmp_path):
    model = saved(tmp_path)
    (file,) = tmp_path.glob("tensors-*")
    file.unlink()
    assert "it is missing" in refused(tmp_path, model)


def test_a_file_of_another_checkpoint_is_refused(tmp_path):
    model = saved(tmp_path / "a")
    falqon_fx.save_checkpoint(model, tmp_path / "a")
    fill_b(model, 0.2, seed=1)
    falqon_fx.save_checkpoint(model, tmp_path / "b")
    (ours,), (other,) = ((tmp_path / n).glob("tensors-*") for n in "ab")
    shutil.copyfile(other, ours)
    assert "lora_B" in refused(tmp_path / "a", model)


def test_a_foreign_file_is_refused(tmp_path):
    model = saved(tmp_path)
    (file,) = tmp_path.glob("tensors-*")
    torch.save({"a": torch.ones(2)}, file)  # a pickle
    assert "instead of" in refused(tmp_path, model)
    file = tmp_path / MANIFEST
    file.write_text('{"weight_map": {}}')
    assert "its format is not" in refused(tmp_path, model)
    file.write_bytes(b"\x80\x04N.")
    assert "not valid JSON" in refused(tmp_path, model)


@pytest.mark.parametrize("start", [(1 << 63) - 1, 1 << 40, 100_000_001])
def test_a_header_that_would_be_huge_is_not_read(tmp_path, start):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(start.to_bytes(8, "little"))
        opened.truncate(1 << 36)  # a hole, which takes no space; reading it would take the memory
    with pytest.raises(DamagedFileError, match="its header would have"):
        read_header(file)


@pytest.mark.parametrize("header", [b"{", b"[1]", b"\xff\xfe"])
def test_a_header_that_is_no_description_is_refused(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DamagedFileError, match="header is n"):
        read_header(file)


def with_header(path: Path, entries: dict[str, Any], data: bytes) -> None:
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def entry(first: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - first], "data_offsets": [first, end]}


@pytest.mark.parametrize("second", [(0, 8), (4, 12), (9, 16)], ids=["same", "overlap", "hole"])
def test_tensors_that_do_not_lie_one_after_the_other_are_refused(tmp_path, second):
    """As safetensors refuses them: two would change together."""
    file = tmp_path / "a.safetensors"
    with_header(file, {"b": entry(*second), "a": entry(0, 8)}, bytes(16))
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(DamagedFileError, match=r"lies at .*, and the one before ends at"):
        read_header(file)


def test_a_tensor_that_does_not_lie_at_a_multiple_of_its_size_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    described = storage.write_tensors(file, {"a": torch.ones(2)})
    header = read_header(file)
    for length in range(2, 10):  # the start of the data is counted, too
        text = json.dumps(header).encode().ljust(100 + length)
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        a = {**described["tensors"]["a"], "xxh3": storage.checksum(bytes(8))}
        expected = {"bytes": file.stat().st_size, "tensors": {"a": a}}
        expected["header"] = storage.checksum(file.read_bytes()[:-8])
        if (8 + 100 + length) % 4 == 0:
            assert not storage.open_tensors(file, expected)["a"].any()
            continue
        with pytest.raises(DamagedFileError, match="no dtype that can lie there"):
            storage.open_tensors(file, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "complex128"},
        {"dtype": "nn"},
        {"dtype": "quint8"},
        {"shape": [0, 2**62, 2**62]},
        {"shape": [2**32, 2**32]},
        {"shape": [1] * 65},
    ],
    ids=str,
)
def test_a_described_tensor_of_no_dtype_or_size_is_refused(change):
    known = {"bytes": 8, "header": "", "tensors": {"a": {"dtype": "float32", "shape": [2]}}}
    known["tensors"]["a"] |= {"xxh3": ""}
    content = {"format": "", "files": {"f": known}, "same": {}, "sites": [], "objects": {}}
    assert manifests.problem(content, "checkpoint") is None
    known["tensors"]["a"] |= change
    assert "files.f.tensors.a" in str(manifests.problem(content, "checkpoint"))


def test_every_dtype_that_the_format_has_can_be_described(tmp_path):
    for dtype in _torch_dtypes():
        tensors = {"x": torch.zeros(2, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)}
        try:
            described = storage.write_tensors(tmp_path / "a", tensors)
        except FalqonError:
            assert str(dtype).removeprefix("torch.") not in get_args(manifests.TensorDtype)
            continue
        content = {"source": {}, "described": described}
        assert manifests.problem(content, "record") is None, dtype
        found = storage.open_tensors(tmp_path / "a", described)["x"]
        assert torch.equal(found.view(torch.uint8), tensors["x"].view(torch.uint8))


def _torch_dtypes() -> list[torch.dtype]:
    found = {d for d in vars(torch).values() if isinstance(d, torch.dtype)}
    bits = re.compile(r"torch\.(q|bits|u?int[1-7]$)")  # what holds no tensors of its own
    return sorted((d for d in found if not bits.match(str(d))), key=str)


def test_a_pipe_is_no_file_of_tensors(tmp_path):
    """To open one would wait for ever."""
    os.mkfifo(tmp_path / "model.safetensors")
    code = f"""
from pathlib import Path
from falqon_fx.files import manifests, seals, storage
storage.read_header(Path({str(tmp_path / "model.safetensors")!r}))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "it is missing" in ran.stderr


@pytest.mark.parametrize("kind", ["pipe", "hole"])
def test_a_manifest_that_is_none_is_not_read(tmp_path, kind):
    """A pipe would wait for ever, and a large file take all memory."""
    calls = {
        MANIFEST: "falqon_fx.save_checkpoint(torch.nn.Linear(2, 2), folder)",
        seals.MANIFEST: "print(seals.is_export(folder))",
    }
    for name, call in calls.items():
        if kind == "pipe":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).touch()
            os.truncate(tmp_path / name, 2**36)
        code = f"""
import resource, torch, falqon_fx
from pathlib import Path
from falqon_fx.files import seals
resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
folder = Path({str(tmp_path)!r})
{call}
"""
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
    assert (tmp_path / MANIFEST).stat().st_size < 2**20


@pytest.mark.parametrize("size", [3000, 2**19])  # 12 KB read, 2 MiB mapped
def test_small_files_are_read_and_large_ones_mapped(tmp_path, size):
    path = tmp_path / "a.safetensors"
    expected = storage.write_tensors(path, {"x": torch.arange(size, dtype=torch.int32)})
    x = storage.open_tensors(path, expected)["x"]
    assert torch.equal(x, torch.arange(size, dtype=torch.int32))
    mapped = str(path) in Path("/proc/self/maps").read_text()
    assert mapped == (size == 2**19)
    if not mapped:
        os.truncate(path, 0)
        assert torch.equal(x, torch.arange(size, dtype=torch.int32))


def test_loading_never_unpickles(tmp_path, monkeypatch):
    import pickle

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    model = saved(tmp_path)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    falqon_fx.load_checkpoint(model, tmp_path)


# -- full disks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1000, 1_000_000])  # the first in a header, the other in the data
def test_a_full_disk_is_a_clear_error_and_leaves_the_old_checkpoint(tmp_path, limit):
    """A process whose files may not pass ``limit`` bytes gets the kernel's refusal in a write."""
    falqon_fx.save_checkpoint(Layers(1), tmp_path, extra={"generation": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code = f"""
import resource, signal, sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import falqon_fx
from tests.test_storage import Layers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    falqon_fx.save_checkpoint(Layers(2), {str(tmp_path)!r})
except falqon_fx.FalqonError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
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
