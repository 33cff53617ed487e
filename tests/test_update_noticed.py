"""What an update notices: that B moved, that A or W changed, by the fingerprint; NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx import FalqonError
from falqon_fx.rows.fingerprint import fingerprint
from tests.sites import dequantized, make_site, randn, same, site_of, snapshot, update

GRANULARITY = pytest.mark.parametrize("granularity", ["tensor", "row"])

INF, NAN = float("inf"), float("nan")


# -- when ------------------------------------------------------------------------------------------


@GRANULARITY
@pytest.mark.parametrize("pending", ["hold", "apply"])
def test_nothing_is_written_while_b_rests_and_once_when_it_moved(granularity, pending):
    site = make_site(granularity=granularity, pending=pending, topk=2)
    before = snapshot(site.state)
    for _ in range(3):
        update(site)
    assert same(before, snapshot(site.state))
    site.step()
    update(site)
    after = snapshot(site.state)
    assert int(site.state.writes.sum()) == 2
    for _ in range(3):  # gradient accumulation, evaluation, recomputation: B is still the same
        update(site)
    assert same(after, snapshot(site.state))


def with_optimizer(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[..., None]:
    def move(b: Tensor) -> None:
        b.requires_grad_().grad = torch.ones_like(b)
        make([b]).step()
        b.requires_grad_(False)

    return move


MOVES = {
    "data": lambda b: setattr(b, "data", b.data + 0.1),
    "data_in_place": lambda b: b.data.view(-1)[3].mul_(-1),
    "copy": lambda b: b.copy_(b * 1.01),
    "sgd": with_optimizer(lambda p: torch.optim.SGD(p, lr=0.1)),
    "adamw": with_optimizer(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False)),
    "adamw_foreach": with_optimizer(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "adamw_fused": with_optimizer(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_every_way_of_moving_b_is_noticed(move):
    site = make_site()
    site.lora_b = torch.nn.Parameter(site.lora_b, requires_grad=False)
    move(site.lora_b)
    update(site)
    assert int(site.state.writes.sum()) > 0
    assert torch.equal(site.state.applied, site.lora_b)


# -- bad values ------------------------------------------------------------------------------------


@GRANULARITY
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("topk", [3, "all"])
def test_rows_of_b_with_nan_or_inf_are_not_written_and_counted(granularity, bad, topk):
    site = make_site(granularity=granularity, topk=topk)
    site.step()
    site.lora_b[4, 1] = bad
    site.lora_b[9] = bad
    before = snapshot(site.state)
    update(site)
    state = site.state
    assert state.nonfinite_rows == 2
    assert [int(w) for w in state.writes[[4, 9]]] == [0, 0]
    assert torch.equal(state.code[[4, 9]], before[0][[4, 9]])
    assert int(state.writes.sum()) == (3 if topk == 3 else 22)
    for tensor in (dequantized(state), state.applied, state.scale):
        assert tensor.isfinite().all()
    update(site)  # B rests: not counted again
    assert state.nonfinite_rows == 2
    site.lora_b[[4, 9]] = 50.0  # repaired
    update(site)
    assert int(state.writes[4]) == int(state.writes[9]) == 1
    assert state.nonfinite_rows == 2


# -- A or W changed --------------------------------------------------------------------------------


@GRANULARITY
@pytest.mark.parametrize("which", ["base", "lora_a"])
def test_a_change_of_a_or_w_rebuilds_the_site_from_the_base_weight(granularity, which):
    site = make_site(granularity=granularity)
    site.step()
    update(site)
    getattr(site, which).data.mul_(1.5)
    update(site)
    fresh = site_of(site.base, site.lora_a, site.lora_b, granularity=granularity)
    assert same(snapshot(site.state)[:3], snapshot(fresh.state)[:3])
    assert not site.state.writes.any()


def test_a_change_of_a_after_prepare_raises_and_writes_nothing():
    site = make_site()
    site.base = None
    site.step()
    site.lora_a[0, 0] += 1
    before = snapshot(site.state)
    with pytest.raises(FalqonError, match="lora_A is not the one that prepare") as error:
        update(site)
    assert "restore" in error.value.remedy
    assert same(before, snapshot(site.state))


# -- fingerprint -----------------------------------------------------------------------------------


def bits_of(dtype: torch.dtype) -> torch.dtype:
    return {4: torch.int32, 2: torch.int16}[dtype.itemsize]


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_the_fingerprint_sees_every_change_of_one_element(m, n, dtype, data):
    """Any bits to any others: signs, last places, subnormals, NaN."""
    tensor = randn(m, n, seed=data.draw(st.integers(0, 99))).to(dtype)
    changed = tensor.clone()
    element = changed.view(-1)[data.draw(st.integers(0, m * n - 1))].view(bits_of(dtype))
    width = 8 * dtype.itemsize
    element.bitwise_xor_(
        data.draw(st.integers(1, 2**width - 1).map(lambda v: v - 2**width if v >> width - 1 else v))
    )
    assert fingerprint(tensor[None]) != fingerprint(changed[None])


@given(
    m=st.integers(2, 40),
    n=st.integers(2, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    values=st.sampled_from(["normal", "signs", "permutations"]),
    dim=st.integers(0, 1),
    data=st.data(),
)
def test_the_fingerprint_sees_swapped_rows_and_columns(m, n, dtype, values, dim, data):
    """Also where sums can't tell them apart: entries of ±1, rows and columns of equal content."""
    seed = data.draw(st.integers(0, 99))
    tensor = randn(m, n, seed=seed)
    if values == "signs":
        tensor = tensor.sign()
    elif values == "permutations":
        tensor = (torch.arange(m)[:, None] + torch.arange(n)) % max(m, n) + 1.0
    tensor = tensor.to(dtype)
    size = tensor.shape[dim]
    i, j = data.draw(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)))
    assume(not torch.equal(tensor.select(dim, i), tensor.select(dim, j)))
    order = torch.arange(size)
    order[[i, j]] = order[[j, i]]
    swapped = tensor.index_select(dim, order)
    assert fingerprint(tensor[None]) != fingerprint(swapped[None])


def test_the_fingerprint_sees_flipped_signs():
    """A sign is the last bit of a word, where sums modulo 2**64 lose most."""
    tensor = randn(6, 8)
    places = [(i, j) for i in range(6) for j in range(8)]
    seen = {int(fingerprint(tensor[None]))}
    for first, a in enumerate(places):
        for b in places[first:]:
            flipped = tensor.clone()
            for place in {a, b}:
                flipped[place] *= -1
            seen.add(int(fingerprint(flipped[None])))
    assert len(seen) == 1 + 48 * 49 // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 130), (130, 1), (3, 7), (1, 1), (5, 64)])
def test_the_fingerprint_is_the_same_for_every_layout(shape, dtype):
    tensor = randn(*shape).to(dtype)
    wide = torch.zeros(shape[0] + 1, 2 * shape[1] + 1, dtype=dtype)
    wide[1:, 1::2] = tensor
    expected = fingerprint(tensor[None])
    assert torch.equal(fingerprint(tensor.t().contiguous().t()[None]), expected)
    assert torch.equal(fingerprint(wide[1:, 1::2][None]), expected)
    assert torch.equal(fingerprint(torch.stack([tensor, tensor]))[1:], expected)
    assert fingerprint(torch.zeros(1, *shape, dtype=dtype)) == 0
