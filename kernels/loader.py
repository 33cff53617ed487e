"""Source to callable kernels, with a copy in a cache folder for people, tracebacks and debuggers.

The text that runs is always the rendered one: a file that differs from it (cut off, edited, written
by a bad disk) is written anew, and no file is ever executed.
"""

from __future__ import annotations

import hashlib
import linecache
import os
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

from falqon_fx.kernels.interpreter import NAMESPACE, decorating
from falqon_fx.kernels.render import render
from falqon_fx.kernels.spec import KernelSpec


def cache_folder() -> Path:
    """Where generated sources go: $FALQON_CACHE, else ``falqon-fx`` in the user's cache folder."""
    chosen = os.environ.get("FALQON_CACHE")
    if chosen:
        return Path(chosen)
    home = os.path.expanduser("~")
    if sys.platform == "darwin":
        base = os.path.join(home, "Library", "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return Path(base, "falqon-fx")


def store(source: str, name: str, folder: Path) -> Path:
    """Path of the file in ``folder`` that holds ``source``, written only where it does not.

    The file's name ends in a hash of the source. It appears by an atomic rename, so that several
    processes may store the same source at once. In a folder that cannot be written the path is
    returned all the same, with one warning.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()
    path = folder / f"{name}-{digest[:16]}.py"
    replace_file(path, source.encode())
    return path


def replace_file(path: str | Path, content: bytes) -> None:
    """Puts ``content`` into a file by an atomic rename, unless it is there already; warns once
    where its folder cannot be written.
    """
    path = Path(path)
    try:
        if not _holds(path, content):
            _write(path, content)
    except OSError as error:
        # The full message may name the temporary file, and so differ each time.
        _warn_unwritable(path.parent, error.strerror or str(error))


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return False


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@cache
def _warn_unwritable(folder: Path, reason: str) -> None:
    warnings.warn(
        f"generated kernels are not kept: {folder} cannot be written ({reason}); "
        "set FALQON_CACHE to a folder that can",
        RuntimeWarning,
        stacklevel=5,
    )


@cache
def load(spec: KernelSpec, interpret: bool = False) -> ModuleType:
    """The module rendered from ``spec``, its kernels compiled on demand or interpreted."""
    source = render(spec)
    path = str(store(source, spec.name, cache_folder()))
    # Triton reads the source of a kernel through linecache: an entry without a time is never
    # checked against the disk, so that Triton sees this text whatever becomes of the file.
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    module = ModuleType(f"{__package__}.generated.{spec.name}")
    module.__file__ = path
    if interpret:
        module.__dict__.update(NAMESPACE)
    with decorating(interpret):
        exec(compile(source, path, "exec"), module.__dict__)
    return module
