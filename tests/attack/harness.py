"""What attacks on files share: children that may die, and verdicts on how a call ended.

A call on a damaged file ends in one of three ways: all is as before and a `FalqonError` says why;
all is as before and nothing is said (the damage was white space); or all is as the file was written
to make it. A verdict that begins with "bad" is anything else: another exception, a mixture, a
signal, a call without an end.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.files import atomic, storage

SECONDS = 60  # of one call, which takes less than one
_MEMORY = (
    16 * 2**30
)  # beyond what a child has when it starts: a size from a file fails, not the host
Verdict = str
Attack = Callable[[], Verdict]


def verdicts(attacks: Sequence[Attack]) -> list[Verdict]:
    """How each attack ended. All run in a fork of this process, one after the other; where it
    dies, that is the verdict of the attack, and the rest run in another.
    """
    found: list[Verdict] = []
    while len(found) < len(attacks):
        some, end = _in_a_fork(attacks[len(found) :])
        found += some
        if len(found) < len(attacks):
            found.append(f"bad: {end}")
    return found


def _in_a_fork(attacks: Sequence[Attack]) -> tuple[list[Verdict], str]:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        _run(attacks, theirs)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        found = [json.loads(line) for line in pipe if line.endswith("\n")]
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return found, f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return found, f"exit status {os.WEXITSTATUS(status)}"


def _run(attacks: Sequence[Attack], pipe: int) -> None:
    """In the child, which has no other threads than this one: those of a parent are not forked."""
    code = 1
    try:
        torch.set_num_threads(1)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for attack in attacks:
            signal.alarm(SECONDS)
            os.write(pipe, (json.dumps(attack()) + "\n").encode())
        code = 0
    finally:
        os._exit(code)


def verdict(call: Callable[[], Any], state: Callable[[], Any], whole: Any) -> Verdict:
    """How a call ended, by what ``state`` gives before and after; ``whole`` is what it gives when
    the call did all of its work.
    """
    before = state()
    try:
        call()
    except FalqonError as error:
        if not (error.problem and error.remedy):
            return f"bad: no problem or remedy in {error}"
        return "refused" if state() == before else f"bad: changed, and then {error}"
    except Exception as error:
        return f"bad: {type(error).__name__}: {str(error)[:300]}"
    after = state()
    if after == whole:
        return "whole"
    return "before" if after == before else "bad: neither as before nor as it was saved"


def contents(model: nn.Module, *others: Any) -> str:
    """A checksum of all tensors of a model, by name, and of the states of others."""
    found: list[tuple[str, str]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            kind = f"{value.dtype} {list(value.shape)} {storage.digest(value.detach())}"
            found.append((name, kind))
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}.{key}", item)
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                add(f"{name}.{i}", item)
        else:
            found.append((name, repr(value)))

    add("", {**model.state_dict()})
    for i, other in enumerate(others):
        add(str(i), other)
    return storage.checksum(json.dumps(sorted(found)).encode())


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder and a checksum of it; links by where they point."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else storage.checksum(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def surroundings(root: Path, own: Sequence[str] = ()) -> dict[str, Any]:
    """All in a folder but what is ``own`` there and what killed writers left aside: inode, size,
    time and contents of each file. What was written and put back would show by its time.
    """
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if any(f"{name}/".startswith(f"{one}/") for one in own) or "/.falqon-" in name:
            continue
        known = path.lstat()
        if path.is_symlink():
            found[name] = (known.st_ino, os.readlink(path))
        elif path.is_dir():
            found[name] = (known.st_ino, known.st_mode)
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[name] = (known.st_ino, known.st_mode, known.st_size, known.st_mtime_ns, content)
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What was made, removed or written between two looks at `surroundings`."""
    names = before.keys() | after.keys()
    both = {name: (before.get(name), after.get(name)) for name in sorted(names)}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def place_victims(folder: Path) -> None:
    """What lies around and is nobody's to write: files beside, and what links lead to."""
    (folder / "victim").mkdir()
    for name in ("model.safetensors", "checkpoint.json", "x"):
        (folder / "victim" / name).write_text(f"mine: {name}")
    (folder / "link").symlink_to("victim")
    (folder / "out.txt").write_text("mine")


@contextmanager
def damaged(path: Path, content: bytes) -> Iterator[None]:
    """A file with other content for a while."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def flipped(content: bytes, chance: random.Random) -> bytes:
    """The same with one other bit, or now and then one other byte; half of the time near the
    beginning, where the headers are.
    """
    changed = bytearray(content)
    reach = len(content) if chance.random() < 0.5 else min(len(content), 4096)
    place = chance.randrange(reach)
    if chance.random() < 0.75:
        changed[place] ^= 1 << chance.randrange(8)
    else:
        changed[place] = (changed[place] + chance.randrange(1, 256)) % 256
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    """A part of it, the same with something behind it, or other bytes of the same length."""
    kind = chance.randrange(3)
    if kind == 0:
        return content[: chance.randrange(len(content))]
    if kind == 1:
        return content + chance.randbytes(chance.randrange(1, 100))
    return chance.randbytes(len(content))


def swapped(files: Sequence[Path]) -> Iterator[tuple[Path, bytes]]:
    """Each file with the content of each other one."""
    for file in files:
        for other in files:
            if other != file and other.read_bytes() != file.read_bytes():
                yield file, other.read_bytes()


def resealed(path: Path, content: Any) -> None:
    """A manifest with a right checksum, as whoever wrote the checkpoint could have written it."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps({**content, "checksum": storage.json_checksum(content)})
    path.write_text(text, encoding="utf-8")


def copy_of(folder: Path, to: Path) -> Path:
    """A fresh copy of a folder."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, symlinks=True)
    return to


def counted(found: Sequence[Verdict]) -> Counter[str]:
    """How many of each verdict; an assertion error shows the bad ones."""
    bad = [one for one in found if one.startswith("bad")]
    assert not bad, f"{len(bad)} of {len(found)}: {Counter(bad).most_common(20)}"
    return Counter(found)


@contextmanager
def interrupted() -> Iterator[None]:
    """`prequantize`, stopped before its folder gets its name."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "rename_into_place", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a tree of JSON."""
    if not isinstance(tree, dict | list):
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*above, key)
        yield from places(value, (*above, key))
