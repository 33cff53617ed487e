"""Writers whose system calls fail, one or all from one on, with each errno that such a call knows:
the old or the new is there, whole, and where it isn't the new a `FalqonError` says why.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack.faults import attack

MANY = {
    "save": 150, "save new": 100, "export": 150, "prequantize": 120, "prequantize resumed": 120,
    "DCP": 40,
}  # fmt: skip


def fail(folder: Path, writer: str, number: int) -> dict[str, int]:
    found = attack(folder, writers=[writer], kind="faults", number=number)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["failures"] == []
    counts: dict[str, int] = found["counts"]
    assert sum(counts.values()) == number
    # Some errors are no obstacle (locks, reads of what isn't there), many are.
    assert counts.get(f"{writer}: done", 0) < number
    return counts


def test_a_save_whose_calls_fail_leaves_the_old_or_the_new(tmp_path):
    fail(tmp_path, "save", 40)


@pytest.mark.slow
@pytest.mark.parametrize("writer", MANY)
def test_each_call_fails_in_turn(tmp_path, writer):
    print(fail(tmp_path, writer, MANY[writer]))
