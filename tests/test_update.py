"""The proxy update: which rows are written, when, and what is in them afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from falqon_fx import FalqonConfig, adapters, prepare
from falqon_fx.site.numerics import (
    E4M3,
    FP8_MAX,
    amax_to_scale,
    philox_uint16,
    round_to_fp8,
    round_to_fp8_stochastic,
)
from falqon_fx.site.record import SITE, STEP
from tests.sites import Site, dequantized, dyadic, make_site, randn, same, site_of, snapshot, update
from tests.tolerances import gamma

GRANULARITY = pytest.mark.parametrize("granularity", ["tensor", "row"])
SCALE = pytest.mark.parametrize("scale", ["amax", "pow2"])
ROUNDING = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])


def changed_rows(before: list[Tensor], state: Any) -> list[int]:
    """Rows of `writes` that went up."""
    return (state.writes != before[4]).nonzero().flatten().tolist()


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("pending", ["hold", "drop", "apply"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("freed", [False, True], ids=["base", "freed"])
@GRANULARITY
@SCALE
@ROUNDING
def test_a_written_row_is_the_cast_of_the_exact_sum(
    granularity, scale, rounding, freed, dtype, pending
):
    """The cast of base + s·applied·dq(A), however often the row was written; without the base
    weight that of dq(old) + s·Δ·dq(A), Δ = what `applied` gained. Both are exact in float64.

    The op sums in float32: r products and what they are added to, each factor rounded at most 4
    times (dq, difference, scaling, its product), and the product with the scale's reciprocal twice
    more; so what it casts is within gamma(r + 8) of the terms' magnitudes. Rounding is monotone, so
    its result lies between the casts of both ends. Of nearest rounding and of stochastic rounding
    with the row's own random numbers alike: the tests pin the Philox stream (row, step, site,
    seed).
    """
    options = {"granularity": granularity, "scale": scale, "rounding": rounding}
    options |= {"topk": 5, "pending": pending}
    base = make_site(dtype=dtype, seed=3).base
    site = make_site(dtype=dtype, seed=3, freed=freed, **options)
    state = site.state
    for step in range(3):
        site.step(seed=step, size=0.2)
        old, before = dequantized(state), snapshot(state)
        update(site)
        rows = changed_rows(before, state)
        assert len(rows) == 5

        held, lora_a = state.applied.double()[rows], old[24:]
        start = old[rows] if freed else base[rows].double()
        by = (held - before[2].double()[rows] if freed else held) * state.scaling
        exact = start + by @ lora_a
        off = gamma(state.rank + 8) * (start.abs() + by.abs() @ lora_a.abs())
        low, high = exact - off, exact + off
        if granularity == "row":
            new_scale = state.scale[rows]
            ends = [
                torch.maximum(low.abs(), high.abs()).amax(1, keepdim=True),
                torch.where(low * high > 0, torch.minimum(low.abs(), high.abs()), 0.0).amax(
                    1, keepdim=True
                ),
            ]
            most, least = (amax_to_scale(end.float(), E4M3, scale) for end in ends)
            assert ((least * (1 - 2**-22) <= new_scale) & (new_scale <= most * (1 + 2**-22))).all()
        else:
            new_scale = state.scale
            assert torch.equal(new_scale, before[1])

        def to_fp8(x: Tensor, rows: list[int] = rows, divisor: Tensor = new_scale) -> Tensor:
            scaled = (x / divisor.double()).float()
            if rounding == "nearest":
                return round_to_fp8(scaled, E4M3)
            counters = state.counters
            random = philox_uint16(
                torch.tensor(rows), scaled.shape[1], counters[STEP], counters[SITE], seed=0
            )
            return round_to_fp8_stochastic(scaled, random, E4M3)

        code = state.weight[rows].float()
        assert (to_fp8(low) <= code).all()
        assert (code <= to_fp8(high)).all()
        # The interval is narrow: nearly every element is decided by it.
        assert (to_fp8(low) == to_fp8(high)).double().mean() > 0.99


LAYOUTS = {
    "plain": lambda base: base,
    "stored [in, out]": lambda base: base.t().contiguous().t(),
    "a slice": lambda base: torch.stack([base, -base], dim=2)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pending", ["hold", "drop", "apply"])
@GRANULARITY
def test_a_row_is_cast_once_however_often_it_is_written(granularity, pending, dtype, layout):
    """Twenty writes leave q(base + s·applied·Â), bit for bit: all sums are exact here."""
    base, lora_a = dyadic(24, 40, seed=0).to(dtype), dyadic(4, 40, seed=1)
    options = {"granularity": granularity, "pending": pending, "rounding": "nearest"}
    site = site_of(layout(base), lora_a, torch.zeros(24, 4), 2.0, **options)
    state = site.state
    for step in range(20):
        move = dyadic(24, 4, seed=step, bits=3, low=-5)
        site.lora_b.copy_(move if pending == "drop" else site.lora_b + move)
        update(site)
    assert state.writes.min() >= 15
    if pending != "drop":
        assert torch.equal(state.applied, site.lora_b)
    exact = base.double() + 2.0 * state.applied.double() @ dequantized(state)[24:]
    scale = state.scale[:24] if granularity == "row" else state.scale
    if granularity == "row":
        amax = exact.abs().amax(1, keepdim=True).float()
        assert torch.equal(scale, amax_to_scale(amax, E4M3, "pow2"))
    code = round_to_fp8((exact / scale.double()).float(), E4M3)
    assert torch.equal(state.weight[:24].float(), code)


@GRANULARITY
@ROUNDING
def test_rows_that_are_not_chosen_stay_bit_equal(granularity, rounding):
    site = make_site(granularity=granularity, rounding=rounding, topk=3)
    for step in range(4):
        site.step(seed=step)
        before = snapshot(site.state)
        update(site)
        rows = changed_rows(before, site.state)
        others = [row for row in range(28) if row not in rows]  # A's rows among them
        assert len(rows) == 3
        assert torch.equal(site.state.code[others], before[0][others])
        if granularity == "row":
            assert torch.equal(site.state.scale[others], before[1][others])
        left = [row for row in others if row < 24]
        assert torch.equal(site.state.applied[left], before[2][left])
        assert not torch.equal(site.state.code[rows], before[0][rows])


@SCALE
def test_a_fresh_row_scale_never_clamps(scale):
    """A written row's largest code is what its own amax gives: 448 exactly with "amax", and above
    half of it with "pow2", however much the row grew.
    """
    site = make_site(granularity="row", scale=scale, rounding="nearest")
    lora_a = dequantized(site.state)[24:]
    site.lora_b += 1000 * randn(24, 4, seed=9)
    update(site)
    largest = site.state.weight[:24].float().abs().amax(1)
    if scale == "amax":
        assert (largest == FP8_MAX[E4M3]).all()
    else:
        assert ((largest >= 224) & (largest <= 448)).all()
    exact = site.base.double() + 2 * site.state.applied.double() @ lora_a
    grown = exact.abs().amax(1)
    kept = dequantized(site.state)[:24].abs().amax(1)
    # The largest element of a row is off by its own cast alone: 1/17, and float32's roundings.
    assert ((kept - grown).abs() <= grown * (1 / 17 + gamma(12))).all()


def test_a_tensor_scale_clamps_and_stays():
    site = make_site(granularity="tensor", rounding="nearest")
    scale = site.state.scale.clone()
    site.lora_b += 1000
    update(site)
    assert torch.equal(site.state.scale, scale)
    assert site.state.weight.float().abs().max() == FP8_MAX[E4M3]
    assert torch.equal(site.state.applied, site.lora_b)


@given(
    b=st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=12),
    topk=st.one_of(st.integers(1, 12), st.floats(0.01, 1.0), st.just("all")),
    granularity=st.sampled_from(["tensor", "row"]),
)
def test_the_top_rows_are_written_and_ties_go_to_the_lowest(b, topk, granularity):
    """Σ|ΔB| of small integers is exact, and ties are frequent."""
    out = len(b)
    assume(not isinstance(topk, int) or topk <= out)
    base, lora_a = randn(out, 6), randn(2, 6, seed=1)
    site = site_of(base, lora_a, torch.zeros(out, 2), topk=topk, granularity=granularity)
    site.lora_b += torch.tensor(b, dtype=torch.float32)
    update(site)
    scores = [abs(x) + abs(y) for x, y in b]
    count = {str: out, float: max(1, round(float(topk) * out)) if topk != "all" else 0}.get(
        type(topk), topk
    )
    order = sorted((row for row in range(out) if scores[row]), key=lambda row: -scores[row])
    wanted = sorted(order[:count])  # sorted() keeps equal keys in order: the lowest row first
    assert site.state.writes.nonzero().flatten().tolist() == wanted
    assert torch.equal(site.state.applied[wanted], site.lora_b[wanted])
    assert site.state.applied.abs().sum() == site.lora_b[wanted].abs().sum()


@pytest.mark.parametrize(("topk", "count"), [(1, 1), (7, 7), (24, 24), (0.25, 6), (1e-9, 1)])
def test_topk_counts_rows_or_is_a_fraction_of_them(topk, count):
    site = make_site(topk=topk)
    site.step()
    update(site)
    assert int(site.state.writes.sum()) == count


@pytest.mark.parametrize("pending", ["hold", "apply"])
@GRANULARITY
def test_b_is_applied_plus_pending(granularity, pending):
    """applied and pending are float32 here: their sum rounds once, the difference once."""
    site = make_site(granularity=granularity, pending=pending, topk=2)
    site.state.b_ref = lambda: site.lora_b  # type: ignore[assignment]
    for step in range(5):
        site.step(seed=step)
        update(site)
        total = site.state.applied + site.state.pending()
        assert ((total - site.lora_b).abs() <= gamma(2) * 2 * site.lora_b.abs().max()).all()
        written = (site.state.pending() == 0).all(1)
        assert written.sum() >= 2


def test_every_row_gets_written_in_the_end_when_b_rests():
    """Held rows are not forgotten: the next changes of B, however small, bring them in."""
    site = make_site(pending="hold", topk=4)
    site.step()
    for _ in range(6):
        site.lora_b[0, 0] += 1e-6
        update(site)
    # What can be left is what woke the updates, in row 0.
    assert ((site.lora_b - site.state.applied).abs() <= 6.1e-6).all()


def test_writes_counts_per_row():
    site = make_site(topk=2)
    for rows in ([1, 5], [5, 7], [5, 1]):
        site.lora_b[rows] += 10
        update(site)
    wanted = torch.zeros(24, dtype=torch.int32)
    wanted[[1, 5, 7]] = torch.tensor([2, 3, 1], dtype=torch.int32)
    assert torch.equal(site.state.writes, wanted)


def test_sites_of_different_shapes_are_updated_in_one_call_as_if_alone():
    def sites() -> list[Site]:
        shapes = [(24, 40, 4), (8, 16, 1), (24, 40, 4), (24, 40, 3)]
        made = [make_site(*shape, topk=3, seed=i) for i, shape in enumerate(shapes)]
        for i, site in enumerate(made):
            if i != 2:  # unchanged, in a group with a changed one
                site.step(seed=i)
        return made

    together, apart = sites(), sites()
    update(*together)
    for a, b in zip(together, apart, strict=True):
        update(b)
        assert same(snapshot(a.state), snapshot(b.state))
    assert [int(site.state.writes.sum()) for site in together] == [3, 3, 0, 3]


# -- reproducible ----------------------------------------------------------------------------------


@GRANULARITY
def test_the_same_seed_gives_the_same_bits_after_50_updates_and_another_does_not(granularity):
    def train(seed: int) -> list[Tensor]:
        site = make_site(granularity=granularity, rounding="stochastic", topk=6, seed=0)
        site = site_of(
            site.base,
            site.lora_a,
            site.lora_b,
            granularity=granularity,
            rounding="stochastic",
            topk=6,
            **{"seed": seed},
        )
        for step in range(50):
            site.step(seed=step, size=0.01)
            update(site)
        return snapshot(site.state)

    first = train(1)
    assert same(first, train(1))
    assert not torch.equal(first[0], train(2)[0])


def test_sites_and_steps_draw_different_random_numbers():
    """Two sites with equal B and equal steps round differently, each step anew."""
    a, b = make_site(rounding="stochastic", seed=0), make_site(rounding="stochastic", seed=5)
    assert a.state.counters[SITE] != b.state.counters[SITE]
    a.step()
    update(a)
    step = int(a.state.counters[STEP])
    a.step(seed=1)
    update(a)
    assert int(a.state.counters[STEP]) == step + 1


@pytest.mark.parametrize("freed", [False, True], ids=["base", "freed"])
def test_stochastic_rounding_keeps_small_steps_in_expectation(freed):
    """Steps far below half an ulp add up with stochastic rounding. Without the base weight they
    vanish with nearest rounding; with it, as soon as their sum passes half an ulp, they don't.

    Every element of dq(W) should move by 100 · 0.0025 = 0.25, to 1.25, which E4M3 has. A stochastic
    write adds an error of mean zero and a deviation of at most half the gap (a Bernoulli's), so 6
    deviations of the mean over 100 writes and n elements are 6 · gap / 2 · sqrt(100 / n); over the
    last write alone 6 · gap / 2 · sqrt(1 / n). The gap of E4M3 is 1/8 in [1, 2), and 1/4 for the
    few elements that get beyond. B's own sum of a hundred steps in float32 is off by 0.25 ·
    gamma(100).
    """
    out, features = 64, 64
    base = torch.full((out, features), 1.0)
    base[:, 0] = 448.0  # pins the scale at 1
    moved = {}
    for rounding in ("nearest", "stochastic"):
        site = site_of(
            base,
            torch.ones(1, features),
            torch.zeros(out, 1),
            scaling=1.0,
            rounding=rounding,
            granularity="tensor",
            freed=freed,
        )
        for _ in range(100):
            site.lora_b += 0.0025
            update(site)
        moved[rounding] = (dequantized(site.state)[:out, 1:] - 1).mean()
    assert moved["nearest"] == (0 if freed else 0.25)
    writes = 100 if freed else 1
    allowed = 6 * 0.25 / 2 * (writes / (out * (features - 1))) ** 0.5 + 0.25 * gamma(100)
    assert abs(moved["stochastic"] - 0.25) <= allowed < 0.125


# -- drop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freed", [False, True], ids=["base", "freed"])
def test_drop_in_a_graph_reproduces_the_rule_of_the_public_code(freed):
    """W[k] += s·B[k]·A for the k rows with the largest Σ|B|, then the whole of B becomes zero. The
    public code keeps no base weight, and casts a row from what it was; with one at hand it is cast
    from there.
    """
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 24, bias=False)), lora)
    layer = model.base_model.model[0]
    layer.lora_A.requires_grad_(False)
    options = {"update": "rows", "pending": "drop", "granularity": "tensor", "topk": 10}
    options |= {"rounding": "nearest", "inner": "eager"}
    base = layer.base_layer.weight.detach().double()
    if freed:
        prepare(model, FalqonConfig(**options), progress=False)
    compiled = torch.compile(model, backend="falqon", options=options)
    b, x = layer.lora_B["default"].weight, randn(3, 16)
    compiled(x)
    (state,) = adapters(model).values()
    applied = torch.zeros(24, 4, dtype=torch.float64)
    for step in range(4):
        with torch.no_grad():
            b.add_(randn(24, 4, seed=step) * 0.1)
        moved = b.detach().double()
        top = moved.abs().sum(1).topk(10).indices
        old = dequantized(state)
        applied[top] += moved[top]
        expected = old.clone()
        limit = 448 * state.scale.double()  # the scale stays, so values beyond it clamp
        start, by = (old[top], moved[top]) if freed else (base[top], applied[top])
        expected[top] = (start + 2.0 * by @ old[24:]).clamp(-limit, limit)
        compiled(x)
        assert not b.any()
        # One cast a write: at most |x|/17, or half a subnormal gap, and the sum's own roundings.
        new = dequantized(state)
        half_gap = (expected.abs() / 17).clamp(min=state.scale.item() * 2**-10) * (1 + gamma(12))
        assert ((new - expected).abs() <= half_gap).all()
        others = [row for row in range(28) if row not in top.tolist()]
        assert torch.equal(new[others], old[others])
        # float32 sums of four steps
        assert ((state.applied.double() - applied).abs() <= gamma(4) * 4 * 0.1 * 4).all()
        compiled(x)  # B is zero and rests: nothing more
        assert torch.equal(dequantized(state), new)
