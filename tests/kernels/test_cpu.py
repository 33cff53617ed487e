"""The compiled update of a CPU against the same in ATen operations.

They add up r products in different orders, so they are equal bit for bit where all sums are exact
in float32, and where there is one product (rank 1): casts, scales, random numbers, choice of rows.
"""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.rows import audit
from falqon_fx.rows.fingerprint import fingerprint
from falqon_fx.site.looks import sample
from falqon_fx.site.numerics import E4M3, E5M2, FP8_MAX, decode_fp8, round_to_scaled_fp8
from tests.kernels.cpu_update import assert_same_state, flags, tensors_of, update_by_aten
from tests.sites import dyadic, make_site, randn, site_of, step_alike, twins, update
from tests.strategies import SEEDS, exact_sites

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")


@given(made=exact_sites(), freed=st.booleans(), data=st.data())
def test_equals_aten_bit_for_bit_where_sums_are_exact(made, freed, data):
    if freed:
        made = [replace(site, base=None) for site in made]
    others = twins(made)
    for step in range(2):
        step_alike(made, others, step, lambda: data.draw(st.booleans()))
        update(*made)
        update_by_aten(*others)
        assert_same_state(made, others)


@given(
    out=st.integers(1, 40),
    width=st.integers(1, 200),
    seed=SEEDS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.sampled_from([0, 4, 12]),
    bad=st.sampled_from([None, float("nan"), float("inf"), 1e38]),
    base_is=st.sampled_from(["float32", "bfloat16", "float16", "stored [in, out]", "freed"]),
    options=st.fixed_dictionaries(
        {
            "granularity": st.sampled_from(["tensor", "row"]),
            "scale": st.sampled_from(["amax", "pow2"]),
            "rounding": st.sampled_from(["nearest", "stochastic"]),
            "pending": st.sampled_from(["hold", "apply", "drop"]),
            "topk": st.sampled_from([1, 0.3, "all"]),
            "seed": st.sampled_from([0, 2**63 + 7]),
        }
    ),
)
def test_equals_aten_bit_for_bit_at_rank_1(out, width, seed, dtype, spread, bad, base_is, options):
    """Over many magnitudes: subnormal codes, saturation, new scales, rows that are not finite; base
    weights of every dtype, their subnormals among them.
    """
    base = randn(out, width, seed=seed) * (randn(out, width, seed=seed + 1) * spread).exp2()
    base.clamp_(-30000, 30000)  # more is refused
    if base_is == "stored [in, out]":
        base = base.t().contiguous().t()
    elif base_is != "freed":
        base = base.to(getattr(torch, base_is))
    lora_a, lora_b = randn(1, width, seed=seed + 2), randn(out, 1, seed=seed + 3)
    freed = base_is == "freed"
    site = site_of(base, lora_a.to(dtype), lora_b.to(dtype), 0.75, freed=freed, **options)
    (other,) = twins([site])
    for step in range(2):
        site.lora_b.mul_((randn(out, 1, seed=seed + step) * 3).exp2())
        if bad is not None:
            site.lora_b[seed % out] = bad
        other.lora_b.copy_(site.lora_b)
        update(site)
        update_by_aten(other)
        assert_same_state([site], [other])


MATRICES = st.builds(
    lambda rows, columns, dtype, seed: (randn(rows, columns, seed=seed) * 50).to(dtype),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8]
    ),
    SEEDS,
)

VIEWS = st.sampled_from(["whole", "transposed", "strided", "shifted", "sample"])


@given(matrix=MATRICES, view=VIEWS)
def test_fingerprints_equal_atens(matrix, view):
    matrix = {
        "whole": lambda m: m,
        "transposed": lambda m: m.t(),
        "strided": lambda m: m[::2, ::3],
        "shifted": lambda m: m.flatten()[1:].view(1, -1),
        "sample": sample,
    }[view](matrix)
    assume(matrix.numel())
    both = [matrix, matrix.flip(0)]
    expected = torch.stack([fingerprint(m[None])[0] for m in both])
    assert torch.equal(cpu.fingerprints(both), expected)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("freed", [False, True], ids=["base", "freed"])
