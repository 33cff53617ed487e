"""Files that are whole or not there: written aside, checksummed, fsynced, renamed.

Tensors are safetensors, everything else JSON; nothing is pickled. Each file is described in a
manifest by its size, a checksum of its header and one of each tensor, so that a truncated, changed
or foreign file is refused by the name of what is wrong in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError
from falqon_fx.files.atomic import atomic_file
from falqon_fx.files.disk import flush_to_disk
from falqon_fx.site.numerics import dtype_name

T = TypeVar("T")
R = TypeVar("R")
_LONGEST_HEADER = 100_000_000  # of a safetensors file, by its format
_MAPPED = 2**20  # bytes from which on a file is mapped; to read a smaller one takes no longer
_LARGEST_JSON = 2**28  # of a manifest with a million tensors


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
        problem = f"{module.partition('.')[0]} is not installed"
        remedy = f"In a clone of falqon-fx: pip install '.[{extra}]'"
        raise FalqonError("", problem, remedy) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write contiguous tensors on CPU that share no memory, onto the disk; returns what
    `open_tensors` checks.
    """
    names = list(tensors)
    save_tensors(path, tensors)
    with ThreadPoolExecutor(1) as pool:
        on_disk = pool.submit(flush_to_disk, path)
        parts = [_bytes(tensors[name]) for name in names]
        sums = _spread(checksum, parts, lambda part: part.nbytes)
        on_disk.result()
    return {
        "bytes": path.stat().st_size,
        "header": checksum(_header(path)),
        "tensors": {
            name: {
                "dtype": dtype_name(tensors[name].dtype),
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
        kind = dtype_name(tensors[name].dtype)
        raise FalqonError(name, f"safetensors have no {kind}", "Convert it first") from error
    path.chmod(rights)  # safetensors lets nobody else read


def write_manifest(final: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with its own checksum, aside and renamed: the moment from which it counts."""
    whole = {**content, "checksum": json_checksum(content)}
    with atomic_file(final) as aside:
        aside.write_text(json.dumps(whole, indent=1), encoding="utf-8")


# -- reading ---------------------------------------------------------------------------------------


def read_manifest(path: Path, kind: str, form: str, remedy: str) -> dict[str, Any]:
    """The content of a manifest of the ``format`` ``kind``, with the fields of ``form``
    (`falqon_fx.files.manifests`).

    Raises:
        FalqonError: there is none, or one of an older or newer format; ``remedy`` says what to do.
        DamagedFileError: it isn't one, or was changed, or names a file outside its folder.
    """
    if not path.is_file():
        raise FalqonError(str(path.parent), f"there is no {path.name} in it", "Name another folder")
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedFileError(path, f"its format is not {kind!r}")
    whole = has_own_checksum(path, content)
    found, family = str(content.get("format")), kind.rpartition(".")[0]
    if found != kind and whole and found.rpartition(".")[0] == family:
        problem = f"its format is {found!r}, and this falqon-fx reads {kind!r}"
        raise FalqonError(str(path), problem, remedy)
    if found != kind:
        raise DamagedFileError(path, f"its format is not {kind!r}")
    if not whole:
        raise DamagedFileError(path, "its checksum is wrong: it was changed after it was written")
    check_form(path, content, form)
    check_names(path, [*content["files"], *content.get("others", ())])
    return content


def has_own_checksum(path: Path, content: dict[str, Any]) -> bool:
    """Whether JSON has the checksum of itself, which is taken out of it."""
    try:
        return bool(content.pop("checksum", None) == json_checksum(content))
    except RecursionError as error:  # reading goes deeper than writing
        raise DamagedFileError(path, "its JSON is nested too deep") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DamagedFileError: it isn't one, or can't be read.
    """
    _check_regular(path)
    with read_errors_explained(path):
        size = path.stat().st_size
        if size > _LARGEST_JSON:
            raise DamagedFileError(path, f"it has {size} bytes, more than any such file")
        return parse_json(path, path.read_bytes())


def parse_json(path: Path, text: bytes | str) -> Any:
    """JSON that is, or is said to be, in a file.

    Raises:
        DamagedFileError: it is none.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except ValueError as error:
        raise DamagedFileError(path, f"it is not valid JSON ({error})") from error
    except RecursionError as error:
        raise DamagedFileError(path, "its JSON is nested too deep") from error


def check_form(path: Path, content: Any, form: str) -> None:
    """Raise a `DamagedFileError` where the content of a file lacks a field that is read, or has
    something else in it (`falqon_fx.files.manifests`).
    """
    from falqon_fx.files import manifests

    problem = manifests.problem(content, form)
    if problem is not None:
        raise DamagedFileError(path, f"it is not what it should be ({problem})")


def check_names(path: Path, names: Iterable[str]) -> None:
    """Raise a `DamagedFileError` where a file names another that is not in its folder."""
    from falqon_fx.files import manifests

    for name in names:
        if not manifests.is_inside(name):
            raise DamagedFileError(path, f"it names {name!r}, which is no file in its folder")


def open_tensors(
    path: Path, expected: Mapping[str, Any], *, verify: bool = True
) -> dict[str, Tensor]:
    """The tensors of a file, read or, from 1 MiB on, mapped into memory, after all checksums were
    found right; without ``verify`` only size and header are looked at.

    Raises:
        DamagedFileError: names the file, the tensor and what is wrong.
    """
    _check_regular(path)
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise DamagedFileError(path, f"it has {size} bytes instead of {expected['bytes']}")
    whole_header = _header(path)
    if checksum(whole_header) != expected["header"]:
        raise DamagedFileError(path, "the checksum of its header is wrong")
    header, start = _entries(path, whole_header), len(whole_header)
    places = {}
    for name, entry in expected["tensors"].items():
        if name not in header:
            raise DamagedFileError(path, f"it has no tensor {name!r}")
        dtype = getattr(torch, entry["dtype"])
        first, end = header[name]["data_offsets"]
        if (start + first) % dtype.itemsize:
            raise DamagedFileError(path, f"tensor {name!r} is of no dtype that can lie there")
        if end - first != math.prod(entry["shape"]) * dtype.itemsize:
            shape = f"{entry['dtype']} {entry['shape']}"
            raise DamagedFileError(path, f"tensor {name!r} has {end - first} bytes, not {shape}")
        places[name] = (start + first, start + end, dtype)
    require("numpy", "checkpoint")
    with file_errors_explained(path):
        whole = _contents(path, size)
    parts = {name: whole[first:end] for name, (first, end, _) in places.items()}
    names = list(parts) if verify else []
    sums = _spread(checksum, [parts[name] for name in names], lambda part: part.nbytes)
    for name, digest in zip(names, sums, strict=True):
        if digest != expected["tensors"][name]["xxh3"]:
            raise DamagedFileError(path, f"the checksum of tensor {name!r} is wrong")
    return {
        name: torch.from_numpy(parts[name]).view(dtype).view(expected["tensors"][name]["shape"])
        for name, (_, _, dtype) in places.items()
    }


def _contents(path: Path, size: int) -> Any:
    """All of a file as a NumPy array: a small one read, a large one mapped."""
    if size >= _MAPPED:
        memory: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        return torch.empty(0, dtype=torch.uint8).set_(memory).numpy()
    whole: Any = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
    with path.open("rb") as file:
        if file.readinto(whole) != size:
            raise DamagedFileError(path, "it was cut off while it was read")
    return whole


def digest(tensor: Tensor) -> str:
    """A checksum of a tensor's contents."""
    return checksum(_bytes(tensor.cpu().contiguous()))


def checksum(part: Any) -> str:
    """XXH3 (128 bits) of a buffer."""
    return str(require("xxhash", "checkpoint").xxh3_128_hexdigest(part))


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on CPU, as a NumPy array."""
    require("numpy", "checkpoint")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


@contextmanager
def file_errors_explained(path: Path) -> Iterator[None]:
    """Say which file it is that safetensors or torch can't read.

    Raises:
        DamagedFileError: there is one.
    """
    require("safetensors", "export")
    from safetensors import SafetensorError

    with read_errors_explained(path):
        try:
            yield
        except SafetensorError as error:
            raise DamagedFileError(path, f"it is not a whole safetensors file ({error})") from error
        except FalqonError:
            raise
        # Torch's and Python's, where the system doesn't let them map the file.
        except (RuntimeError, MemoryError) as error:
            raise OSError(str(error)) from error


@contextmanager
def read_errors_explained(path: Path) -> Iterator[None]:
    """Say which file it is that the operating system doesn't let read."""
    try:
        yield
    except OSError as error:
        problem = f"it can't be read ({error.strerror or error})"
        raise FalqonError(str(path), problem, "See that it is there and yours to read") from error


def read_header(path: Path) -> dict[str, Any]:
    """The description of each tensor in a safetensors file, by name.

    Raises:
        DamagedFileError: it isn't one.
    """
    return _entries(path, _header(path))


def _entries(path: Path, whole: bytes) -> dict[str, Any]:
    """The entries of a `_header`. As the format has it, their tensors lie one after the other."""
    try:
        header = json.loads(whole[8:])
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise DamagedFileError(path, "its header is no JSON object")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    check_form(path, entries, "header")
    size = path.stat().st_size - len(whole)
    for name, entry in entries.items():
        first, end = entry["data_offsets"]
        if not first <= end <= size:
            problem = f"tensor {name!r} would lie at {first}:{end} of {size} bytes"
            raise DamagedFileError(path, f"it is not a whole safetensors file: {problem}")
    place = 0
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        first, end = entries[name]["data_offsets"]
        if first != place:
            problem = f"tensor {name!r} lies at {first}, and the one before ends at {place}"
            raise DamagedFileError(path, f"it is not a whole safetensors file: {problem}")
        place = end
    return entries


def _header(path: Path) -> bytes:
    """The length of a safetensors file's header, and the header."""
    _check_regular(path)
    with read_errors_explained(path), path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > min(size - 8, _LONGEST_HEADER):
            problem = f"its header would have {length} bytes, of {size} in all"
            raise DamagedFileError(path, f"it is not a safetensors file: {problem}")
        return start + file.read(length)


def _check_regular(path: Path) -> None:
    """Refuse what is no file to be read at once: a pipe would wait for ever."""
    with read_errors_explained(path):
        if not path.is_file():
            raise DamagedFileError(path, "it is missing")


def json_checksum(content: Mapping[str, Any]) -> str:
    """The checksum of plain data, whatever order its keys are in."""
    return checksum(json.dumps(content, sort_keys=True).encode())


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
