"""A thousand steps with all in between that happens to a training run, against the same steps
without: bit for bit.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attack.held import FLAT, GROWING, Look
from tests.attack.long_run import EVENTS, LongRun, at_once

ROOT = Path(__file__).parents[2]
PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])


def assert_same_run(run: LongRun, twin: LongRun) -> None:
    assert run.losses == twin.losses
    assert len(set(run.losses)) == len(run.losses)
    for mine, others in zip(run.found(), twin.found(), strict=True):
        assert torch.equal(mine, others)


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_thirty_steps_with_events_are_those_without(tmp_path, prepared):
    """Every event at least once, after one step each."""
    steps = 30
    assert len(EVENTS) < steps
    run, twin = (LongRun(tmp_path, "eager", prepared) for _ in range(2))
    at_once(run, steps, EVENTS)
    at_once(twin, steps, ())
    assert_same_run(run, twin)


_default = settings.get_profile(settings.get_current_profile_name()).max_examples


@pytest.mark.slow
@given(events=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=8), prepared=st.booleans())
@settings(max_examples=max(5, _default // 50))
def test_events_in_any_order_change_nothing(events, prepared):
    with tempfile.TemporaryDirectory() as folder:
        run, twin = (LongRun(Path(folder), "eager", prepared) for _ in range(2))
        at_once(run, len(events) + 3, events)
        at_once(twin, len(events) + 3, ())
    assert_same_run(run, twin)


STEPS = (0, 334, 667, 1000)  # where a process ends and the next goes on
# An event after every so many: each is met eight times in each process, or four times, since to
# compile with Inductor takes a second.
EVERY = {"eager": 2, "inductor": 4}
# Of what grows with each of torch's guards, by what that is with torch's own backend. Runs differed
# by 6% at most, in memory, which comes in pages.
ROOM = 1.1


@pytest.mark.slow
@PREPARED
@pytest.mark.parametrize("inner", EVERY)
def test_a_thousand_steps_in_three_processes_are_those_of_one(tmp_path, inner, prepared, capsys):
    """What a process holds is looked at behind each round of events, when nothing is compiled.
    Objects of ours, graphs, modules, tensors, threads and files: no more in the later rounds than
    in the earlier ones. Memory grows, since torch keeps the guards of each compilation for ever,
    with a stack each: by no more for a guard than with torch's own backend, in another process.
    """
    common = ["--inner", inner, *(["--prepared"] if prepared else [])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }

    def process(folder: str, first: int, last: int, every: int, *more: str) -> list[Look]:
        span = ["--first", str(first), "--last", str(last), "--every", str(every)]
        module = [sys.executable, "-W", "ignore", "-m", "tests.attack.long_run"]
        command = [*module, str(tmp_path / folder), *span, *common, *more]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-5000:]
        found: list[Look] = json.loads((tmp_path / folder / f"held-{first}.json").read_text())
        return found

    seen = [process("events", *span, EVERY[inner]) for span in itertools.pairwise(STEPS)]
    process("twin", 0, STEPS[-1], 0)
    of_torch = process("torch", *STEPS[:2], EVERY[inner], "--torch")
    runs = []
    for folder in ("events", "twin"):
        runs.append(LongRun(tmp_path, "eager", prepared))
        runs[-1].load(tmp_path / folder / "checkpoint")
    assert_same_run(*runs)
    for looks in (*seen, of_torch):
        half = len(looks) // 2
        assert half >= 2
        for name in FLAT:
            early, late = (
                max(look[name] for look in part) for part in (looks[:half], looks[half:])
            )
            assert late <= early, (name, [look[name] for look in looks])
    ours, theirs = growth(seen), growth([of_torch])
    with capsys.disabled():
        print(f"\n{inner}, prepared={prepared}: grew by {ours}, with torch alone by {theirs}")
    for name in GROWING:
        assert ours[name] / ours["guards"] <= ROOM * theirs[name] / theirs["guards"], name


def growth(processes: Sequence[list[Look]]) -> dict[str, int]:
    """From the second round on, when all that is made once has been."""
    names = ("compilations", "guards", *GROWING)
    return {name: sum(looks[-1][name] - looks[1][name] for looks in processes) for name in names}
