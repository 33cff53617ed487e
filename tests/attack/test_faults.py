"""Writers whose system calls fail, one or all from one on, with each errno that such a call knows:
the old or the new is there, whole, and where it isn't the new a `FalqonError` says why.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack.faults import Counts, attack, table, withstood

MANY = {
    "save": 150, "save new": 100, "export": 150, "prequantize": 120, "prequantize resumed": 120,
    "load checkpoint": 40, "load": 60, "load export": 60, "DCP": 40,
}  # fmt: skip


def fail(folder: Path, writers: dict[str, int]) -> Counts:
    """So many faults that really came, on each writer."""
    counts = withstood(folder, writers, "faults", "hit")
    # Some errors are no obstacle (locks, reads of what isn't there), many are.
    assert all(of.get("refused", 0) + of.get("raw", 0) > 0 for of in counts.values())
    return counts


def test_a_save_whose_calls_fail_leaves_the_old_or_the_new(tmp_path):
    """And one that writes elsewhere is seen to, whatever it takes away again."""
    found = attack(tmp_path, writers={"save": 40, "stray": 1}, kind="faults")
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert {writer: of["hit"] for writer, of in found["counts"].items()} == {"save": 40, "stray": 1}
    assert found["counts"]["save"]["refused"] > 0
    failures = found["failures"]
    assert failures
    for failure in failures:
        assert failure.startswith("stray,")
        for way in ("python", "torch", "rust", "renamed", "symlink", "folder"):
            assert f"/{way}'" in failure.rpartition("written elsewhere: ")[2]


@pytest.mark.slow
def test_each_call_fails_in_turn(tmp_path, capsys):
    counts = fail(tmp_path, MANY)
    assert sum(of["hit"] for of in counts.values()) >= 500
    with capsys.disabled():
        print(table(counts))
