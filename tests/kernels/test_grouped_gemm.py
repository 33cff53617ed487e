"""The GEMM over experts, interpreted: bit for bit what a CPU computes on the same operands."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.kernels.grouped_gemm.launch import grouped_gemm, tiles_of
from falqon_fx.kernels.grouped_gemm.tiles import grouped_spec
from falqon_fx.ops import experts_lowering
from falqon_fx.site.numerics import E4M3, E5M2
from tests.parameters import each_value
from tests.sites import randn
from tests.stacks import Stack, programs, rows
from tests.test_merged_experts import check

# Tokens of each of four experts: none at all, all of one, one each, several tiles of 16 rows.
ROUTINGS = [(0, 0, 0, 0), (0, 37, 0, 0), (1, 1, 1, 1), (16, 0, 33, 5)]
WIDTH, K, TOKENS = 40, 72, 19
_default = settings.get_profile(settings.get_current_profile_name()).max_examples


def whole(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Small whole numbers: with scales that are powers of two every sum of K products of them is
    exact in float32, in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def powers(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.randint(-3, 4, (count, 1), generator=generator).float())


def offsets(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("counts", ROUTINGS, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("rank", [0, 70])
def test_it_gives_the_bits_of_a_product_an_expert(counts, backward, rank):
    gather = not backward
    spec = grouped_spec(0, K, rank=rank, gather=gather, backward=backward)
    experts, rows = len(counts), sum(counts)
    q = whole(TOKENS if gather else rows, K, dtype=E5M2 if backward else E4M3, seed=1)
    taken = torch.randint(0, TOKENS, (rows,), generator=torch.Generator().manual_seed(2))
    shape = (experts, K, WIDTH) if backward else (experts, WIDTH, K)
    weight = whole(*shape, dtype=E4M3, seed=3)
    x_scale = powers(len(q), 4)
    scale = None if backward else powers(experts * WIDTH, 5)
    left = whole(rows, rank, dtype=torch.bfloat16, seed=6)
    of_right = (experts, rank, WIDTH) if backward else (experts, WIDTH, rank)
    right = whole(*of_right, dtype=torch.bfloat16, seed=7)
    extra = (left, right) if rank else (None, None)
    offs = offsets(counts)
    tiles = tiles_of(offs, rows, spec.block_m)
    y = grouped_gemm(q, x_scale, taken if gather else None, weight, scale, tiles, spec, *extra)

    dense = q.double() * x_scale.double()
    dense = dense[taken] if gather else dense
    expected = torch.empty(rows, WIDTH, dtype=torch.float64)
    for e, end in enumerate(offs.tolist()):
        own = slice(end - counts[e], end)
        w = weight[e].double() if backward else weight[e].double().t()
        b = right[e].double() if backward else right[e].double().t()
        by = 1.0 if scale is None else scale.view(experts, WIDTH)[e].double()
        expected[own] = (dense[own] @ w) * by + left[own].double() @ b
    assert torch.equal(y, expected.to(torch.bfloat16))


def test_a_table_has_every_row_once():
    """Whatever the routing, each row of an expert is in one tile of that expert."""
    for counts in [*ROUTINGS, (128, 1, 0, 64)]:
        rows, offs = sum(counts), offsets(counts)
        tiles = tiles_of(offs, rows, 16)
        seen = []
        for t in range(int(tiles.count)):
            e, first = int(tiles.expert[t]), int(tiles.first[t])
            seen += [(e, row) for row in range(first, min(first + 16, int(offs[e])))]
        ends = offs.tolist()
        assert seen == [(e, r) for e, end in enumerate(ends) for r in range(end - counts[e], end)]
        assert len(tiles.expert) >= int(tiles.count)


def test_rows_behind_the_last_expert_are_not_read():
    spec = grouped_spec(0, K)
    offs = offsets((3, 2))
    q, weight = whole(9, K, dtype=E4M3, seed=1), whole(2, WIDTH, K, dtype=E4M3, seed=2)
    x_scale, scale = powers(9, 3), powers(2 * WIDTH, 4)
    x_scale[5:] = float("nan")
    y = grouped_gemm(q, x_scale, None, weight, scale, tiles_of(offs, 9, spec.block_m), spec)
    assert y[:5].isfinite().all()


@each_value(scale=["pow2", "amax"])
def test_the_op_gives_what_float64_does_by_the_kernel(monkeypatch, scale):
    """All of it but that the card is none: forward and dL/dx of a stack, routed in any order."""
    taken = []
    monkeypatch.setattr(experts_lowering, "generated", lambda x, *_: taken.append(x.shape) or True)
    model, (x, ids) = Stack(spelling="batched"), rows()
    call = falqon_fx.rewrite(fx.symbolic_trace(model), [x, ids], FalqonConfig(scale=scale))
    check(model, x, ids, scale, call)
    assert len(taken) == 4  # O, D, dL/dx, the gradients of A and B


@pytest.mark.slow
@settings(max_examples=max(12, _default // 10))
@given(programs())
def test_programs_compute_what_float64_does_by_the_kernels(program):
    """All that the ops of experts launch on a GPU, interpreted, in any layout and routing."""
    model, x, ids, _ = program
    with mock.patch.object(experts_lowering, "generated", return_value=True):
        call = falqon_fx.rewrite(fx.symbolic_trace(model), [x, ids], FalqonConfig(scale="amax"))
        check(model, x, ids, "amax", call)


def test_what_does_not_fit_is_refused():
    spec = grouped_spec(0, K)
    q, weight = randn(4, K).to(E4M3), randn(2, WIDTH, K).to(E4M3)
    tiles, ones = tiles_of(offsets((2, 2)), 4, spec.block_m), torch.ones(2 * WIDTH, 1)
    every: list[Any] = [
        (q.to(E5M2), powers(4, 1), None, weight, ones, tiles),
        (q, powers(3, 1), None, weight, ones, tiles),
        (q, powers(4, 1), torch.arange(4), weight, ones, tiles),
        (q, powers(4, 1), None, weight, None, tiles),
        (q, powers(4, 1), None, weight.mT, ones, tiles),
        (q, powers(4, 1), None, weight, ones, tiles_of(offsets((2, 2)), 4, 64)),
    ]
    for each in every:
        with pytest.raises(ValueError, match="grouped_gemm"):
            grouped_gemm(*(*each, spec))
