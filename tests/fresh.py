"""Processes that have imported torch and nothing else: forks of one that did so once.

A Python that imports torch takes four seconds of CPU before it does anything. What such a fork
lacks of a process of its own is what torch reads from the environment while it is imported.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Each line from stdin is an order: a program to start, or one to ask after. A fork leaves the loop
# and goes on as the program does.
_SERVER = """
import json, os, signal, sys, warnings
import torch

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
    elif "poll" in order:
        ended = os.waitid(os.P_PID, order["poll"], os.WEXITED | os.WNOHANG | os.WNOWAIT)
        answer = ended and ended.si_status * (1 if ended.si_code == os.CLD_EXITED else -1)
    else:
        answer = os.fork()
        if not answer:
            break
    print(json.dumps(answer), flush=True)
else:
    sys.exit()

for number, name in enumerate(["/dev/null", order["stdout"], order["stderr"]]):
    os.dup2(os.open(name, os.O_WRONLY if number else os.O_RDONLY), number)
signal.alarm(order["timeout"])
os.environ.clear()
os.environ.update(order["environment"])
os.chdir(order["cwd"])
sys.path[:0] = order["path"]
if order["warnings"]:
    warnings.simplefilter(order["warnings"])
exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """One for each worker; it ends where its stdin does."""
    return subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ordered(**order: Any) -> Any:
    server = _server()
    assert server.stdin
    assert server.stdout
    print(json.dumps(order), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


@dataclass(frozen=True)
class Process:
    """A program that runs."""

    pid: int
    folder: tempfile.TemporaryDirectory[str]

    def poll(self) -> int | None:
        """The exit code of one that has ended; it can still be waited for."""
        code: int | None = _ordered(poll=self.pid)
        return code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # until `wait` no other process gets its number

    def wait(self) -> subprocess.CompletedProcess[str]:
        code = _ordered(wait=self.pid)
        out, err = (Path(self.folder.name, name).read_text() for name in ("stdout", "stderr"))
        with contextlib.suppress(OSError):
            self.folder.cleanup()
        return subprocess.CompletedProcess(["python", "-c", "..."], code, out, err)


def start(
    code: str,
    *,
    cwd: Path | None = None,
    path: Sequence[Path] = (ROOT,),
    warnings: str = "",
    environment: Mapping[str, str] | None = None,
    timeout: int = 60,
) -> Process:
    """Start a program; ``path`` goes before its `sys.path`, ``environment`` beside that of the
    tests, and ``warnings`` is as after -W.
    """
    folder = tempfile.TemporaryDirectory()
    files = {name: str(Path(folder.name, name)) for name in ("stdout", "stderr")}
    for file in files.values():
        Path(file).touch()
    pid = _ordered(
        code=code,
        cwd=str(cwd or Path.cwd()),
        path=[*map(str, path)],
        warnings=warnings,
        timeout=timeout,
        environment={**os.environ, **(environment or {})},
        **files,
    )
    return Process(pid, folder)


def run(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A program, what it said and how it ended."""
    return start(code, **options).wait()
