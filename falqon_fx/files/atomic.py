"""Files and folders that are whole or not there: written aside, fsynced, renamed.

What is written aside lies in a folder `aside`, whose name is the library's with a random number. Of
what is there already nothing else is ever removed, and no link is followed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from falqon_fx.errors import FalqonError
from falqon_fx.files.disk import (
    disk_errors_explained,
    everything_below,
    flush_to_disk,
    give_back,
    is_same,
    try_lock,
    warn,
)


def _machine() -> str:
    """A hash of this machine's name and boot, since others may have the same name: containers,
    clones. Where the boot has no number, of the name alone.
    """
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return hashlib.sha256((platform.node() + boot).encode()).hexdigest()[:6]


_HOST = _machine()
_ASIDE = re.compile(r"\.falqon-([0-9a-f]{6})-([0-9a-f]{12})\.partial")
_LONG = 24 * 3600.0  # seconds


# -- written aside ---------------------------------------------------------------------------------


@contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
    """A path to write to. It gets the name ``final`` once it is whole and on the disk. The caller
    holds the folder's `lock`.

    Raises:
        FalqonError: the disk is full, or the folder can't be written to. Nothing is left then, and
            what had the name before stays.
    """
    # In a folder, since safetensors itself writes to files of random names beside its own.
    with aside(final.parent) as folder:
        with disk_errors_explained(final):
            yield folder / final.name
            flush_to_disk(folder / final.name)
            rename(folder / final.name, final)
        _confirm(final)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write into. It gets the name ``final`` once all in it is on the disk.

    Raises:
        FalqonError: ``final`` exists and isn't an empty folder, the disk is full, or the folder
            around it can't be written to.
    """
    refuse_existing(final)
    final = Path(os.path.realpath(final))  # a link keeps pointing where it did
    with made_folder(final.parent):
        for _ in leftovers(final.parent):  # which go with the next step of the loop
            pass
        with aside(final.parent) as folder:
            with disk_errors_explained(final):
                yield folder
                for path in everything_below(folder):
                    flush_to_disk(path)
            rename_into_place(folder, final)


