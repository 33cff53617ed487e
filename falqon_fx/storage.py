"""Files that are whole or not there: written aside, checksummed, fsynced, renamed.

Tensors are safetensors, everything else JSON; nothing is pickled. Each file is described in a
manifest by its size, a checksum of its header and one of each tensor, so that a truncated, changed
or foreign file is refused by the name of what is wrong in it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PARTIAL = ".partial"


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
    """A path to write to. It gets the name ``final`` once it is whole and on the disk.

    Raises:
        FalqonError: the disk is full. Nothing is left then, and what had the name before stays.
    """
    # In a folder, since safetensors itself writes to files of random names beside its own.
    folder = final.parent / _PARTIAL
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    aside = folder / final.name
    try:
        with _disk_full_explained(final):
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
        FalqonError: ``final`` exists and isn't an empty folder, or the disk is full.
    """
    refuse_existing(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(final.name + _PARTIAL)
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    aside.mkdir()
    try:
        with _disk_full_explained(final):
            yield aside
            for path in sorted(aside.rglob("*"), reverse=True):
                flush_to_disk(path)
            flush_to_disk(aside)
            os.replace(aside, final)
            flush_to_disk(final.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def make_folder(path: Path) -> None:
    """Make a folder and its parents, on the disk."""
    if not path.is_dir():
        path.mkdir(parents=True)
        flush_to_disk(path.parent)


def refuse_existing(final: Path) -> None:
    """Raise where ``final`` exists and isn't an empty folder."""
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise FalqonError(str(final), "exists already", "Name another folder, or remove this one")


@contextmanager
def _disk_full_explained(final: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # safetensors reports the operating system's error as text.
        code = getattr(error, "errno", None)
        full = code in _FULL or any(f"os error {number}" in str(error) for number in _FULL)
        if not full:
            raise
        free = shutil.disk_usage(final.parent).free
        raise FalqonError(
            str(final),
            f"the disk is full ({free / 2**20:.0f} MiB are free); nothing was left under this name",
            "Free some space, or name a folder on another disk",
        ) from error


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
    with _threads() as pool:
        pending = pool.map(checksum, (tensors[name] for name in names))
        flush_to_disk(path)  # the disk works meanwhile
        sums = list(pending)
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
    """A safetensors file with the access rights that any new file gets."""
    require("safetensors", "checkpoint")
    from safetensors.torch import save_file

    path.touch()
    rights = path.stat().st_mode
    path.unlink()  # safetensors renames its file; over another, that would wait for the disk
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(rights)  # safetensors lets nobody else read


def write_manifest(final: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with its own checksum, aside and renamed: the moment from which it counts."""
    whole = {**content, "checksum": _json_checksum(content)}
    with written_aside(final) as aside:
        aside.write_text(json.dumps(whole, indent=1), encoding="utf-8")


# -- reading ---------------------------------------------------------------------------------------


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """The content of a manifest of the ``format`` ``kind``.

    Raises:
        FalqonError: there is none.
        DamagedFileError: it isn't one, or was changed.
    """
    if not path.is_file():
        raise FalqonError(str(path.parent), f"there is no {path.name} in it", "Name another folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(path, f"it is not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise DamagedFileError(path, f"its format is not {kind!r}")
    stated = content.pop("checksum", None)
    if stated != _json_checksum(content):
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
    require("safetensors", "checkpoint")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DamagedFileError(path, "it is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise DamagedFileError(path, f"it has {size} bytes instead of {expected['bytes']}")
    if _header_checksum(path) != expected["header"]:
        raise DamagedFileError(path, "the checksum of its header is wrong")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise DamagedFileError(path, f"it is not a safetensors file ({error})") from error
    names = list(expected["tensors"]) if verify else []
    with _threads() as pool:
        sums = pool.map(checksum, (tensors[name] for name in names))
        for name, digest in zip(names, sums, strict=True):
            if digest != expected["tensors"][name]["xxh3"]:
                raise DamagedFileError(path, f"the checksum of tensor {name!r} is wrong")
    return tensors


def checksum(tensor: Tensor) -> str:
    """XXH3 (128 bits) of the bytes of a contiguous tensor on CPU."""
    xxhash = require("xxhash", "checkpoint")
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return str(xxhash.xxh3_128_hexdigest(flat.numpy()))


def _header_checksum(path: Path) -> str:
    xxhash = require("xxhash", "checkpoint")
    with path.open("rb") as file:
        start = file.read(8)
        length = min(int.from_bytes(start, "little"), path.stat().st_size)
        return str(xxhash.xxh3_128_hexdigest(start + file.read(length)))


def _json_checksum(content: Mapping[str, Any]) -> str:
    xxhash = require("xxhash", "checkpoint")
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, min(8, torch.get_num_threads())))


# -- trees -----------------------------------------------------------------------------------------


def separate(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors go to ``tensors`` under their paths. `join` is the inverse.

    Raises:
        FalqonError: something that is neither a tensor nor plain data.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        items = [separate(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if type(value) in (dict, OrderedDict) and all(type(key) in (str, int) for key in value):
        return {"dict": [[k, separate(v, f"{path}.{k}", tensors)] for k, v in value.items()]}
    raise FalqonError(
        path,
        f"a {type(value).__name__} can't be saved: only tensors, numbers, text, lists and dicts",
        "Save it apart, or convert it first",
    )


def join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `separate`; tensors are copies."""
    if isinstance(value, list):
        return [join(item, tensors) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content].clone()
        if kind == "tuple":
            return tuple(join(item, tensors) for item in content)
        return {key: join(item, tensors) for key, item in content}
    return value


def unshared(tensors: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors on CPU that share no memory, and the names that mean another's tensor."""
    kept: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors:
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and key in seen:
            same[name] = seen[key]
            continue
        seen[key] = name
        storage = tensor.untyped_storage().data_ptr()
        plain = tensor.cpu().contiguous()
        kept[name] = plain.clone() if storage in storages and plain is tensor else plain
        storages.add(storage)
    return kept, same
