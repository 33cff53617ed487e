"""Files that are whole or not there: written aside, checksummed, fsynced, renamed.

Tensors are safetensors, everything else JSON; nothing is pickled. Each file is described in a
manifest by its size, a checksum of its header and one of each tensor, so that a truncated, changed
or foreign file is refused by the name of what is wrong in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.files.atomic import atomic_file
from falqon_fx.files.disk import flush_to_disk
from falqon_fx.kernels.cpu import native as cpu

T = TypeVar("T")
R = TypeVar("R")
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
    with atomic_file(final) as aside:
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
def file_errors_explained(path: Path) -> Iterator[None]:
    """Say which file it is that safetensors can't read.

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
