"""Writers whose system calls fail, one or all from one on, with each errno that such a call knows:
the old or the new is there, whole, and where it isn't the new a `FalqonError` says why.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack.faults import attack

MANY = {
    "save": 150, "save new": 100, "export": 150, "prequantize": 120, "prequantize resumed": 120,
    "load checkpoint": 40, "load": 60, "load export": 60, "DCP": 40,
}  # fmt: skip


def fail(folder: Path, writers: dict[str, int]) -> dict[str, int]:
    found = attack(folder, writers=writers, kind="faults")
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["failures"] == []
    counts: dict[str, int] = found["counts"]
    assert sum(counts.values()) == sum(writers.values())
    # Some errors are no obstacle (locks, reads of what isn't there), many are: here half and more.
    assert all(counts[f"{writer}: done"] < number for writer, number in writers.items())
    return counts


def test_a_save_whose_calls_fail_leaves_the_old_or_the_new(tmp_path):
    fail(tmp_path, {"save": 40})


@pytest.mark.slow
def test_each_call_fails_in_turn(tmp_path):
    assert sum(MANY.values()) >= 500
    print(fail(tmp_path, MANY))
