"""`MergedAdapter`: what a user sees of a site, and the invariant that ties it to the base."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.kernels.cpu import native
from falqon_fx.site.numerics import E4M3, amax_to_scale
from tests.parameters import each_value
from tests.sites import Site, dequantized, make_site, randn, same, site_of, snapshot, update
from tests.tolerances import fp8_cast_bound, fp8_stochastic_bound, gamma

GRANULARITY = pytest.mark.parametrize("granularity", ["tensor", "row"])
SCALE = pytest.mark.parametrize("scale", ["amax", "pow2"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"]
)


def with_b(site: Site) -> Site:
    site.lora_b = torch.nn.Parameter(site.lora_b)
    site.state.b_ref = weakref.ref(site.lora_b)
    return site


@GRANULARITY
@DTYPES
def test_shapes_and_dtypes(granularity, dtype):
    site = make_site(7, 13, 3, granularity=granularity, dtype=dtype)
    state = site.state
    assert (state.weight.shape, state.weight.dtype) == ((10, 13), E4M3)
    assert state.weight.is_contiguous()
    assert state.scale.shape == ((10, 1) if granularity == "row" else ())
    assert state.scale.dtype == torch.float32
    # 16 bits beside a 16-bit base weight, so that the state stays small.
    expected = torch.float32 if dtype == torch.float32 else torch.bfloat16
    assert make_site(dtype=dtype, pending="drop").state.applied.dtype == torch.float32
    assert (state.applied.shape, state.applied.dtype) == ((7, 3), expected)
    assert (state.dequantize().shape, state.dequantize().dtype) == ((10, 13), torch.float32)
    assert (state.base().shape, state.base().dtype) == ((7, 13), torch.float32)
    assert (state.writes.shape, int(state.writes.sum())) == ((7,), 0)
    assert state.rank == 3
    assert state.nonfinite_rows == 0


@GRANULARITY
@SCALE
def test_dequantize_is_code_times_scale(granularity, scale):
    """The product of an FP8 value and a float32 scale rounds once, to float32."""
    site = make_site(granularity=granularity, scale=scale)
    assert torch.equal(site.state.dequantize(), dequantized(site.state).float())


@GRANULARITY
@SCALE
def test_scales_come_from_the_amax_of_w_and_a_together_or_of_each_row(granularity, scale):
    base, lora_a = randn(24, 40), 5 * randn(4, 40, seed=1)
    site = site_of(base, lora_a, torch.zeros(24, 4), granularity=granularity, scale=scale)
    merged = torch.cat([base, lora_a])
    amax = merged.abs().amax(1, keepdim=True) if granularity == "row" else merged.abs().amax()
    assert torch.equal(site.state.scale, amax_to_scale(amax, E4M3, scale))
    bound = fp8_cast_bound(merged, site.state.scale, E4M3)
    assert ((dequantized(site.state) - merged.double()).abs() <= bound).all()


@GRANULARITY
@SCALE
@DTYPES
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("freed", [False, True], ids=["base", "freed"])
def test_w_is_base_plus_scaled_applied_a_after_many_steps(
    granularity, scale, dtype, rounding, freed
):
    """The invariant: with the base weight at hand a row is off by one cast and the float32 sums
    before it. Without it, by its first cast, plus one cast for each time it was written, at the
    scale it had then, plus the float32 sums of each write.
    """
    options = {"granularity": granularity, "scale": scale, "rounding": rounding, "topk": 6}
    base = make_site(dtype=dtype, seed=1).base.double()
    site = make_site(dtype=dtype, seed=1, freed=freed, **options)
    state, out, s = site.state, 24, site.state.scaling
    cast = fp8_cast_bound if rounding == "nearest" else fp8_stochastic_bound
    lora_a = dequantized(state)[out:]

    def target() -> Tensor:
        return base + s * state.applied.double() @ lora_a

    def sums(start: Tensor, by: Tensor) -> Tensor:
        return gamma(state.rank + 8) * (start.abs() + abs(s) * by.abs() @ lora_a.abs())

    def cast_of(value: Tensor, own: Tensor, cast: Callable[..., Tensor]) -> Tensor:
        scales = state.scale.double().expand(out + 4, 1)[:out]
        return own + cast(value.abs() + own, scales, E4M3)

    held = state.applied.double()
    bound = cast_of(target(), sums(base, held), fp8_cast_bound)
    for step in range(30):
        site.step(seed=step, size=0.05)
        old_applied, old = state.applied.double(), dequantized(state)[:out]
        writes = state.writes.clone()
        update(site)
        rows = state.writes != writes
        assert rows.sum() == 6
        held = state.applied.double()
        if freed:
            value, by = old + s * (held - old_applied) @ lora_a, held - old_applied
            bound[rows] += cast_of(value, sums(old, by), cast)[rows]
        else:
            bound[rows] = cast_of(target(), sums(base, held), cast)[rows]
    assert (state.writes > 1).sum() > 10
    error = dequantized(state)[:out] - target()
    assert (error.abs() <= bound).all()
    # `base()` is the same statement the other way round, in float32.
    off = (state.base().double() - base).abs()
    assert (off <= bound + sums(dequantized(state)[:out], held)).all()
    # The bound means something: without the adapter the weight is beyond it in many places.
    alone = dequantized(state)[:out] - base
    assert (alone.abs() > bound).double().mean() > (0.02 if freed else 0.2)


@pytest.mark.slow
@each_value(granularity=["tensor", "row"], dtype=[torch.float32, torch.bfloat16])
def test_dropped_steps_add_up_however_small(granularity, dtype):
    """With "drop" `applied` is all that remembers the steps: in bfloat16 it would stop growing
    where a step is below its last place, at 1.0 here. Ten thousandths added 2,400 times in float32
    are off by gamma(2400) of their sum at most.
    """
    options = {"granularity": granularity, "pending": "drop", "dtype": dtype}
    site = make_site(4, 16, 2, b_size=0.0, **options)
    for _ in range(2400):
        site.lora_b.fill_(1e-3)
        update(site)
    assert site.state.applied.dtype == torch.float32
    assert ((site.state.applied - 2.4).abs() <= 2.4 * gamma(2401)).all()


@pytest.mark.parametrize("pending", ["hold", "apply", "drop"])
def test_pending_is_what_w_does_not_contain(pending):
    site = with_b(make_site(topk=2, pending=pending))
    state = site.state
    site.step()
    expected = site.lora_b if pending == "drop" else site.lora_b - state.applied
    assert state.pending().dtype == torch.float32
    assert torch.equal(state.pending(), expected.detach())
    update(site)
    if pending != "drop":
        assert ((state.pending() != 0).any(1).sum()) == 22


@GRANULARITY
@pytest.mark.parametrize("pending", ["hold", "apply"])
@pytest.mark.parametrize("transposed", [None, False, True])
def test_flush_writes_every_pending_row_once(granularity, pending, transposed):
    """From the base weight where there is one, whichever way it is stored."""
    site = with_b(make_site(topk=2, granularity=granularity, pending=pending))
    state = site.state
    if transposed is not None:
        stored = site.base.t().contiguous() if transposed else site.base
        state.base_ref, state.transposed = weakref.ref(stored), transposed
    site.step()
    update(site)
    written = state.writes.clone()
    state.flush()
    assert torch.equal(state.applied, site.lora_b)
    assert not state.pending().any()
    assert torch.equal(state.writes - written, 1 - written)  # those not yet written
    after = snapshot(state)
    update(site)  # B has not moved since
    assert same(after, snapshot(state))
    if transposed is not None:  # one cast of all, stochastic
        exact = (
            site.base.double()
            + state.scaling * site.lora_b.detach().double() @ (dequantized(state)[24:])
        )
        own = gamma(12) * (exact.abs() + 40)  # |s·B·Â| is below 40 here
        scales = state.scale.double().expand(28, 1)[:24]
        bound = own + fp8_stochastic_bound(exact.abs() + own, scales, E4M3)
        assert ((dequantized(state)[:24] - exact).abs() <= bound).all()


def test_flush_with_drop_writes_b_and_zeroes_it():
    site = with_b(make_site(topk=2, pending="drop", b_size=0.0))
    with torch.no_grad():
        site.lora_b.copy_(randn(24, 4))
    b = site.lora_b.detach().clone()
    site.state.flush()
    assert not site.lora_b.any()
    assert torch.equal(site.state.applied, b)
    after = snapshot(site.state)
    update(site)
    assert same(after, snapshot(site.state))


@pytest.mark.parametrize("chunk", [None, 40, 7 * 40])
def test_flush_leaves_rows_with_nan_and_counts_each_once(monkeypatch, chunk):
    """Whether the 24 rows of 40 are written together, one at a time or by sevens."""
    monkeypatch.setattr(falqon_fx.rows.update, "_CHUNK", chunk or 1 << 24)
    site = with_b(make_site(topk=2))
    with torch.no_grad():
        site.lora_b[3] = float("nan")
    site.step()
    site.state.flush()
    assert int(site.state.writes[3]) == 0
    assert torch.equal(site.state.applied[4:], site.lora_b[4:])
    assert site.state.nonfinite_rows == 1
    assert site.state.dequantize().isfinite().all()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "ATen"])
@pytest.mark.parametrize("chunk", [None, 40, 7 * 40])
def test_flush_writes_all_rows_but_those_that_overflow(monkeypatch, chunk, compiled):
    """These have the largest steps, so each chunk would choose them before all others."""
    monkeypatch.setattr(falqon_fx.rows.update, "_CHUNK", chunk or 1 << 24)
    if not compiled:
        monkeypatch.setattr(native, "takes", lambda _: False)
    site = with_b(make_site(topk=2, scaling=64.0))
    beyond = [*range(0, 20, 2)]
    with torch.no_grad():
        site.lora_b[beyond] = 8e37  # its steps add up to a number, W + s · B · A does not
    site.step()
    site.state.flush()
    rest = [row for row in range(24) if row not in beyond]
    assert torch.equal(site.state.applied[rest], site.lora_b[rest])
    assert not site.state.writes[beyond].any()
    assert site.state.too_large_rows == len(beyond)
    assert site.state.dequantize().isfinite().all()


def test_the_state_says_when_its_b_is_gone():
    site = with_b(make_site())
    assert torch.equal(site.state.lora_b(), site.lora_b)
    del site.lora_b
    with pytest.raises(FalqonError, match=r"lora_B is gone.*adapters"):
        site.state.pending()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["base", "lora_a", "lora_b"])
def test_nan_and_inf_are_refused_before_anything_is_changed(which, bad):
    params = {"base": randn(8, 16), "lora_a": randn(2, 16, seed=1), "lora_b": torch.zeros(8, 2)}
    params[which][1, 1] = bad
    before = {name: p.clone() for name, p in params.items()}
    with pytest.raises(FalqonError, match="holds NaN or Inf") as error:
        site_of(**params, init="svd")
    assert error.value.site == "site"
    assert "exclude" in error.value.remedy
    for name, p in params.items():
        assert torch.equal(p.nan_to_num(7), before[name].nan_to_num(7))


def test_a_base_weight_beyond_the_scales_is_refused():
    base = randn(8, 16)
    base[0, 0] = 70000
    with pytest.raises(FalqonError, match="exceeds 65536"):
        site_of(base, randn(2, 16), torch.zeros(8, 2))


@GRANULARITY
def test_rows_of_zeros_get_scale_one(granularity):
    base, lora_a = randn(8, 16), torch.zeros(2, 16)
    base[3] = 0
    site = site_of(base, lora_a, torch.zeros(8, 2), granularity=granularity)
    assert site.state.scale.isfinite().all()
    assert not site.state.dequantize()[[3, 8, 9]].any()
    if granularity == "row":
        assert (site.state.scale[[3, 8, 9]] == 1).all()


def test_init_runs_under_inference_mode_and_autocast_as_without():
    plain = make_site(dtype=torch.bfloat16, seed=2)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        odd = make_site(dtype=torch.bfloat16, seed=2)
    assert same(snapshot(plain.state), snapshot(odd.state))
    assert not any(t.is_inference() for t in odd.state.tensors)
