"""Files in the user's cache folder: generated sources, what was fastest, calibrated cards."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path


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
            write_file(path, content)
    except OSError as error:
        # The full message may name the temporary file, and so differ each time.
        _warn_unwritable(path.parent, error.strerror or str(error))


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return False


def write_file(path: Path, content: bytes) -> None:
    """Puts ``content`` into a file by an atomic rename; makes its folder where there is none."""
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
