"""Stochastic rounding, and the random numbers that it is made of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx.site.numerics import (
    FP8_MAX,
    philox_uint16,
    round_to_fp8_stochastic,
)
from tests import tolerances as tol
from tests.floats import FORMATS, INF, NAN, bits, codes, near, values

# -- stochastic ------------------------------------------------------------------------------------


ALL_RANDOM = torch.arange(1 << 16)


@FORMATS
def test_stochastic_keeps_every_fp8_value(dtype):
    value = codes().view(dtype).float()
    value = value[~value.isinf()]
    for random in (0, 1, 1 << 15, (1 << 16) - 1):
        rounded = round_to_fp8_stochastic(value, torch.full(value.shape, random), dtype)
        assert torch.equal(bits(rounded), bits(value))


@FORMATS
def test_stochastic_saturates_and_keeps_nan_and_signed_zero(dtype):
    largest = FP8_MAX[dtype]
    x = torch.tensor([INF, -INF, 3e38, -1.001 * largest, NAN, -0.0])
    expected = torch.tensor([largest, -largest, largest, -largest, NAN, -0.0])
    for random in (0, (1 << 16) - 1):
        rounded = round_to_fp8_stochastic(x, torch.full(x.shape, random), dtype)
        assert torch.equal(bits(rounded), bits(expected))


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The FP8 values around float32 x in range, toward zero and away from it."""
    value = values(dtype)
    value = value[value >= 0]
    at = torch.searchsorted(value, x.abs().contiguous(), right=True) - 1
    low, high = value[at], value[(at + 1).clamp(max=len(value) - 1)]
    return torch.copysign(low, x), torch.copysign(high, x)


@FORMATS
def test_stochastic_yields_only_the_two_neighbours(dtype):
    x = near(dtype, 1 << 18, seed=4)
    x = x[x.abs() <= FP8_MAX[dtype]]
    generator = torch.Generator().manual_seed(4)
    random = torch.randint(0, 1 << 16, x.shape, generator=generator)
    rounded = round_to_fp8_stochastic(x, random, dtype)
    low, high = neighbours(x, dtype)
    assert ((rounded == low) | (rounded == high)).all()
    tol.assert_within(rounded, x, tol.fp8_stochastic_bound(x, 1.0, dtype))


@FORMATS
def test_stochastic_probability_over_all_random_numbers(dtype):
    """Enumerated instead of sampled: of the 2**16 random numbers, frac·2**16 round away from zero.

    The count is whole, so it is off by less than 1; float32 may add 1 more where frac·2**16 is
    within its rounding of a whole number.
    """
    x = near(dtype, 200, seed=5)
    x = x[x.abs() < FP8_MAX[dtype]]
    low, high = neighbours(x, dtype)
    gap = (high.double() - low.double()).abs()
    exact = (x.double() - low.double()).abs() / gap * 2**16
    rounded = round_to_fp8_stochastic(x.unsqueeze(1), ALL_RANDOM, dtype)
    away = (rounded == high.unsqueeze(1)).sum(dim=1)
    # A value that FP8 holds counts as its own lower neighbour.
    tol.assert_within(away, exact, 1.0 + 2.0**-7)


@FORMATS
def test_stochastic_is_unbiased_with_philox(dtype):
    """2**14 draws for each of 500 values; 3e-8 chance each to fail a right implementation."""
    x = near(dtype, 500, seed=6)
    x = x[x.abs() < FP8_MAX[dtype]]
    trials = 1 << 14
    zero = torch.tensor([0])
    random = philox_uint16(torch.arange(trials), len(x), zero, zero, seed=7)  # [trials, x]
    rounded = round_to_fp8_stochastic(x.expand(trials, -1), random, dtype)
    low, high = neighbours(x, dtype)
    gap = high.double() - low.double()
    p = (x.double() - low.double()) / gap
    frequency = (rounded == high).double().mean(dim=0)
    resolution = 2.0**-16  # of the probability that a 16-bit random number can express
    tol.assert_within(frequency, p, tol.binomial_bound(p, trials) + resolution)


# -- random numbers --------------------------------------------------------------------------------


MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox-4x32-10 by the book (Salmon et al., SC'11), in Python's own integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


# The published vectors (Random123, kat_vectors): counter, key, words.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (MASK, MASK, MASK, MASK),
        (MASK, MASK),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_scalar_philox_gives_the_published_words(counter, key, words):
    assert philox4x32(counter, key) == words


def test_philox_gives_the_published_words_at_counter_zero():
    zero = torch.tensor([0])
    halves = philox_uint16(zero, 8, zero, zero, seed=0)[0].tolist()
    words = tuple(low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True))
    assert words == KNOWN_ANSWERS[0][2]


U32 = st.integers(0, MASK)


@given(
    row=st.lists(U32, min_size=1, max_size=4),
    columns=st.integers(1, 40),
    step=U32,
    site=U32,
    seed=st.integers(0, 2**64 - 1),
)
def test_philox_equals_the_scalar_one(row, columns, step, site, seed):
    drawn = philox_uint16(
        torch.tensor(row), columns, torch.tensor([step]), torch.tensor([site]), seed
    )
    assert drawn.shape == (len(row), columns)
    key = (seed & MASK, seed >> 32)
    for i, r in enumerate(row):
        blocks = [philox4x32((b, r, step, site), key) for b in range(-(-columns // 8))]
        halves = [
            half for block in blocks for word in block for half in (word & 0xFFFF, word >> 16)
        ]
        assert drawn[i].tolist() == halves[:columns]


def test_philox_columns_do_not_depend_on_the_width():
    row, zero = torch.arange(3), torch.tensor([0])
    wide = philox_uint16(row, 64, zero, zero, seed=1)
    assert torch.equal(philox_uint16(row, 13, zero, zero, seed=1), wide[:, :13])


@pytest.mark.parametrize("changed", ["row", "step", "site", "seed"])
def test_philox_streams_differ(changed):
    def draw(row=0, step=0, site=0, seed=0):
        tensors = [torch.tensor([v]) for v in (row, step, site)]
        return philox_uint16(tensors[0], 512, tensors[1], tensors[2], seed)

    # Equal by chance at 512 x 2**-16: more than 8 equal places has a chance below 1e-21.
    assert (draw() == draw(**{changed: 1})).sum() <= 8


def test_philox_is_uniform():
    """Chi-square of the high byte, the low byte, and of pairs of neighbouring columns."""
    zero = torch.tensor([0])
    drawn = philox_uint16(torch.arange(2048), 512, zero, zero, seed=3)  # 2**20 numbers
    assert drawn.min() >= 0
    assert drawn.max() < 1 << 16
    pair = (drawn[:, ::2] >> 12) << 4 | drawn[:, 1::2] >> 12
    for cell in (drawn >> 8, drawn & 0xFF, pair):
        count = torch.bincount(cell.flatten(), minlength=256).double()
        expected = cell.numel() / 256
        statistic = ((count - expected) ** 2 / expected).sum().item()
        low, high = tol.chi_square_bound(255)
        assert low < statistic < high
