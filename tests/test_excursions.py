"""update="rows": a B that is large for a few steps, and what W is when it is back.

W[k] ← q(dq(W[k]) + s · ΔB[k] · Â) leaves an error of up to 1/17 of what is written, so steps of
size 10 to 100 left W off by 31 to 588%.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.rows.update import CLAMPED, LIMIT
from falqon_fx.site.record import TOO_LARGE
from tests.models import fill_b, freeze_a, lora_b, tiny_llama, tiny_mlp
from tests.sites import Site, dequantized, make_site, randn, same, snapshot, twins, update
from tests.tolerances import gamma

GRANULARITY = pytest.mark.parametrize("granularity", ["tensor", "row"])
PENDING = pytest.mark.parametrize("pending", ["hold", "apply", "drop"])
SIZES = pytest.mark.parametrize("size", [0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e30, 3e38])


@pytest.fixture(params=["compiled", "aten"])
def by(request, monkeypatch) -> None:
    """Both forms of the update on a CPU. (tests/kernels/test_update.py holds the third to them.)"""
    if request.param == "aten":
        monkeypatch.setattr(cpu, "library", lambda: None)


def excursion(site: Site, size: float) -> None:
    """Two steps: B far away, and back where it was."""
    b, away = site.lora_b.clone(), randn(*site.lora_b.shape, seed=7).clamp(-1, 1) * size
    if site.state.spec.pending == "drop":
        for step in (away, -away):
            site.lora_b.copy_(step)
            update(site)
    else:
        for there in (b + away, b):
            site.lora_b.copy_(there)
            update(site)


@GRANULARITY
@PENDING
@SIZES
def test_an_excursion_leaves_w_within_two_casts_of_what_it_was(by, granularity, pending, size):
    """A row that is written twice, each time within its limit L · scale, is off by two casts: 1/17
    of L · scale each, or half a subnormal step of a scale below 2 · L / 448 · scale, 2⁻¹⁰ of that.
    (The second limit is that of the scale that came of the first.) And by what was clamped, where
    the scale stays.
    """
    site = make_site(
        granularity=granularity, pending=pending, rounding="nearest", freed=True, b_size=0.0
    )
    before, scale = dequantized(site.state)[:24], site.state.scale.double()
    scale = scale[:24] if granularity == "row" else scale
    excursion(site, size)
    limit = LIMIT if granularity == "row" or pending == "drop" else CLAMPED
    # What comes back is within the first value, its cast's error and what W was.
    most = (limit + (limit + limit / 17 + 448)) / 17 + 2 * (2 * limit / 448) * 2**-10
    if granularity == "tensor":
        most += 2 * (limit - 448)
    most *= 1 + gamma(12)
    off = (dequantized(site.state)[:24] - before).abs()
    assert (off <= most * scale).all()
    if size >= 100:
        assert site.state.too_large_rows > 0


@GRANULARITY
@PENDING
def test_a_far_one_leaves_no_trace_at_all(by, granularity, pending):
    site = make_site(granularity=granularity, pending=pending, freed=True)
    before = snapshot(site.state)
    excursion(site, 100.0)
    code, scale, applied, _, writes = snapshot(site.state)
    # A row whose step is small by chance is written, within the bound above.
    far = (site.state.writes == 0).nonzero().flatten()
    assert len(far) >= 20
    assert torch.equal(code[far], before[0][far])
    assert torch.equal(applied[far], before[2][far])
    assert site.state.too_large_rows >= len(far)
    if granularity == "row":
        assert torch.equal(scale[far], before[1][far])


@GRANULARITY
@PENDING
def test_with_the_base_weight_at_hand_rows_are_written_and_leave_no_trace(by, granularity, pending):
    """They are cast from it anew, so the last write alone counts: no row has to wait."""
    site = make_site(granularity=granularity, pending=pending, rounding="nearest", b_size=0.0)
    (twin,) = twins([site])
    excursion(site, 64.0)  # so that away + (-away) is zero, and b + away - b too
    excursion(twin, 0.0)
    assert (site.state.writes == 2).all()
    assert site.state.too_large_rows == 0
    assert torch.equal(site.state.applied, twin.state.applied)
    assert torch.equal(dequantized(site.state), dequantized(twin.state))


@GRANULARITY
@pytest.mark.parametrize("freed", [False, True], ids=["base", "freed"])
def test_a_row_whose_sum_overflows_stays_as_it_is(by, granularity, freed):
    site = make_site(granularity=granularity, freed=freed)
    before = snapshot(site.state)
    site.lora_b[4, 1], site.lora_b[9, 0] = 2e38, -3e38
    update(site)
    state = site.state
    assert state.nonfinite_rows == 0
    assert state.too_large_rows == state.counters[TOO_LARGE] == 2
    assert state.writes.tolist() == [0] * 24
    assert same(snapshot(state)[:1], before[:1])
    assert torch.equal(state.applied, before[2])


def test_a_scale_may_grow_four_times_and_no_more(by):
    site = make_site(scale="amax", freed=True, b_size=0.0)
    old = site.state.scale.clone()
    amax = dequantized(site.state)[:24].abs().amax(1)
    a = dequantized(site.state)[24:]
    for row in range(24):  # to 3.5 and 4.5 times
        wanted = (3.5 if row % 2 else 4.5) * amax[row]
        site.lora_b[row] = (a[0] * wanted / a[0].abs().amax() @ torch.linalg.pinv(a)).float() / 2
    update(site)
    written = site.state.writes.bool()
    assert written.any()
    assert not written.all()
    grown = site.state.scale[:24][written] / old[:24][written]
    assert (grown <= 4).all()
    left = dequantized(site.state)[:24].abs().amax(1)[~written]
    assert torch.equal(left, amax[~written])


@pytest.mark.parametrize("pending", ["hold", "apply"])
def test_rows_that_wait_are_warned_of_once_and_written_when_b_is_back(pending):
    torch.manual_seed(0)
    model, x = freeze_a(tiny_mlp()), torch.randn(5, 32)
    config = FalqonConfig(update="rows", pending=pending, topk="all", inner="eager")
    falqon_fx.prepare(model, config, progress=False)
    call = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    expected, bases = call(x), [s.base() for s in falqon_fx.adapters(model).values()]
    far = torch.full_like(lora_b(model)[0], 50.0)
    with torch.no_grad():
        lora_b(model)[0].copy_(far)
    call(x)
    with pytest.warns(UserWarning, match=r"48 rows of lora_B of base_model.model.0 were") as seen:
        for _ in range(3):
            with torch.no_grad():
                lora_b(model)[0].add_(1.0)
            call(x)
    assert len(seen) == 1
    up, down = falqon_fx.adapters(model).values()
    assert isinstance(up, falqon_fx.MergedAdapter)
    assert up.too_large_rows == 4 * 48
    assert torch.equal(up.pending(), far + 3)
    with torch.no_grad():
        lora_b(model)[0].zero_()
    assert torch.equal(call(x), expected)
    found = [s.base() for s in falqon_fx.adapters(model).values()]
    assert all(map(torch.equal, found, bases))


def test_flush_writes_them_all_the_same_and_save_fp8_does_not(tmp_path):
    torch.manual_seed(0)
    model = freeze_a(tiny_llama(target_modules=["q_proj", "v_proj"]))
    config = FalqonConfig(update="rows", inner="eager")
    falqon_fx.prepare(model, config, progress=False)
    fill_b(model, 0.05)
    with torch.no_grad():
        lora_b(model)[1][:3] = 500.0
    before = [snapshot(state) for state in falqon_fx.adapters(model).values()]
    with pytest.raises(FalqonError, match="3 of its 16 rows are pending because FP8 would") as no:
        falqon_fx.save_fp8(model, tmp_path / "out", progress=False)
    assert no.value.site == "model.layers.0.self_attn.v_proj"
    assert not (tmp_path / "out").exists()
    after = [snapshot(state) for state in falqon_fx.adapters(model).values()]
    assert all(map(same, before, after))
    merged = falqon_fx.merge_and_unload(copy.deepcopy(model))
    weight = merged.get_submodule("model.layers.0.self_attn.v_proj").weight
    assert (weight[:3].abs().amax(1) > 10).all()
    falqon_fx.flush(model)
    state = falqon_fx.adapters(model)["base_model.model.model.layers.0.self_attn.v_proj"]
    assert isinstance(state, falqon_fx.MergedAdapter)
    assert not state.pending().any()
    assert state.too_large_rows == 0
    falqon_fx.save_fp8(model, tmp_path / "out", progress=False)


@pytest.mark.parametrize("scaling", [float("inf"), float("nan")])
def test_a_sum_that_is_not_finite_is_refused_when_w_is_made(scaling):
    with pytest.raises(FalqonError, match=r"site: its base weight and .* add up to NaN or Inf"):
        make_site(scaling=scaling)


def test_a_sum_that_is_not_finite_is_refused_when_w_is_made_anew():
    """A changed on a CPU; B is so large that the sum overflows."""
    site = make_site()
    site.lora_a.mul_(1e30)
    site.lora_b.mul_(1e30)
    for _ in range(2):  # and again, since nothing of it counts as made
        with pytest.raises(FalqonError, match=r"site 0: .* add up to NaN or Inf"):
            update(site)
    site.lora_a.mul_(1e-30)
    site.lora_b.mul_(1e-30)
    update(site)
    assert dequantized(site.state).isfinite().all()
