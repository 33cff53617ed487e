"""Files that are whole or not there: written aside, checksummed, fsynced, renamed.

Tensors are safetensors, everything else JSON; nothing is pickled. Each file is described in a
manifest by its size, a checksum of its header and one of each tensor, so that a truncated, changed
or foreign file is refused by the name of what is wrong in it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.kernels import cpu

T = TypeVar("T")
R = TypeVar("R")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),  # a file has the name, ...
)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EBADF)  # some network file systems
_PARTIAL = ".partial"
_LONGEST_HEADER = 100_000_000  # of a safetensors file, by its format


class DamagedFileError(FalqonError):
    """A file that is truncated, changed, or not what it should be. Nothing was loaded from it."""

    def __init__(self, file: Path, problem: str) -> None:
        super().__init__(str(file), problem, "Load another checkpoint, or copy this one again")


def require(module: str, extra: str) -> Any:
    """Import an optional dependency.

    Raises:
        FalqonError: it is not installed; names the extra that brings it.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FalqonError(
            "", f"{module.partition('.')[0]} is not installed", f"pip install 'falqon-fx[{extra}]'"
        ) from error


# -- writing ---------------------------------------------------------------------------------------


@contextmanager
def written_aside(final: Path) -> Iterator[Path]:
    """A path to write to. It gets the name ``final`` once it is whole and on the disk. The caller
    holds the folder's `lock`.

    Raises:
        FalqonError: the disk is full, or the folder can't be written to. Nothing is left then, and
            what had the name before stays.
    """
    # In a folder, since safetensors itself writes to files of random names beside its own.
    folder = final.parent / _PARTIAL
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    aside = folder / final.name
    try:
        with explained(final):
            folder.mkdir()
            yield aside
            flush_to_disk(aside)
            os.replace(aside, final)
            flush_to_disk(final.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write into. It gets the name ``final`` once all in it is on the disk.

    Raises:
        FalqonError: ``final`` exists and isn't an empty folder, another process is writing it, the
            disk is full, or the folder around it can't be written to.
    """
    refuse_existing(final)
    aside = partial(final)
    with lock(aside, wait=False):
        try:
            with explained(final):
                for path in aside.iterdir():  # of a run that was killed
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                yield aside
                for path in sorted(aside.rglob("*"), reverse=True):
                    flush_to_disk(path)
                become(aside, final)
        except BaseException:  # Ctrl-C too leaves nothing
            shutil.rmtree(aside, ignore_errors=True)
            raise


def partial(final: Path) -> Path:
    """The folder that gets the name ``final`` later, on the disk."""
    final = Path(os.path.realpath(final))  # a link keeps pointing where it did
    aside = final.with_name(final.name + _PARTIAL)
    make_folder(aside)
    return aside


def become(aside: Path, final: Path) -> None:
    """Give a folder whose files are on the disk its name."""
    flush_to_disk(aside)
    final = Path(os.path.realpath(final))
    os.replace(aside, final)
    flush_to_disk(final.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, on the disk."""
    path = Path(os.path.realpath(path))  # mkdir refuses a link, even to where nothing is yet
    if not path.is_dir():
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
            flush_to_disk(path.parent)


@contextmanager
def lock(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Keep other processes and threads that `lock` a folder out; readers share it. A process that
    dies gives it back.

    Raises:
        FalqonError: another has it, and ``wait`` is False.
    """
    handle = os.open(folder, os.O_RDONLY)
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        try:
            fcntl.flock(handle, kind)
        except BlockingIOError as error:
            raise FalqonError(
                str(folder), "another process is writing it", "Wait, or name another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            yield
            return
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile would keep it
    finally:
        os.close(handle)


def refuse_existing(final: Path) -> None:
    """Raise where ``final`` exists and isn't an empty folder."""
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise FalqonError(str(final), "exists already", "Name another folder, or remove this one")


@contextmanager
def explained(final: Path) -> Iterator[None]:
    """Say what a full disk or missing rights mean for ``final``."""
    try:
        yield
    except Exception as error:
        # safetensors reports the operating system's error as text.
        code, text = getattr(error, "errno", None), str(error)
        if _is(code, text, _FORBIDDEN):
            raise FalqonError(
                str(final), f"it can't be written there ({text})", "Name a new folder that is yours"
            ) from error
        if not _is(code, text, _FULL):
            raise
        free = shutil.disk_usage(final.parent).free
        raise FalqonError(
            str(final),
            f"the disk is full ({free / 2**20:.0f} MiB are free); nothing was left under this name",
            "Free some space, or name a folder on another disk",
        ) from error


def _is(code: int | None, text: str, numbers: Iterable[int]) -> bool:
    return any(code == number or f"os error {number})" in text for number in numbers)


def flush_to_disk(path: Path) -> None:
    """Fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write contiguous tensors on CPU that share no memory, onto the disk; returns what
    `open_tensors` checks.
    """
    names = list(tensors)
    save_tensors(path, tensors)
    with ThreadPoolExecutor(1) as pool:
        on_disk = pool.submit(flush_to_disk, path)
        parts = [_bytes(tensors[name]) for name in names]
        sums = _spread(_checksum, parts, lambda part: part.nbytes)
        on_disk.result()
    return {
        "bytes": path.stat().st_size,
        "header": _header_checksum(path),
        "tensors": {
            name: {
                "dtype": str(tensors[name].dtype).removeprefix("torch."),
                "shape": list(tensors[name].shape),
                "xxh3": digest,
            }
            for name, digest in zip(names, sums, strict=True)
        },
    }


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file with the access rights that any new file gets.

    Raises:
        FalqonError: a dtype that the format doesn't have.
    """
    require("safetensors", "checkpoint")
    from safetensors.torch import save_file

    path.touch()
    rights = path.stat().st_mode
    path.unlink()  # safetensors renames its file; over another, that would wait for the disk
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except KeyError as error:  # the dtype
        name = next(name for name, tensor in tensors.items() if tensor.dtype in error.args)
        kind = str(tensors[name].dtype).removeprefix("torch.")
        raise FalqonError(name, f"safetensors have no {kind}", "Convert it first") from error
    path.chmod(rights)  # safetensors lets nobody else read


def write_manifest(final: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with its own checksum, aside and renamed: the moment from which it counts."""
    whole = {**content, "checksum": _json_checksum(content)}
    with written_aside(final) as aside:
        aside.write_text(json.dumps(whole, indent=1), encoding="utf-8")


# -- reading ---------------------------------------------------------------------------------------


def read_manifest(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """The content of a manifest of the ``format`` ``kind``.

    Raises:
        FalqonError: there is none, or one of an older or newer format; ``remedy`` says what to do.
        DamagedFileError: it isn't one, or was changed.
    """
    if not path.is_file():
        raise FalqonError(str(path.parent), f"there is no {path.name} in it", "Name another folder")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(path, f"it is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DamagedFileError(path, f"its format is not {kind!r}")
    whole = content.pop("checksum", None) == _json_checksum(content)
    found, family = str(content.get("format")), kind.rpartition(".")[0]
    if found != kind and whole and found.rpartition(".")[0] == family:
        problem = f"its format is {found!r}, and this falqon-fx reads {kind!r}"
        raise FalqonError(str(path), problem, remedy)
    if found != kind:
        raise DamagedFileError(path, f"its format is not {kind!r}")
    if not whole:
        raise DamagedFileError(path, "its checksum is wrong: it was changed after it was written")
    return content


def open_tensors(
    path: Path, expected: Mapping[str, Any], *, verify: bool = True
) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory, after all checksums were found right; without
    ``verify`` only size and header are looked at.

    Raises:
        DamagedFileError: names the file, the tensor and what is wrong.
    """
    if not path.is_file():
        raise DamagedFileError(path, "it is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise DamagedFileError(path, f"it has {size} bytes instead of {expected['bytes']}")
    if _header_checksum(path) != expected["header"]:
        raise DamagedFileError(path, "the checksum of its header is wrong")
    header, start = read_header(path), len(_header(path))
    require("numpy", "checkpoint")
    memory: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    whole = torch.empty(0, dtype=torch.uint8).set_(memory).numpy()
    parts = {}
    for name in expected["tensors"]:
        first, end = header[name]["data_offsets"]
        parts[name] = whole[start + first : start + end]
    names = list(parts) if verify else []
    sums = _spread(_checksum, [parts[name] for name in names], lambda part: part.nbytes)
    for name, digest in zip(names, sums, strict=True):
        if digest != expected["tensors"][name]["xxh3"]:
            raise DamagedFileError(path, f"the checksum of tensor {name!r} is wrong")
    return {
        name: torch.from_numpy(parts[name]).view(getattr(torch, of["dtype"])).view(of["shape"])
        for name, of in expected["tensors"].items()
    }


def digest(tensor: Tensor) -> str:
    """A checksum of a tensor's contents."""
    return _checksum(_bytes(tensor.cpu().contiguous()))


def _checksum(part: Any) -> str:
    """XXH3 (128 bits) of a buffer."""
    return str(require("xxhash", "checkpoint").xxh3_128_hexdigest(part))


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on CPU, as a NumPy array."""
    require("numpy", "checkpoint")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def copy_tensors(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write the second of each pair into the first, which is of the same shape and dtype."""
    plain = []
    with torch.no_grad():
        for target, tensor in {id(pair[0]): pair for pair in pairs}.values():  # tied ones once
            if _is_plain(target) and _is_plain(tensor):
                plain.append((target, tensor))
            else:
                target.copy_(tensor)
        if cpu.copy(plain):
            torch.autograd.graph.increment_version([target for target, _ in plain])
        else:
            for target, tensor in plain:
                target.copy_(tensor)


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
    return plain and tensor.device.type == "cpu" and tensor.is_contiguous()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Say which file it is that safetensors can't read.

    Raises:
        DamagedFileError: there is one.
    """
    require("safetensors", "export")
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise DamagedFileError(path, f"it is not a whole safetensors file ({error})") from error


def read_header(path: Path) -> dict[str, Any]:
    """The description of each tensor in a safetensors file, by name.

    Raises:
        DamagedFileError: it isn't one.
    """
    try:
        header = json.loads(_header(path)[8:])
    except ValueError as error:
        raise DamagedFileError(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise DamagedFileError(path, "its header is no JSON object")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _header(path: Path) -> bytes:
    """The length of a safetensors file's header, and the header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > min(size - 8, _LONGEST_HEADER):
            problem = f"its header would have {length} bytes, of {size} in all"
            raise DamagedFileError(path, f"it is not a safetensors file: {problem}")
        return start + file.read(length)


def _header_checksum(path: Path) -> str:
    return _checksum(_header(path))


def _json_checksum(content: Mapping[str, Any]) -> str:
    return _checksum(json.dumps(content, sort_keys=True).encode())


def _spread(work: Callable[[T], R], items: Sequence[T], size: Callable[[T], int]) -> list[R]:
    """``work`` of each item. Threads have a share each, of about the same size: with a queue, the
    hand-over of many small items takes longer than the work.
    """
    shares: list[list[int]] = [[] for _ in range(max(1, min(8, torch.get_num_threads())))]
    sizes = [0] * len(shares)
    for i in sorted(range(len(items)), key=lambda i: -size(items[i])):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(i)
        sizes[smallest] += size(items[i])
    results: dict[int, R] = {}

    def run(share: list[int]) -> None:
        for i in share:
            results[i] = work(items[i])

    with ThreadPoolExecutor(len(shares)) as pool:  # starts no thread for nothing
        others = [pool.submit(run, share) for share in shares[1:] if share]
        run(shares[0])
        for other in others:
            other.result()
    return [results[i] for i in range(len(items))]
