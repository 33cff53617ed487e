"""`falqon_fx.kernels.cpu.experts`, beside the same sums in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from falqon_fx.kernels.cpu import casts
from falqon_fx.kernels.cpu import experts as compiled
from falqon_fx.kernels.cpu.experts import Rows, Weights
from tests.stacks import Exact

pytestmark = pytest.mark.skipif(
    compiled.library() is None, reason="this CPU doesn't multiply bfloat16"
)
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """A stack [experts, m, k], and tokens that each choose ``top`` of the first ``crowd``."""

    experts: int
    m: int
    k: int
    rank: int
    tokens: int
    top: int
    crowd: int
    behind: int = 0  # rows that no expert has

    def routed(self) -> tuple[Rows, Tensor]:
        """The rows of the product, and the expert of each."""
        ids = torch.randint(0, self.crowd, (self.tokens * self.top - self.behind,))
        order = torch.argsort(ids, stable=True)
        ends = torch.bincount(ids, minlength=self.experts).cumsum(0).to(torch.int32)
        count = self.tokens * self.top
        rows = torch.cat([order // self.top, torch.zeros(self.behind, dtype=torch.int64)])
        return Rows(rows, ends, count), ids[order]


# One row, tiles that are not full, sides that are odd or no multiple of a register, idle experts,
# more rows than a task has, rows behind the last expert's.
CASES = [
    Case(3, 8, 32, 2, 5, 2, 3),
    Case(4, 72, 70, 3, 9, 2, 2),
    Case(5, 131, 97, 5, 40, 3, 5),
    Case(2, 24, 64, 16, 300, 1, 2),
    Case(9, 40, 129, 1, 1, 1, 9),
    Case(4, 16, 48, 0, 20, 2, 4, 7),
]


@pytest.fixture(params=CASES, ids=str, autouse=True)
def case(request: Any) -> Iterator[Case]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(threads)


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def fp8(*shape: int) -> Tensor:
    return torch.randn(shape).to(E4M3)


def near(found: Tensor, exact: Exact, terms: int) -> bool:
    """A float32 sum in any order is off by K·2⁻²⁴ of the sum of the magnitudes of its terms, its
    rounding to bfloat16 by 2⁻⁹ of it, and a subnormal is zero.
    """
    off = exact.gauge * (terms * 2.0**-24) + 2.0**-126
    if found.dtype == torch.bfloat16:
        off = off + (exact.value.abs() + off) * 2.0**-8
    return bool(((found.double() - exact.value).abs() <= off).all())


def of_rows(x: Tensor, stack: Tensor, ids: Tensor) -> Exact:
    """x_i · stack[expert of row i], [S, n]."""
    products = [Exact.of(row[None]) @ Exact.of(stack[e]) for row, e in zip(x, ids, strict=False)]
    return Exact(torch.cat([p.value for p in products]), torch.cat([p.gauge for p in products]))


def test_forward(case):
    rows, ids = case.routed()
    count, held = rows.count, len(ids)
    x, code = bf16(case.tokens, case.k), fp8(case.experts, case.m, case.k)
    scale = torch.exp2(torch.randint(-12, 4, (case.experts * case.m, 1)).float())
    left, right = bf16(count, case.rank), bf16(case.experts, case.m, case.rank)
    low = (left, right) if case.rank else ()
    stack = code.double() * scale.double().view(case.experts, case.m, 1)
    assert rows.rows is not None
    exact = of_rows(x[rows.rows], stack.mT, ids)
    if case.rank:
        exact = exact + of_rows(left, right.mT, ids)
    for given in (code, code.view(torch.uint8)):
        y = compiled.forward(x, Weights(given, scale, *low), rows)
        assert near(y[:held], exact, case.k + case.rank)
        assert not y[held:].any()
    # In bfloat16, of rows as they lie.
    values = bf16(case.experts, case.m, case.k)
    own = bf16(count, case.k)
    y = compiled.forward(own, Weights(values), rows.own())
    assert near(y[:held], of_rows(own, values.mT, ids), case.k)


def test_backward(case):
    rows, ids = case.routed()
    count, held = rows.count, len(ids)
    g, code = bf16(count, case.m), fp8(case.experts, case.m, case.k)
    left, right = bf16(count, case.rank), fp8(case.experts, case.rank, case.k)
    low = (None, left, right.view(torch.uint8)) if case.rank else ()
    exact = of_rows(g, code.double(), ids)
    if case.rank:
        exact = exact + of_rows(left, right.double(), ids)
    weights = Weights(code, *low)
    to = compiled.backward(g, weights, rows.own(), None)
    assert near(to[:held], exact, case.m + case.rank)
    assert not to[held:].any()
    before = torch.randn(case.tokens, case.k)
    sums = compiled.backward(g, weights, rows, before.clone())
    total = Exact.of(before)
    assert rows.rows is not None
    for part, of in ((total.value, exact.value), (total.gauge, exact.gauge)):
        part.index_add_(0, rows.rows[:held], of)
    assert near(sums, total, (case.m + case.rank + 1) * case.top)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outer(case, dtype):
    rows, ids = case.routed()
    rank = case.rank or 4
    low, grad = bf16(rows.count, rank), bf16(rows.count, case.m)
    codes = fp8(case.tokens, case.k)
    assert rows.rows is not None
    for fastest, wide, way in ((True, grad, rows.own()), (False, codes, rows)):
        read = (wide if way.rows is None else wide[rows.rows]).double()[: len(ids)]
        found = compiled.outer(low, wide, way, 0.5, dtype, fastest=fastest)
        parts = []
        for e in range(case.experts):
            own = low[: len(ids)].double() * (ids == e).double()[:, None]
            parts.append((Exact.of(own).mT @ Exact.of(read)).times(0.5))
        exact = Exact(*(_laid(parts, name, fastest) for name in ("value", "gauge")))
        assert near(found, exact, len(ids))


def _laid(parts: list[Exact], name: str, fastest: bool) -> Tensor:
    stacked = torch.stack([getattr(part, name) for part in parts])  # [E, r, k]
    if fastest:
        return stacked.permute(2, 1, 0).flatten(1)
    return stacked.flatten(0, 1)


def test_an_experts_rows_are_cast_with_its_factors(case):
    """Those behind the last expert's are left as they are."""
    rows, ids = case.routed()
    grad, factors = bf16(rows.count, case.m), torch.rand(case.experts, case.m) + 0.5
    to = torch.full((rows.count, case.m), 7.0)
    scale = casts.cast_rows(grad, torch.float8_e5m2, factors, to, ends=rows.ends)
    assert scale is not None
    for e in range(case.experts):
        own = torch.nonzero(ids == e).flatten()
        alone = torch.empty(len(own), case.m)
        of_one = casts.cast_rows(grad[own], torch.float8_e5m2, factors[e].contiguous(), alone)
        assert of_one is not None
        assert torch.equal(to[own], alone)
        assert torch.equal(scale[own], of_one)
    assert (to[len(ids) :] == 7.0).all()


