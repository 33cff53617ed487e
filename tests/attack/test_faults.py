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


def test_a_save_that_is_killed_or_whose_calls_fail_leaves_the_old_or_the_new(tmp_path):
    """And takes nothing with it that is around its folder; the next save finishes the work. What
    writes elsewhere is seen, whatever it takes away again.
    """
    attacks = {"kills": {"save": 12}, "faults": {"save": 16, "stray": 1}}
    all_found = attack(tmp_path, attacks)
    killed, found = all_found["kills"], all_found["faults"]
    assert (killed["counts"]["save"]["killed"], killed["failures"]) == (12, [])
    assert {name: of["hit"] for name, of in found["counts"].items()} == attacks["faults"]
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
