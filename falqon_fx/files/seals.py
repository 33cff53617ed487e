"""The files of a folder that hold no tensors: which are copied into it, and their checksums."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from falqon_fx.errors import FalqonError
from falqon_fx.files import storage
from falqon_fx.files.storage import DamagedFileError

MANIFEST = "falqon.json"
EXPORT = "falqon_fx.export.1"  # what `falqon_fx.save_fp8` writes
_FAMILY = EXPORT.rpartition(".")[0]
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "chat_template*", "*.model", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
PAPERS = ("LICENSE*", "NOTICE*", "README.md")
# What makes a model. Other files may be added later.
_READ = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", *CONFIGS)


def known_files(source: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a model's folder that are copied with it.

    Raises:
        FalqonError: one is a link out of the folder, whose contents are nobody's to copy. In a
            cache of the Hugging Face Hub all are links to ``blobs``.
    """
    source = source.resolve()
    within = [source, *(above / "blobs" for above in source.parents[1:2])]
    found = [file for file in _matching(source, patterns) if file.is_file()]
    for file in found:
        if not any(file.resolve().is_relative_to(folder) for folder in within):
            raise FalqonError(
                str(file), "it is a link out of the model's folder", "Put the file itself there"
            )
    return found


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a folder whose names match one of some patterns."""
    patterns = tuple(patterns)
    names = sorted(os.listdir(folder))
    return [folder / n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make a tokenizer or a processor; of none an empty list."""
    return known_files(folder, TOKENIZER) if folder.is_dir() else []


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files, not links, into a new folder."""
    for file in files:
        shutil.copyfile(file.resolve(), folder / file.name)


# -- checksums -------------------------------------------------------------------------------------


def seal(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """What `check` compares, of files by their names in a folder."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "xxh3": _checksum(folder / name)}
        for name in sorted(names)
    }


def check(folder: Path, sealed: Mapping[str, Any], beside: Iterable[str] = ()) -> None:
    """Compare the files of a folder with their checksums.

    Raises:
        DamagedFileError: one is missing or another; or there is one that a model is made from, and
            that is neither sealed nor ``beside`` it.
    """
    storage.check_names(folder / MANIFEST, sealed)
    for name, expected in sealed.items():
        file = folder / name
        if not file.is_file():
            raise DamagedFileError(file, "it is missing")
        with storage.read_errors_explained(file):
            size, checksum = file.stat().st_size, _checksum(file)
        if size != expected["bytes"]:
            raise DamagedFileError(file, f"it has {size} bytes instead of {expected['bytes']}")
        if checksum != expected["xxh3"]:
            raise DamagedFileError(file, f"its checksum is not the one in {MANIFEST}")
    known = {*sealed, *beside}
    with storage.read_errors_explained(folder):
        found = _matching(folder, _READ)
    for file in found:
        if file.name not in known:
            raise DamagedFileError(file, f"{MANIFEST} does not name it: it was put there later")


def is_export(folder: Path) -> bool:
    """Whether a folder has the manifest of an export, damaged or not."""
    file = folder / MANIFEST
    if not file.is_file():
        return False
    try:
        content = storage.read_json(file)
    except DamagedFileError:
        return False
    return isinstance(content, dict) and str(content.get("format")).startswith(_FAMILY + ".")


def check_export(folder: Path) -> None:
    """Compare every file of an export with its checksum. Without its manifest an export is an FP8
    checkpoint like those of others.

    Raises:
        DamagedFileError: a file that is missing, was changed, or was added.
    """
    remedy = "Export the model again, or remove the file to load what is there as it is"
    check(folder, storage.read_manifest(folder / MANIFEST, EXPORT, "export", remedy)["files"])


def _checksum(file: Path) -> str:
    kind = storage.require("xxhash", "checkpoint").xxh3_128
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, kind).hexdigest()
