"""The proxy-update kernels, interpreted, against the CPU op.

Where all sums are exact in float32 (operands that are small multiples of powers of two), everything
that the two write is equal bit for bit, random bits included. Elsewhere a byte may differ only
where the exact value lies within the error of its float32 sum from a tie.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falqon_fx.kernels.update.launch import UpdateSite, update_
from falqon_fx.kernels.update.spec import UpdateSpec
from falqon_fx.site.numerics import E4M3, philox_uint16, round_to_fp8, round_to_fp8_stochastic
from falqon_fx.site.record import STALE
from tests import sites as sites_module
from tests.parameters import each_pair
from tests.sites import dyadic, make_site, randn, same, site_of, snapshot, step_alike, twins
from tests.strategies import exact_sites
from tests.tolerances import gamma

# numpy, which the interpreter computes with, announces what hashing and Inf do on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def name(dtype):
    return str(dtype).removeprefix("torch.")


def spec_of(sites, **changes):
    state, spec = sites[0].state, sites[0].state.spec
    wanted = {
        "b_dtype": name(sites[0].lora_b.dtype),
        "a_dtype": name(sites[0].lora_a.dtype),
        "applied_dtype": name(state.applied.dtype),
        "base_dtype": "none" if sites[0].base is None else name(sites[0].base.dtype),
        "granularity": spec.granularity,
        "scale": spec.scale,
        "rounding": spec.rounding,
        "drop": spec.pending == "drop",
        "cast": "integer",
        "rank": 16,
        "aligned": False,
        "base_aligned": False,
        "rows": 2,
        "width": 64,
        "loop": False,
        "block": 64,
    }
    return UpdateSpec(**{**wanted, **changes})


def by_kernel(*sites, **changes):
    given = [
        UpdateSite(  # type: ignore[call-arg] # the star stands for five
            *site.state.tensors,
            site.lora_b,
            site.lora_a,
            site.base,
            site.state.scaling,
            site.state.spec.rows(len(site.lora_b)),
        )
        for site in sites
    ]
    update_(given, sites[0].state.spec.seed, spec_of(sites, **changes))


@settings(max_examples=settings.default.max_examples // 4)
@given(made=exact_sites(), loop=st.booleans(), rows=st.sampled_from([1, 4]), data=st.data())
def test_equals_the_cpu_bit_for_bit(made, loop, rows, data):
    others = twins(made)
    for step in range(2):
        step_alike(made, others, step, lambda: data.draw(st.booleans()))
        sites_module.update(*made)
        by_kernel(*others, rows=rows, width=32 if loop else 64, loop=loop)
        for site, other in zip(made, others, strict=True):
            assert same(snapshot(site.state), snapshot(other.state))


@pytest.mark.slow
@settings(max_examples=settings.default.max_examples // 4)
@given(made=exact_sites(), loop=st.booleans(), data=st.data())
def test_equals_the_cpu_bit_for_bit_without_base_weights(made, loop, data):
    made = [replace(site, base=None) for site in made]
    others = twins(made)
    for step in range(2):
        step_alike(made, others, step, lambda: data.draw(st.booleans()))
        sites_module.update(*made)
        by_kernel(*others, rows=2, width=32 if loop else 64, loop=loop)
        for site, other in zip(made, others, strict=True):
            assert same(snapshot(site.state), snapshot(other.state))


@pytest.mark.slow
@each_pair(
    base=["plain", "stored [in, out]", "freed"],
    granularity=["tensor", "row"],
    rounding=["nearest", "stochastic"],
)
def test_bytes_differ_only_at_ties(granularity, rounding, base):
    site = make_site(
        out=16, features=64, rank=16, scale="amax", granularity=granularity, rounding=rounding
    )
    exact_base = site.base.double()
    if base == "stored [in, out]":
        site.base = site.base.t().contiguous().t()
    elif base == "freed":
        site.base = None
    (other,) = twins([site])
    for s in (site, other):
        s.step(size=0.3)
    before = other.state.dequantize().double()
    old_applied = other.state.applied.double()
    by_kernel(other, base_aligned=base == "plain")
    sites_module.update(site)
    for part in ("applied", "counters", "writes"):
        torch.testing.assert_close(
            getattr(other.state, part), getattr(site.state, part), rtol=0, atol=0
        )
    start, held = exact_base, other.state.applied.double()
    if base == "freed":
        start, held = before[:16], held - old_applied
    exact = start + held @ before[16:] * other.state.scaling
    # Row scale times byte rounds, a factor of B twice, sixteen products and sums, the new scale and
    # its reciprocal: 24 roundings at most on the way of any term.
    by = held.abs() @ before[16:].abs() * other.state.scaling
    off = gamma(24) * (start.abs() + by)
    scale = (other.state.scale[:16] if granularity == "row" else other.state.scale).double()
    low, high = ((exact + sign * off) / scale for sign in (-1, 1))
    if rounding == "nearest":
        low, high = (round_to_fp8(v.float(), E4M3) for v in (low, high))
    else:
        row, counters = torch.arange(16), other.state.counters
        random = philox_uint16(row, 64, counters[3].expand(16), counters[4].expand(16), 0)
        low, high = (round_to_fp8_stochastic(v.float(), random, E4M3) for v in (low, high))
    value = other.state.weight[:16].float()
    slack = 2.0**-20 * value.abs()  # of the float32 that low and high were rounded to
    assert ((value >= low - slack) & (value <= high + slack)).all()
    assert (low == high).double().mean() > 0.99
    torch.testing.assert_close(other.state.scale, site.state.scale, rtol=gamma(24), atol=0)
    assert torch.equal(other.state.code[16:], site.state.code[16:])


def test_ties_go_to_the_lowest_row():
    site = make_site(out=200, features=16, rank=4, topk=7, b_size=0.0)
    site.lora_b.fill_(0.5)
    site.lora_b[150] = 2.0
    by_kernel(site)
    assert site.state.writes.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 150]


def test_nothing_is_done_where_b_has_not_changed():
    site = make_site(topk=3)
    before = snapshot(site.state)
    by_kernel(site)
    assert same(before, snapshot(site.state))
    site.step()
    by_kernel(site)
    after = snapshot(site.state)
    assert not same(before, after)
    by_kernel(site)
    assert same(after, snapshot(site.state))


def test_a_sign_is_a_change():
    site = make_site(out=4, features=16, rank=4)
    site.lora_b[2, 1] = -site.lora_b[2, 1]
    by_kernel(site)
    assert site.state.writes.tolist() == [0, 0, 1, 0]


def test_rows_that_are_not_finite_are_counted_and_left():
    site = make_site(out=24, topk="all")
    (other,) = twins([site])
    for s in (site, other):
        s.step()
        s.lora_b[3, 1], s.lora_b[5, 0] = float("nan"), -float("inf")
    sites_module.update(site)
    by_kernel(other)
    assert other.state.nonfinite_rows == site.state.nonfinite_rows == 2
    assert other.state.writes[[3, 5]].tolist() == [0, 0]
    assert other.state.writes.sum() == 22
    assert other.state.applied.isfinite().all()


@each_pair(
    loop=[False, True],
    granularity=["tensor", "row"],
    pending=["hold", "drop"],
    freed={"base": False, "freed": True},
)
def test_rows_that_are_too_large_are_counted_and_left(loop, granularity, pending, freed):
    options = {"granularity": granularity, "pending": pending, "freed": freed}
    site = site_of(dyadic(24, 40, 0), dyadic(4, 40, 1), torch.zeros(24, 4), **options)
    (other,) = twins([site])
    before = snapshot(site.state)
    for step in range(2):
        site.lora_b.copy_(dyadic(24, 4, seed=step, bits=2, low=-6))
        site.lora_b[3], site.lora_b[5, 0], site.lora_b[7, 1] = 64.0, 2e38, -3e38
        other.lora_b.copy_(site.lora_b)
        sites_module.update(site)
        by_kernel(other, rows=4, width=32 if loop else 64, loop=loop)
        assert same(snapshot(site.state), snapshot(other.state))
    kept = [3, 5, 7] if freed else [5, 7]
    assert other.state.too_large_rows == 2 * len(kept)
    assert other.state.nonfinite_rows == 0
    assert other.state.writes[kept].eq(0).all()
    assert other.state.writes.sum() >= 2 * (24 - len(kept)) - 4  # some step may round to nothing
    for part in (0, 2):
        assert torch.equal(snapshot(other.state)[part][kept], before[part][kept])


@pytest.mark.parametrize("changed", ["a", "base"])
def test_a_changed_a_or_base_marks_the_site_stale(changed):
    site = make_site()
    before = snapshot(site.state)
    site.step()
    if changed == "a":
        site.lora_a[1, 2] += 1
    else:
        site.base[0, 0] += 1
    by_kernel(site)
    assert site.state.counters[STALE] == 1
    assert all(torch.equal(before[i], snapshot(site.state)[i]) for i in (0, 1, 2, 4))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (40, 64), (17, 70)])
def test_fingerprints_are_those_of_the_cpu(dtype, shape):
    # A wrong hash would look like a change: nothing changed, so nothing may be written.
    base = randn(*shape).to(dtype)
    if shape[0] == 40:
        base = base.t().contiguous().t()
    site = site_of(base, randn(3, shape[1]).to(dtype), randn(shape[0], 3).to(dtype) / 8)
    before = snapshot(site.state)
    by_kernel(site, width=128)
    assert same(before, snapshot(site.state))


def test_no_sites_launch_nothing(monkeypatch):
    monkeypatch.setattr("falqon_fx.kernels.update.launch.load", None)
    update_([], 0, spec_of([make_site()]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_dtype": "bfloat16"}, "takes others"),
        ({"base_dtype": "none"}, "dtypes float32, float32, float32, float32"),
        ({"granularity": "tensor"}, "scale .* does not fit"),
        ({"rank": 2}, "rank 4 does not fit"),
        ({"width": 32}, "rows of 40 do not fit"),
        ({"aligned": True}, "not multiples of 16"),
        ({"base_aligned": True}, "no rows at multiples of 16"),
        ({"cast": "hardware"}, "cast='integer'"),
    ],
)
def test_bad_input_is_explained(change, message):
    with pytest.raises(ValueError, match=message):
        by_kernel(make_site(), **change)


@pytest.mark.parametrize("part", ["scale", "counters", "writes"])
def test_a_state_of_other_dtypes_is_refused(part):
    site = make_site()
    setattr(site.state, part, getattr(site.state, part).to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"scale, counters and writes of .*torch.bfloat16"):
        by_kernel(site)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounding": "up"}, "rounding='up'"),
        ({"rank": 3}, "rank=3"),
        ({"width": 4}, "eight"),
        ({"drop": True, "applied_dtype": "bfloat16"}, "with drop it is float32"),
    ],
)
def test_bad_spec_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(spec_of([make_site()]), **change)