def test_what_memory_does_not_hold_is_refused(case):
    """A row that x has not, and operands of other shapes and dtypes."""
    rows, _ = case.routed()
    x, code = bf16(case.tokens, case.k), fp8(case.experts, case.m, case.k)
    assert rows.rows is not None
    for wrong in (-1, case.tokens):
        there = rows.rows.clone()
        there[-1] = wrong
        with pytest.raises(IndexError, match=f"not one of {case.tokens}"):
            compiled.forward(x, Weights(code), replace(rows, rows=there))
    for weights, given in (
        (Weights(code, torch.ones(3, 1)), rows),
        (Weights(code, left=bf16(rows.count + 1, 2), right=bf16(case.experts, case.m, 2)), rows),
        (Weights(code), replace(rows, ends=rows.ends.long())),
        (Weights(code), replace(rows, count=rows.count + 1)),
        (Weights(code.float()), rows),
    ):
        with pytest.raises(ValueError, match="is not"):
            compiled.forward(x, weights, given)
    with pytest.raises(ValueError, match="strides"):
        compiled.forward(x.t().contiguous().t(), Weights(code), rows) if case.tokens > 1 else (
            compiled.forward(bf16(2, case.k)[:, ::2], Weights(code), rows)
        )


def test_offsets_that_fall_or_go_too_far_are_bounded(case):
    """Whatever they are, no row is read or written that is not there."""
    x, code = bf16(case.tokens, case.k), fp8(case.experts, case.m, case.k)
    ends = torch.randint(-9, 2 * case.tokens, (case.experts,), dtype=torch.int32)
    rows = Rows(None, ends, case.tokens)
    y = compiled.forward(x, Weights(code), rows)
    assert not y[int(ends.clamp(0).max()) :].any()
    compiled.backward(bf16(case.tokens, case.m), Weights(code), rows, None)
    compiled.outer(bf16(case.tokens, 3), x, rows, 1.0, torch.float32, fastest=True)
