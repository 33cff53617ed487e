"""Every family of stacked experts in transformers: which stacks PEFT adapts are merged, and why
not. `benchmarks/experts_zoo.py` writes the table.
"""

from __future__ import annotations

import pytest

from tests.experts_zoo import FAMILIES, SIMILAR, measure

FAST = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def test_a_family(name, record_property):
    row = measure(name)
    if row is None:
        pytest.skip("no stacked experts that transformers' interface runs")
    record_property("merged", row.merged)
    assert row.merged == row.stacks, row.why
    assert row.similar > SIMILAR
