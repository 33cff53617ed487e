"""Writers whose system calls fail, or that are killed at one: `faults.c`, preloaded, counts them.

All runs in a process of its own, where everything is imported and made; each attack is a fork of
it, so that it costs what its writer does. `attack` starts that process.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.attack.harness import changes, place_victims, surroundings

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("faults.c")
_PROCESS = """
import sys; sys.path.insert(0, {root!r})
from tests.attack import faults
print(faults.run({arguments!r}))
"""
_RENAME, _FLOCK = 4, 7  # of `enum kind`
_ENOENT = 6  # of a rename's errors
_WHOLE_NEW, _OLD = "new", "old"
TRIES = 4  # attempts for each attack that is wanted, since some come too late or find no such call
Counts = dict[str, dict[str, int]]


def withstood(folder: Path, writers: dict[str, int], kind: str, hit: str) -> Counts:
    """How attacks of a kind ended, of which so many really ``hit`` each writer and none failed."""
    found = attack(folder, {kind: writers})[kind]
    failures = found["failures"]
    assert not failures, f"{len(failures)}, of them\n" + "\n\n".join(failures[:5])
    counts: Counts = found["counts"]
    assert {writer: of[hit] for writer, of in counts.items()} == writers
    return counts


def attack(folder: Path, attacks: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Run attacks in a new process: of each kind, "kills" or "faults", so many on each writer. One
    that hits nothing (no such call, the process was done) is followed by another. Returns for each
    kind how often attacks ended how, with the attempts and the hits, and the failures.
    """
    library = folder / "faults.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    command = [compiler, "-O1", "-w", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    arguments = {"folder": str(folder), "library": str(library), "attacks": attacks}
    code = _PROCESS.format(root=str(ROOT), arguments=arguments)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # of what is imported late: Python's, and seen, too
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(arguments: dict[str, Any]) -> str:
    """The attacks, in the process that `attack` started."""
    import torch

    from tests.attack.writers import WRITERS

    torch.set_num_threads(1)  # no pool of threads, which a fork would lack
    chance = random.Random(arguments.get("seed", 0))
    library = ctypes.CDLL(arguments["library"])
    library.faults_fired.restype = ctypes.c_char_p
    found: dict[str, Any] = {}
    for kind, writers in arguments["attacks"].items():
        counts: dict[str, Counter[str]] = {}
        failures: list[str] = []
        for name, number in writers.items():
            bench = Bench(WRITERS[name](), Path(arguments["folder"], kind, name), library)
            counted = counts[name] = Counter()
            faults = faults_of(kind, bench.calls, number, chance)
            for fault in itertools.islice(faults, TRIES * number):
                ended, told, problem = bench.attack(fault)
                counted["tried"] += 1
                counted["hit"] += bool(told.get("fault")) or ended == "killed"
                counted[ended] += 1
                if problem is not None:
                    failures.append(f"{name}, {fault}: {problem}")
                if counted["hit"] >= number:
                    break
        found[kind] = {"counts": counts, "failures": failures}
    return json.dumps(found)


def table(counts: Counts) -> str:
    """The counts of each writer, as docs/reliability.md has them."""
    ends = ("tried", "hit", "killed", "refused", "raw", "done")
    total = {end: sum(of.get(end, 0) for of in counts.values()) for end in ends}
    lines = [f"| writer | {' | '.join(ends)} |", "|---" * (len(ends) + 1) + "|"]
    for name, of in {**counts, "all": total}.items():
        lines.append(f"| {name} | {' | '.join(str(of.get(end, 0)) for end in ends)} |")
    return "\n" + "\n".join(lines)


@dataclass(frozen=True)
class Fault:
    """What happens to the ``at``-th call of a ``kind`` (-1: any), and to all later ones of its kind
    if ``sticky``; ``moment`` kills at a time, as a share of what the whole takes.
    """

    kind: int = -1
    at: int = 0
    variant: int = 0
    sticky: bool = False
    deadly: bool = False
    after: bool = False
    moment: float = -1.0


def faults_of(kind: str, calls: int, number: int, chance: random.Random) -> Iterator[Fault]:
    """The attacks of a kind, without an end: ``number`` different calls where there are so many, a
    sample where there are more, then any.
    """
    first = chance.sample(range(1, calls + 1), min(calls, number))
    later = (chance.randint(1, calls) for _ in itertools.count())
    for i, at in enumerate(itertools.chain(first, later)):
        if kind == "kills":
            if i % 3 == 2:
                yield Fault(moment=chance.uniform(0, 1.2))
            else:
                yield Fault(at=at, deadly=True, after=i % 3 == 1)
        elif i % 12 == 11:  # NFS lost the answer to a rename
            yield Fault(_RENAME, chance.randint(1, 4), _ENOENT, after=True)
        elif i % 12 == 10:
            yield Fault(_FLOCK, 1, chance.randrange(5), sticky=True)
        else:
            yield Fault(-1, at, chance.randrange(420), sticky=i % 4 == 3)


class Writer:
    """Something that writes into ``work`` of a folder. ``state`` says whether there is the old or
    the new, whole, and raises where it is neither.
    """

    own: tuple[str, ...] = ("work/out",)  # what may change
    raw: tuple[str, ...] = ()  # exceptions of torch's own

    def prepare(self, folder: Path) -> None:
        """Make the state before."""

    def act(self, folder: Path) -> None:
        """Write."""
        raise NotImplementedError

    def state(self, folder: Path) -> str:
        """What is there now."""
        raise NotImplementedError


