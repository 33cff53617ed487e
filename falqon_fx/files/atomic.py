"""Files and folders that are whole or not there: written aside, fsynced, renamed, locked."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from falqon_fx.errors import FalqonError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),  # a file has the name, ...
)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EBADF)  # some network file systems
_PARTIAL = ".partial"


@contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
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
        with disk_errors_explained(final):
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
            with disk_errors_explained(final):
                for path in aside.iterdir():  # of a run that was killed
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                yield aside
                for path in sorted(aside.rglob("*"), reverse=True):
                    flush_to_disk(path)
                rename_into_place(aside, final)
        except BaseException:  # Ctrl-C too leaves nothing
            shutil.rmtree(aside, ignore_errors=True)
            raise


def partial(final: Path) -> Path:
    """The folder that gets the name ``final`` later, on the disk."""
    final = Path(os.path.realpath(final))  # a link keeps pointing where it did
    aside = final.with_name(final.name + _PARTIAL)
    make_folder(aside)
    return aside


def rename_into_place(aside: Path, final: Path) -> None:
    """Give a folder whose files are on the disk its name."""
    flush_to_disk(aside)
    final = Path(os.path.realpath(final))
    os.replace(aside, final)
    flush_to_disk(final.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, on the disk."""
    path = Path(os.path.realpath(path))  # mkdir refuses a link, even to where nothing is yet
    if not path.is_dir():
        with disk_errors_explained(path):
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
def disk_errors_explained(final: Path) -> Iterator[None]:
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
