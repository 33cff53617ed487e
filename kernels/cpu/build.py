"""The C++ beside a module here as compiled code, built at need and kept in the cache folder.

What is kept is found by a name that holds all that the code depends on: the source, the compiler,
its flags, and what it makes of ``-march=native`` on this CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from falqon_fx.errors import FalqonError
from falqon_fx.kernels.cache import OwnFolder, cache_folder

log = logging.getLogger(__name__)

_COMPILERS = ("g++", "clang++", "c++")
# Results are to be ATen's bit for bit: no multiplication and addition in one, no other shortcut.
_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-march=native", "-fopenmp", "-ffp-contract=off")


def compiled(source: Path, functions: Sequence[str], without: str) -> Any | None:
    """The library made from a file, behind ``numbers.cpp``, of which ``functions`` are called and
    return nothing; None where no compiler works or none of its code may run, with the reason in the
    log and ``without``, what that costs.
    """
    remedy = "install a C++ compiler, or name one with CXX=..."
    try:
        parts = (Path(__file__).with_name("numbers.cpp"), source)
        content = _kept(source.stem, "".join(part.read_text(encoding="utf-8") for part in parts))
        remedy = "set TMPDIR to a folder whose files may be run (not mounted with noexec)."
        library = _load(source.stem, content)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        log.warning("falqon: %s. Remedy: %s Reason: %s", without, remedy, reason)
        return None
    for name in functions:
        getattr(library, f"falqon_{name}").restype = None
    return library


def _kept(name: str, text: str) -> bytes:
    """The library made from ``text``, from the cache folder or else into it."""
    compiler = _compiler()
    what = json.dumps([text, compiler, _FLAGS, _target(compiler)])
    stem = f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:32]}-"
    path = cache_folder() / f"compiled-{os.geteuid()}"  # others may share the cache folder
    content = None
    try:
        with OwnFolder.opened(path) as folder:
            content = folder.find(stem)
            if content is None:
                content = _compile(compiler, text)
                folder.keep(stem, content)
    except FalqonError as error:
        log.warning("falqon: compiled code is not kept, and made anew in each process. %s", error)
    return content or _compile(compiler, text)


def _compiler() -> tuple[str, ...]:
    """$CXX, which may hold flags, or the first that is there."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return tuple(named)
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        raise FileNotFoundError(f"there is none of {', '.join(_COMPILERS)}")
    return (found,)


@functools.cache
def _target(compiler: tuple[str, ...]) -> str:
    """The macros that a compiler has defined: its version, and each instruction set of this CPU."""
    return _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c++", "-"], "")


def _compile(compiler: tuple[str, ...], text: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "library.so")
        shared = ["-shared", "-fPIC", "-x", "c++", "-", "-o", str(target)]
        _run([*compiler, *_FLAGS, *shared], text)
        return target.read_bytes()


def _run(command: Sequence[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return done.stdout


def _load(name: str, content: bytes) -> ctypes.CDLL:
    """A library from memory: what was checked is what runs, whatever becomes of its file, and a
    file that is cut off while it is mapped can't kill the process.
    """
    if hasattr(os, "memfd_create"):
        try:
            return _from_memory(name, content)
        except OSError as error:  # memory that may not run (vm.memfd_noexec, SELinux), no /proc
            log.info("falqon: %s is loaded from a temporary file (%s)", name, error)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.so")
        file.write_bytes(content)
        return ctypes.CDLL(str(file))


def _from_memory(name: str, content: bytes) -> ctypes.CDLL:
    handle = os.memfd_create(f"falqon-{name}")
    try:
        with open(handle, "wb", closefd=False) as memory:
            memory.write(content)
        # It stays open: where two libraries had one name, the loader would take them for one.
        return ctypes.CDLL(f"/proc/self/fd/{handle}")
    except OSError:
        os.close(handle)
        raise
