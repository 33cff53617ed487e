"""benchmarks/experts_lens.py: what experts launch on a GPU, from Inductor's code for one."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.versions import needs_build_without_driver

pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, needs_build_without_driver]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def lens():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("experts_lens")
    sys.path.remove(str(BENCHMARKS))


def seen(lens, experts, implementation="grouped_mm", **options) -> list[Counter[str]]:
    sizes = lens.Sizes(128, 64, 2, 64, 8, implementation)
    return [lens.counts(launches) for launches in lens.look(sizes, experts, **options)]


def test_launches_are_as_many_for_any_number_of_experts(lens):
    """O of both stacks is torch's product on an H100, dL/dx and the adapters' gradients are those
    of generated kernels.
    """
    few, many = seen(lens, 4), seen(lens, 64)
    assert few == many
    forward, backward = few
    # O_A and O_A · b of each stack; then D and dL/dx.
    assert (forward["grouped_gemm"], forward["_grouped_mm"]) == (2, 2)
    assert (backward["grouped_gemm"], backward["grouped_outer"]) == (4, 4)
    assert forward["_scaled_grouped_mm"] == 2
    assert not backward["_grouped_mm"]


def test_rows_in_any_order_are_sorted_on_the_card(lens):
    forward, backward = seen(lens, 4, "batched_mm")
    assert (forward["_scaled_grouped_mm"], forward["grouped_gemm"]) == (2, 2)
    assert (backward["grouped_gemm"], backward["grouped_outer"]) == (4, 4)
    assert not {"bmm", "index"} & {*forward, *backward}


def test_generated_kernels_add_the_adapter_as_they_store(lens):
    forward, backward = seen(lens, 4, kernel="triton")
    assert (forward["grouped_gemm"], backward["grouped_gemm"]) == (4, 4)
    assert not {"_scaled_grouped_mm", "_grouped_mm"} & {*forward, *backward}