class Bench:
    """A writer, the folder that it is attacked in, and what is around that, which must stay."""

    def __init__(self, writer: Writer, base: Path, library: Any) -> None:
        self.writer, self.library = writer, library
        self.base, self.template, self.folder = base, base / "template", base / "now"
        (self.template / "work").mkdir(parents=True)
        place_victims(base)
        for name in ("work/out.partial.txt", "victim/model.safetensors", "work/tensors-mine.txt"):
            (self.template / name).parent.mkdir(exist_ok=True)
            (self.template / name).write_text(f"mine: {name}")
        (self.template / "work/.partial").mkdir()
        (self.template / "work/.partial/mine").write_text("mine")
        (self.template / "work/link").symlink_to("../victim")
        writer.prepare(self.template)
        self._fresh()
        writer.act(self.folder)  # imports what is imported late
        assert writer.state(self.folder) == _WHOLE_NEW
        self._fresh()
        start = time.perf_counter()
        ended, told = self._child(Fault())
        self.seconds = time.perf_counter() - start
        assert ended == "done", (ended, told)
        self.calls = int(told["calls"])
        self.attacks = 0
        self.written: set[str]  # or tried to be, whatever became of it

    def _fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder, symlinks=True)

    def attack(self, fault: Fault) -> tuple[str, dict[str, Any], str | None]:
        """How it ended, what it told of that, and what was wrong with it."""
        self._fresh()
        self.attacks += 1
        around = self._around()
        ended, told = self._child(fault)
        try:
            self._judge(ended, told, around)
            if self.attacks % 4 == 0:  # the next call finishes the work, and tidies up
                self.writer.act(self.folder)
                assert self.writer.state(self.folder) == _WHOLE_NEW
                assert not changes(around, self._around())
        except Exception as error:
            text = "".join(traceback.format_exception(error))[-1500:]
            return ended, told, f"{ended} {told}: {text}"
        return ended, told, None

    def _judge(self, ended: str, told: dict[str, Any], around: dict[str, Any]) -> None:
        changed = changes(around, self._around())
        assert not changed, f"changed around it: {changed}"
        strays = [path for path in self.written if not self._may_write(path)]
        assert not strays, f"written elsewhere: {strays}"
        assert ended in ("done", "killed", "refused") or told.get("raised") in self.writer.raw
        state = self.writer.state(self.folder)
        assert state in (_OLD, _WHOLE_NEW)
        assert ended != "done" or state == _WHOLE_NEW, "it said that it was done"

    def _may_write(self, path: str) -> bool:
        """What is the call's own, what it writes aside, and what is in a folder that is gone.
        To make the folders above its own, which are there, does nothing.
        """
        place = os.path.relpath(path, os.path.realpath(self.folder)).replace(" (deleted)", "")
        return (
            path in ("/dev/null", os.path.realpath(self.folder))
            or any(f"{place}/".startswith(f"{own}/") for own in self.writer.own)
            or any(own.startswith(f"{place}/") for own in self.writer.own)
            or "/.falqon-" in f"/{place}"
        )

    def _around(self) -> dict[str, Any]:
        return surroundings(self.base, [f"{self.folder.name}/{own}" for own in self.writer.own])

    def _child(self, fault: Fault) -> tuple[str, dict[str, Any]]:
        notes = os.memfd_create("notes")
        try:
            self.library.faults_note(notes)
            return self._forked(fault)
        finally:
            noted = os.pread(notes, os.fstat(notes).st_size, 0).decode(errors="replace")
            self.written = {*noted.splitlines()}
            os.close(notes)

    def _forked(self, fault: Fault) -> tuple[str, dict[str, Any]]:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os.close(ours)
            os.write(theirs, b" ")
            told = self._act(fault)
            os.write(theirs, json.dumps(told)[:60000].encode())
            os._exit(0)
        os.close(theirs)
        with os.fdopen(ours, "rb") as pipe:
            pipe.read(1)
            if fault.moment >= 0:
                time.sleep(fault.moment * self.seconds)
                os.kill(child, signal.SIGKILL)
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return ("killed" if name == "SIGKILL" else name), {}
        told = json.loads(text)
        return told.pop("ended"), told

    def _act(self, fault: Fault) -> dict[str, Any]:
        from falqon_fx import FalqonError

        told: dict[str, Any] = {"ended": "done"}
        numbers = (fault.at, fault.variant, fault.sticky, fault.deadly, fault.after)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            root = os.fsencode(self.folder)
            self.library.faults_arm(root, fault.kind, *(int(number) for number in numbers))
            try:
                self.writer.act(self.folder)
            except FalqonError as error:
                told = {"ended": "refused", "said": str(error)}
            except BaseException as error:
                text = "".join(traceback.format_exception(error))
                raised = f"{type(error).__module__}.{type(error).__name__}"
                told = {"ended": "raw", "raised": raised, "said": text[-1500:]}
            told["calls"] = self.library.faults_disarm()
            told["fault"] = self.library.faults_fired().decode(errors="replace")
        told["warned"] = [str(w.message) for w in warned if "falqon" in str(w.message)][:3]
        return told


def files_in(folder: Path, keep: Callable[[str], bool] = lambda name: True) -> dict[str, bytes]:
    """The contents of the files in a folder, by name; those of killed writers aside left out."""
    names = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {n: p.read_bytes() for n, p in names.items() if ".falqon-" not in n and keep(n)}
