"""Writers and readers killed at any call or moment: what is there is the old or the new, whole.
(A few of them run in `test_faults.py`, in the process that it has.)
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack.faults import Counts, table, withstood

MANY = {
    "save": 120, "save new": 80, "load checkpoint": 40, "export": 100, "prequantize": 80,
    "prequantize resumed": 80, "load": 30, "load export": 30, "DCP": 40,
}  # fmt: skip


def kill(folder: Path, writers: dict[str, int]) -> Counts:
    """So many processes that really died of it, of each writer."""
    return withstood(folder, writers, "kills", "killed")


@pytest.mark.slow
def test_killed_at_calls_and_moments(tmp_path, capsys):
    counts = kill(tmp_path, MANY)
    assert sum(of["killed"] for of in counts.values()) >= 500
    with capsys.disabled():
        print(table(counts))