@contextmanager
def aside(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent`` that is removed at the end, or after this process was killed by
    who finds it among the `leftovers`.
    """
    path, handle = _new_aside(parent)
    try:
        yield path
    finally:  # Ctrl-C too leaves nothing
        remove(path)
        give_back(handle)


def number_of(path: Path) -> str:
    """The random number in the name of an `aside`."""
    ((_, number),) = _ASIDE.findall(path.name)
    return str(number)


def is_aside(path: Path) -> bool:
    """Whether a folder has a name as `aside` gives it."""
    return _ASIDE.fullmatch(path.name) is not None


def leftovers(parent: Path) -> Iterator[str]:
    """The number of each `aside` whose writer was killed, which is removed after the caller had it.

    Where there are no locks nobody knows whether a writer lives, so there all of them stay. Some
    file systems lock for one machine alone: an aside of another must have been left for a day.
    """
    for path in _listed(parent):
        if not is_aside(path):
            continue
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or nothing that was made here
            continue
        try:
            if _may_go(path, os.fstat(handle)) and try_lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield number_of(path)
                remove(path)
        except OSError:  # such as BlockingIOError: its writer lives
            continue
        finally:
            give_back(handle)


def _may_go(path: Path, known: os.stat_result) -> bool:
    """Whether an aside is this user's, and of this machine or old."""
    here = path.name.startswith(f".falqon-{_HOST}-")
    return known.st_uid == os.geteuid() and (here or time.time() - known.st_mtime > _LONG)


def _new_aside(parent: Path) -> tuple[Path, int]:
    """A new folder and the handle that holds its lock."""
    while True:
        path = parent / f".falqon-{_HOST}-{uuid.uuid4().hex[:12]}.partial"
        with disk_errors_explained(parent):
            path.mkdir()
            try:
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:  # taken for a leftover before it was locked
                continue
            except BaseException:
                remove(path)
                raise
            try:
                try_lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_same(path, os.fstat(handle)):
                    return path, handle
            except BlockingIOError:  # the same, just now
                pass
            except BaseException:
                remove(path)
                os.close(handle)
                raise
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or folder that is no longer needed, not what a link points at; a warning says
    where that fails, since what was asked for is done.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:  # by another process
        return
    except OSError as error:
        warn(f"{path} is no longer needed but can't be removed ({error}). Remove it yourself")


# -- renamed ---------------------------------------------------------------------------------------


def rename(source: Path, target: Path) -> None:
    """Rename over ``target``.

    Where NFS loses the server's answer it asks again, and hears that there is no ``source``.
    """
    known = os.lstat(source)
    try:
        os.replace(source, target)
    except FileNotFoundError:
        if not is_same(target, known):
            raise


def rename_into_place(folder: Path, final: Path) -> None:
    """Give a folder whose files are on the disk its name.

    Raises:
        FalqonError: another process made one of this name meanwhile. Both are kept.
    """
    final = Path(os.path.realpath(final))
    with disk_errors_explained(final):
        flush_to_disk(folder)
        try:
            rename(folder, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            kept = folder
            if is_aside(folder):
                kept = final.with_name(f"{final.name}.{number_of(folder)}")
                rename(folder, kept)
            raise FalqonError(
                str(final),
                f"another process made it meanwhile; what this one wrote is whole, in {kept}",
                "Take that one, or remove it",
            ) from error
    _confirm(final)


def _confirm(final: Path) -> None:
    """Have the disk keep a name that was just given."""
    try:
        flush_to_disk(final.parent)
    except OSError as error:
        if error.errno == errno.EACCES:  # a folder that may be written to and not read
            warn(
                f"{final} is whole, but its name can't be flushed to the disk ({error}), and "
                f"may be lost when the power fails. Let this user read {final.parent}"
            )
            return
        raise FalqonError(
            str(final),
            f"it is whole and has its name, but the disk failed to confirm that ({error}), and may "
            "forget it when the power fails",
            "Look after the disk, and save once more",
        ) from error


# -- folders ---------------------------------------------------------------------------------------


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """A folder and its parents, on the disk; those that were not there go again where the body
    fails before there is anything in them.
    """
    path = Path(os.path.realpath(path))  # mkdir refuses a link, even to where nothing is yet
    made: list[Path] = []
    try:
        with disk_errors_explained(path):
            for folder in reversed([path, *path.parents]):
                if not folder.is_dir() and _made(folder):
                    made.append(folder)
                    flush_to_disk(folder.parent)
        yield
    except BaseException:
        for folder in reversed(made):
            try:
                folder.rmdir()
            except OSError:  # there is something in it, or it is gone
                break
        raise


def _made(folder: Path) -> bool:
    """Make a folder; whether it was this process that did."""
    try:
        folder.mkdir()
    except FileExistsError:
        if folder.is_dir():  # another process was faster
            return False
        raise
    return True


def working_folder(final: Path) -> Path:
    """Where work for ``final`` lies that goes on after an interruption: ``final.partial``."""
    final = Path(os.path.realpath(final))
    return final.with_name(final.name + ".partial")


def refuse_link(path: Path) -> None:
    """Raise where a folder that is to be written into is a link to another."""
    with disk_errors_explained(path):
        is_link = path.is_symlink()
    if is_link:
        raise FalqonError(str(path), "it is a link to elsewhere", "Remove it")


def refuse_existing(final: Path) -> None:
    """Raise where ``final`` exists and isn't an empty folder."""
    with disk_errors_explained(final):
        free = not final.exists() or (final.is_dir() and not any(final.iterdir()))
    if not free:
        raise FalqonError(str(final), "exists already", "Name another folder, or remove this one")


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # it may be written to, but not be read
        return []
