"""Runs the fuzzers for some time, with new seeds, and says how many examples there were:

    python tests/fuzz.py --minutes 60

Programs (test_fuzz.py), sequences of what a training loop does (test_sequences.py), and loops with
events (attack/test_long_run.py). Each core runs a slice of one of them after another, in a process
of its own. It ends at the first difference, with what reproduces it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FUZZERS = (
    "tests/test_fuzz.py",
    "tests/test_sequences.py",
    "tests/test_merged_experts.py::test_programs_compute_what_float64_does_on_the_same_operands",
    "tests/attack/test_long_run.py::test_events_in_any_order_change_nothing",
)
PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-m",
    "",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
)


class Fuzz:
    """Slices until the time is over or one finds a difference."""

    def __init__(self, minutes: float, examples: int, workers: int) -> None:
        self._env = {**os.environ, "HYPOTHESIS_PROFILE": "fuzz", "FUZZ_EXAMPLES": str(examples)}
        self._env["PYTEST_XDIST_WORKER_COUNT"] = str(workers)  # how tests divide the cores
        self._lock, self._tests = threading.Lock(), itertools.cycle(collected())
        self.passed: Counter[str] = Counter()
        self.failure = ""
        self._end = time.monotonic() + 60 * minutes

    def work(self) -> None:
        while time.monotonic() < self._end and not self.failure:
            with self._lock:
                test = next(self._tests)
            seed = secrets.randbits(32)
            command = [*PYTEST, test, f"--hypothesis-seed={seed}", "--hypothesis-show-statistics"]
            done = subprocess.run(command, cwd=ROOT, env=self._env, capture_output=True, text=True)
            passed = sum(counts(done.stdout))
            with self._lock:
                self.passed[test] += passed
                if done.returncode or not passed:
                    self.failure = f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def collected() -> list[str]:
    """The tests by their names for pytest."""
    command = [*PYTEST, "--collect-only", *FUZZERS]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [line for line in lines.splitlines() if "::" in line]


def counts(statistics: str) -> Iterator[int]:
    """The examples that passed, in what hypothesis prints of each phase."""
    for match in re.finditer(r"- (\d+) passing\b", statistics):
        yield int(match[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--examples", type=int, default=300, help="FUZZ_EXAMPLES of a slice")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    start, fuzz = time.monotonic(), Fuzz(given.minutes, given.examples, given.workers)
    with ThreadPoolExecutor(given.workers) as pool:
        for done in [pool.submit(fuzz.work) for _ in range(given.workers)]:
            done.result()
    for test, passed in sorted(fuzz.passed.items()):
        print(f"{passed:8,} {test}")
    print(fuzz.failure, end="")
    minutes = (time.monotonic() - start) / 60
    found = "a difference (above)" if fuzz.failure else "0 differences"
    print(f"{sum(fuzz.passed.values()):,} examples in {minutes:.1f} minutes, {found}")
    return bool(fuzz.failure) or not fuzz.passed.total()


if __name__ == "__main__":
    sys.exit(main())
