"""Files in the user's cache folder: generated sources, compiled code, what was fastest, calibrated
cards.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from falqon_fx.errors import FalqonError


def cache_folder() -> Path:
    """Where the library keeps what it makes: $FALQON_CACHE, else ``falqon-fx`` in the user's cache
    folder.
    """
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
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
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


class OwnFolder:
    """A folder of this user's alone, for what a process will run. Its files have a checksum in
    their names.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self._path, self._handle = path, handle

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[OwnFolder]:
        """The folder at ``path``, made where there is none.

        Raises:
            FalqonError: it can't be made, is a link, belongs to someone else, or others may write
                in it.
        """
        try:
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            path.mkdir(0o700, exist_ok=True)
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise FalqonError(str(path), f"it is no folder of ours ({error})", _REMEDY) from error
        try:
            found = os.fstat(handle)
            if not _is_own(found):
                problem = (
                    f"it belongs to user {found.st_uid}, with rights {found.st_mode & 0o777:o}"
                )
                raise FalqonError(str(path), problem, _REMEDY)
            yield cls(path, handle)
        finally:
            os.close(handle)

    def find(self, stem: str) -> bytes | None:
        """The content of a file whose name begins with ``stem``, if there is a whole one.

        Raises:
            FalqonError: the folder can't be read.
        """
        try:
            names = os.listdir(self._handle)
        except OSError as error:
            problem = f"it can't be read ({error.strerror})"
            raise FalqonError(str(self._path), problem, _REMEDY) from error
        for name in names:
            if name.startswith(stem):
                content = self._content(name)
                if content is not None and name == stem + _checksum(content):
                    return content
        return None

    def keep(self, stem: str, content: bytes) -> None:
        """Write a file that `find` finds, aside and renamed.

        Raises:
            FalqonError: the folder can't be written.
        """
        aside = f".{secrets.token_hex(16)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            with open(os.open(aside, flags, 0o600, dir_fd=self._handle), "wb") as file:
                file.write(content)
            folder = {"src_dir_fd": self._handle, "dst_dir_fd": self._handle}
            os.replace(aside, stem + _checksum(content), **folder)
        except OSError as error:
            self._remove(aside)
            problem = f"it can't be written ({error.strerror})"
            raise FalqonError(str(self._path), problem, _REMEDY) from error

    def _content(self, name: str) -> bytes | None:
        """What a file of this user's holds; of a link, a pipe or another's file nothing."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with open(os.open(name, flags, dir_fd=self._handle), "rb") as file:
                found = os.fstat(file.fileno())
                return file.read() if stat.S_ISREG(found.st_mode) and _is_own(found) else None
        except OSError:  # a link; a disk that can't be read: it is made anew
            return None

    def _remove(self, name: str) -> None:
        with suppress(OSError):  # what is left has a name that nobody looks for
            os.unlink(name, dir_fd=self._handle)


_REMEDY = "Make it a folder of your own that others can't write (chmod 700), or set FALQON_CACHE"


def _is_own(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
