"""`save_compiled`, `load_compiled`: what torch.compile made, for another process or machine."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from falqon_fx.errors import FalqonError, printable
from falqon_fx.files import atomic
from falqon_fx.files.storage import read_errors_explained
from falqon_fx.kernels.cache import cache_folder, replace_file
from falqon_fx.site.spec import lowering_version

_MANIFEST, _ARTIFACTS, _FORMAT = "falqon.json", "artifacts.bin", "falqon_fx.compiled.1"
_CHOICES = re.compile(r"choices-[0-9a-f]{16}\.json")


@dataclass(frozen=True)
class CompiledReport:
    """What `save_compiled` wrote or `load_compiled` read: how many entries of each of torch's
    caches, and bytes.
    """

    directory: Path
    entries: dict[str, int]
    bytes: int

    def __str__(self) -> str:
        parts = ", ".join(f"{count} of {name}" for name, count in self.entries.items())
        return printable(f"{self.directory}: {self.bytes / 2**20:.1f} MiB, {parts}")


def save_compiled(directory: str | Path) -> CompiledReport:
    """Write what this process has compiled, so that another one need not.

    Call it after the first steps. The folder holds torch's cache artifacts
    (``torch.compiler.save_cache_artifacts``) and which kernels were the fastest. The next process
    still traces the model, and on a CPU compiles Inductor's C++ and that of this library, which is
    made for the CPU at hand.

    Raises:
        FalqonError: nothing was compiled by Inductor, or the folder can't be written.
    """
    found = torch.compiler.save_cache_artifacts()
    if found is None:
        raise FalqonError(
            str(directory),
            "Inductor has compiled nothing in this process that could be saved",
            'Call it after a step with inner="inductor", with torch\'s caches on',
        )
    content, info = found
    choices = [p for p in sorted(cache_folder().glob("choices-*.json")) if p.is_file()]
    manifest = {
        "format": _FORMAT,
        "made_by": _versions(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    with atomic.new_folder(Path(directory)) as folder:
        (folder / _ARTIFACTS).write_bytes(content)
        for file in choices:
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return _report(Path(directory), info, len(content))


def load_compiled(directory: str | Path) -> CompiledReport:
    """Put what `save_compiled` wrote into this machine's caches, before the first step.

    **Load only what you or somebody whom you trust has saved.** torch unpickles these files and
    runs the code in them: whoever could write the folder runs code as you.

    A graph is taken from it where all is as it was: model and sizes, options, versions, the kind of
    CPU or GPU; what differs is compiled as ever.

    Raises:
        FalqonError: the folder isn't one, is damaged, or was made by other versions.
    """
    folder = Path(directory)
    with read_errors_explained(folder):
        manifest, content = _read(folder)
    if manifest["made_by"] != _versions():
        raise FalqonError(
            str(folder),
            f"it was made by {_named(manifest['made_by'])}; here is {_named(_versions())}",
            "Compile anew and save that",
        )
    info = torch.compiler.load_cache_artifacts(content)
    if info is None:
        raise _damaged(folder)
    for file in folder.glob("choices-*.json"):
        own = cache_folder() / file.name
        if _CHOICES.fullmatch(file.name) and not own.exists():  # else this machine has timed it
            replace_file(own, file.read_bytes())
    return _report(folder, info, len(content))


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / _ARTIFACTS).read_bytes()
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        whole = manifest["format"] == _FORMAT and isinstance(manifest["made_by"], dict)
        right = manifest["sha256"] == hashlib.sha256(content).hexdigest()
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(folder) from error
    if not (whole and right):
        raise _damaged(folder)
    return manifest, content


def _damaged(folder: Path) -> FalqonError:
    return FalqonError(
        str(folder), "it isn't what save_compiled wrote", "Compile anew and save that"
    )


def _versions() -> dict[str, str]:
    """What torch's caches and ours go by wherever they are."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lowering": lowering_version(),
    }


def _named(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _report(folder: Path, info: Any, size: int) -> CompiledReport:
    entries = {name: len(keys) for name, keys in info.artifacts.items()}
    return CompiledReport(folder, entries, size)
