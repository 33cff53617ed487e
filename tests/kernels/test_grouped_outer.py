"""The gradients of experts' adapters by the kernel, interpreted: bit for bit a sum an expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from falqon_fx.kernels.grouped_outer.launch import grouped_outer
from falqon_fx.kernels.grouped_outer.spec import GroupedOuterSpec
from falqon_fx.site.numerics import E4M3
from tests.kernels.test_grouped_gemm import ROUTINGS, TOKENS, offsets, whole

COLUMNS = 72


@pytest.mark.parametrize("counts", ROUTINGS, ids=str)
@pytest.mark.parametrize(("of_a", "rank"), [(True, 5), (False, 3), (True, 70)])
def test_it_gives_the_bits_of_a_sum_an_expert(counts, of_a, rank):
    rows = sum(counts)
    spec = GroupedOuterSpec.for_rank(
        rank,
        low_dtype="bfloat16",
        wide_dtype="e4m3" if of_a else "bfloat16",
        out_dtype="float32",
        gather=of_a,
        store="slowest" if of_a else "fastest",
        interpreted=True,
    )
    taken = torch.randint(0, TOKENS, (rows,), generator=torch.Generator().manual_seed(1))
    low = whole(rows, rank, dtype=torch.bfloat16, seed=2)
    wide = whole(TOKENS if of_a else rows, COLUMNS, dtype=E4M3 if of_a else torch.bfloat16, seed=3)
    offs = offsets(counts)
    y = grouped_outer(low, wide, taken if of_a else None, offs, 0.5, spec)
    dense = wide.double()[taken] if of_a else wide.double()
    each = []
    for e, end in enumerate(offs.tolist()):
        own = slice(end - counts[e], end)
        each.append(0.5 * low[own].double().t() @ dense[own])
    expected = torch.stack(each)  # [E, r, N]
    if of_a:
        expected = expected.flatten(0, 1)
    else:
        expected = expected.permute(2, 1, 0).reshape(COLUMNS, -1)  # the experts fastest
    assert torch.equal(y.double(), expected)


def test_what_does_not_fit_is_refused():
    made: Any = {
        "low_dtype": "bfloat16",
        "wide_dtype": "e4m3",
        "out_dtype": "float32",
        "gather": True,
    }
    spec = GroupedOuterSpec.for_rank(4, **made, store="slowest", interpreted=True)
    low, wide = whole(4, 4, dtype=torch.bfloat16, seed=1), whole(4, 8, dtype=E4M3, seed=2)
    rows, offs = torch.arange(4), offsets((2, 2))
    every: list[Any] = [
        (low.float(), wide, rows, offs),
        (low, wide.float(), rows, offs),
        (low, wide, None, offs),
        (low, wide, rows[:3], offs),
        (whole(4, 40, dtype=torch.bfloat16, seed=1), wide, rows, offs),
    ]
    for given in every:
        with pytest.raises(ValueError, match="grouped_outer"):
            grouped_outer(*(*given, 1.0, spec))