def test_who_watches_changes_nothing_and_is_told_what_aten_tells(rounding, freed):
    base, lora_a, lora_b = dyadic(20, 33, 0), dyadic(4, 33, 1), dyadic(20, 4, 2, bits=6, low=-6)
    site = site_of(base, lora_a, lora_b, topk=7, rounding=rounding, freed=freed)
    sites = [site, *twins([site]), *twins([site])]
    for s in sites:
        s.lora_b[:5].add_(dyadic(5, 4, seed=3, bits=8, low=-8))
        s.lora_b[9, 1] = float("nan")
    told: list[Any] = []
    update(sites[0])
    with audit.observers.subscribed(told.append):
        update(sites[1])
        update_by_aten(sites[2])
    assert_same_state(sites[:1], sites[1:2])
    assert_same_state(sites[:1], sites[2:])
    compiled, aten = told
    assert compiled.worth.sum() == 5
    for name in ("step", "rows", "worth", "asked", "old", "value", "scale"):
        assert torch.equal(getattr(compiled, name), getattr(aten, name)), name
    for name in ("score", "remains"):
        assert torch.equal(getattr(compiled, name).nan_to_num(), getattr(aten, name).nan_to_num())


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scales=st.sampled_from(["one", "rows", "number"]),
    seed=SEEDS,
)
def test_decoding_equals_atens_bit_for_bit(rows, columns, dtype, scales, seed):
    code = torch.arange(seed % 256, seed % 256 + rows * columns).to(torch.uint8).view(rows, columns)
    scale = {
        "one": torch.tensor(0.3),
        "rows": (randn(rows, 1, seed=seed) * 40).clamp(-126, 119).exp2(),  # 448 of them is finite
        "number": 1.0,
    }[scales]
    decoded = decode_fp8(code, scale, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "library", lambda: None)
        expected = decode_fp8(code, scale, dtype)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)
    assert decoded.isnan().sum() == (code & 0x7F == 0x7F).sum()


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 90),
    dtype=st.sampled_from([E4M3, E5M2]),
    scales=st.sampled_from(["one", "rows", "number"]),
    seed=SEEDS,
)
def test_rounding_equals_atens_bit_for_bit(rows, columns, dtype, scales, seed):
    scale = {
        "one": torch.tensor(2.0**-3),
        "rows": (randn(rows, 1, seed=seed) * 9).round().exp2(),
        "number": 1.0,
    }[scales]
    wide = randn(rows, columns, seed=seed) * (randn(rows, columns, seed=seed + 1) * 6).exp2()
    x = wide.clamp(-FP8_MAX[dtype], FP8_MAX[dtype]) * scale
    x[0, 0], x[-1, -1] = float("nan"), -0.0
    rounded = round_to_scaled_fp8(x, scale, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "library", lambda: None)
        expected = round_to_scaled_fp8(x, scale, dtype)
    assert torch.equal(rounded.view(torch.int32)[x == x], expected.view(torch.int32)[x == x])
    assert torch.equal(rounded.isnan(), x.isnan())
    assert torch.equal((rounded / scale)[x == x], (x / scale).to(dtype).float()[x == x])


@given(
    sizes=st.lists(st.integers(0, 5000), max_size=5),
    offsets=st.tuples(st.integers(0, 70), st.integers(0, 70)),
    threads=st.integers(1, 4),
)
def test_copies_write_every_byte_and_none_beside(sizes, offsets, threads):
    room, before = max(sizes, default=0) + 200, torch.get_num_threads()
    targets = torch.full((len(sizes), room), 7, dtype=torch.uint8)
    sources = (torch.arange(len(sizes) * room) % 251).to(torch.uint8).view(-1, room)
    expected = targets.clone()
    pairs = []
    for i, size in enumerate(sizes):
        (to, of), rows = offsets, (targets[i], sources[i], expected[i])
        pairs.append((rows[0][to : to + size], rows[1][of : of + size]))
        rows[2][to : to + size] = rows[1][of : of + size]
    torch.set_num_threads(threads)
    try:
        assert cpu.copy(pairs)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(targets, expected)


def test_a_copy_compiles_nothing(monkeypatch):
    monkeypatch.setattr(cpu, "library", functools.cache(cpu.library.__wrapped__))
    target = torch.zeros(3)
    assert not cpu.copy([(target, torch.ones(3))])
    assert not cpu.library.cache_info().currsize
    cpu.library()
    assert cpu.copy([(target, torch.ones(3))])
    assert (target == 1).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    sites = [make_site(seed=i, topk=9) for i in range(5)]
    others = twins(sites)
    for s in (*sites, *others):
        s.step()
    before = torch.get_num_threads()
    update(*sites)
    torch.set_num_threads(threads)
    try:
        update(*others)
    finally:
        torch.set_num_threads(before)
    assert_same_state(sites, others)


def test_ties_go_to_the_lowest_row():
    site = make_site(out=200, features=16, rank=4, topk=7, b_size=0.0)
    site.lora_b.fill_(0.5)
    site.lora_b[150] = 2.0
    update(site)
    assert site.state.writes.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 150]


@pytest.mark.parametrize("how", ["float16", "strided"])
def test_other_sites_are_left_to_aten(how):
    site = make_site()
    if how == "float16":
        site.lora_b = site.lora_b.half()
    else:
        site.lora_b = site.lora_b.t().contiguous().t()
    assert not cpu.takes([tensors_of(site)])
    (other,) = twins([site])
    for s in (site, other):
        s.lora_b = s.lora_b + 0.25
    update(site)
    update_by_aten(other)
    assert_same_state([site], [other])
    assert site.state.writes.all()


def test_every_float16_is_widened_exactly():
    """As the base weight of rows to which nothing is added: all 63,488 finite ones."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    base = bits.view(torch.float16)[bits.view(torch.float16).isfinite()].view(-1, 64)
    site = site_of(
        base.clamp(-60000, 60000), torch.zeros(1, 64), torch.zeros(len(base), 1), pending="drop"
    )
    site.base = base
    site.lora_b.fill_(1.0)
    (chosen,) = [
        cpu.write_rows([tensors_of(site)], [1.0], len(base), **flags(site.state.spec), watched=True)
    ]
    assert torch.equal(chosen.value, base.float()[chosen.rows[0]][None])
