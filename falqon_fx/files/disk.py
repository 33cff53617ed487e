"""Disks and file systems as they are: full, failing, forbidden, without locks or without fsync."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from falqon_fx.errors import FalqonError, warn_once

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    # A file or folder has the name, or none may have it.
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
)
# Of file systems that lack a call, such as Lustre's without its option flock, and NFS.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF)
_NO_FSYNC = (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF)


# -- locks -----------------------------------------------------------------------------------------


@contextmanager
def lock(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Keep other processes and threads that `lock` a folder out; readers share it. A process that
    dies gives it back. A file system without locks gets a warning.

    Raises:
        FalqonError: another has it, and ``wait`` is False; or another moved the folder meanwhile.
        OSError: a folder that is to be read can't be.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    # Who reads has other remedies than who writes, and says them (`storage.read_errors_explained`).
    with nullcontext() if shared else disk_errors_explained(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with nullcontext() if shared else disk_errors_explained(folder, "locked"):
            _lock_or_refuse(folder, handle, kind)
            there = is_same(Path(os.path.realpath(folder)), os.fstat(handle))
        if not there:
            problem = "another process moved or removed it"
            raise FalqonError(str(folder), problem, "Look for it, or call again")
        yield
    finally:
        give_back(handle)


def _lock_or_refuse(folder: Path, handle: int, kind: int) -> None:
    try:
        has_locks = try_lock(handle, kind)
    except BlockingIOError as error:
        raise FalqonError(
            str(folder), "another process is writing it", "Wait, or name another folder"
        ) from error
    if not has_locks:
        warn(
            f"the file system of {folder} has no locks: let no two processes save there, or one "
            "save and another load, at the same time"
        )


def try_lock(handle: int, kind: int) -> bool:
    """Lock a folder; whether the file system can.

    Raises:
        BlockingIOError: another has it.
    """
    try:
        fcntl.flock(handle, kind)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def give_back(handle: int) -> None:
    """Give a lock back, which a process forked meanwhile would keep, and close its handle."""
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            warn(f"a lock can't be given back ({error}): until this process ends, others may wait")


# -- the disk --------------------------------------------------------------------------------------


@contextmanager
def disk_errors_explained(final: Path, done: str = "written") -> Iterator[None]:
    """Say what a full disk, missing rights or a failing disk mean for ``final``."""
    try:
        yield
    except FalqonError:
        raise
    except Exception as error:
        code, text = _code(error), str(error)
        if code is None:
            raise
        if code in _FORBIDDEN:
            raise FalqonError(
                str(final), f"it can't be {done} there ({text})", "Name a new folder that is yours"
            ) from error
        what, remedy = f"the disk or its file system failed ({text})", "Look after it, or name"
        if code in _FULL:
            what, remedy = f"the disk is full{_free(final)}", "Free some space, or name"
        unchanged = "nothing has changed under this name"
        remedy = f"{remedy} a folder on another disk"
        raise FalqonError(str(final), f"{what}; {unchanged}", remedy) from error


def _code(error: Exception) -> int | None:
    """The number of an operating system's error, which safetensors reports as text."""
    if isinstance(error, OSError):
        return error.errno or 0  # of libraries' own
    found = re.search(r"os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _free(final: Path) -> str:
    try:
        return f" ({shutil.disk_usage(final.parent).free / 2**20:.0f} MiB are free)"
    except OSError:  # the disk says nothing
        return ""


def everything_below(folder: Path) -> list[Path]:
    """The files and folders in a folder, the deepest first; `Path.rglob` would leave out what can't
    be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found = os.walk(folder, topdown=False, onerror=fail)
    return [Path(above, name) for above, folders, files in found for name in (*files, *folders)]


def flush_to_disk(path: Path) -> None:
    """Fsync a file or a folder. A file system that can't gets a warning."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
        warn(f"the file system of {path.parent} can't flush to the disk, so what is saved there "
              "may be lost when the power fails. Save to a local disk, and copy")  # fmt: skip
    finally:
        os.close(handle)


def warn(text: str) -> None:
    """Say once what doesn't keep a save or a load from being done."""
    warn_once(f"falqon: {text}.", stacklevel=4)


def is_same(path: Path, known: os.stat_result) -> bool:
    """Whether a path is, itself, the file that was ``known``."""
    try:
        return os.path.samestat(os.lstat(path), known)
    except FileNotFoundError:
        return False
