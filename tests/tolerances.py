"""Every bound that the tests compare against, each with its derivation.

Notation: u is a unit roundoff (half the gap between 1 and the next value), s a scale, dq(q) = q·s.
Bounds are float64 tensors or floats and absolute, element by element, unless a name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Round to nearest: |fl(x) - x| <= u |x|.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float8_e4m3fn: 2.0**-4,
    torch.float8_e5m2: 2.0**-3,
    torch.int8: 0.0,  # all its numbers are as far apart
}
# Below this magnitude values lie this far apart: smallest normal x 2 x unit roundoff.
SUBNORMAL_SPACING = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
    torch.float8_e4m3fn: 2.0**-9,
    torch.float8_e5m2: 2.0**-16,
    torch.int8: 1.0,
}
_U32 = UNIT_ROUNDOFF[torch.float32]
SIGMAS = 6.0


def cast_bound(x: Tensor, dtype: torch.dtype) -> Tensor:
    """|fl(x) - x| of one rounding to nearest, in range.

    With x in [2^e, 2^(e+1)) the gap is 2u·2^e, so the error is at most u·2^e. It reaches that only
    at |x| >= 2^e (1 + u), nearer to 2^e it is |x| - 2^e; so relative to |x| at most u / (1 + u):
    |x|/17 for E4M3, |x|/9 for E5M2. Subnormals, and all of INT8: half their spacing.
    """
    u = UNIT_ROUNDOFF[dtype]
    return (x.double().abs() * (u / (1 + u))).clamp(min=SUBNORMAL_SPACING[dtype] / 2)


def fp8_cast_bound(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """|dq(q(x)) - x| of float32 x cast to FP8 with a scale that covers its amax.

    In exact arithmetic this is s times `cast_bound` of x/s: max(|x|/17, s·2^-10) for E4M3,
    max(|x|/9, s·2^-17) for E5M2. Float32 adds, with u = 2^-24: x/s is x times the rounded 1/s
    (relative 2u, to first order), which moves the value that is cast by 2u|x| and its cast error
    by at most 2u|x|/9; the product q·s rounds once more, u|q·s| <= u(10|x|/9 + s·spacing/2);
    together under 4u|x| + u·s·spacing/2. Saturation: x/s passes fp8_max by 4u at most (the scale
    rounds too), which saturating costs. A product below 2^-126 is off by up to 2^-149.
    """
    scale = torch.as_tensor(scale, dtype=torch.float64)
    exact = scale * cast_bound(x.double() / scale, dtype)
    return exact * (1 + _U32) + 4 * _U32 * x.double().abs() + SUBNORMAL_SPACING[torch.float32]


def fp8_stochastic_bound(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """|dq(q(x)) - x| with stochastic rounding: less than the gap instead of half of it.

    The gap is 2u·2^e <= 2u|x|, so |x|/8 for E4M3 and |x|/4 for E5M2, or s times the spacing of the
    subnormals. The float32 terms are those of `fp8_cast_bound`, with |q·s| <= 5|x|/4 + s·spacing:
    2u·(5/4)|x| for the shift of the cast value, 5u|x|/4 for the product.
    """
    scale = torch.as_tensor(scale, dtype=torch.float64)
    relative = 2 * UNIT_ROUNDOFF[dtype] * x.double().abs()
    exact = torch.maximum(relative, scale * SUBNORMAL_SPACING[dtype])
    return exact * (1 + _U32) + 4 * _U32 * x.double().abs() + SUBNORMAL_SPACING[torch.float32]


def amax_scale_relative_bound() -> float:
    """|s - amax/fp8_max| / (amax/fp8_max): the constant 1/fp8_max rounds once, the product once."""
    return gamma(2)


def pow2_scale_range(amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(low, high): the smallest power of two s >= amax/fp8_max lies in [low, high) =
    [amax/fp8_max, 2 amax/fp8_max).
    """
    lowest = amax.double() / torch.finfo(dtype).max
    return lowest, 2 * lowest


def gamma(n: int, u: float = _U32) -> float:
    """Relative error of n roundings in a row: (1 + u)^n - 1 <= gamma_n = nu / (1 - nu) (Higham)."""
    if not n * u < 1:
        raise ValueError(f"no bound for {n} roundings of unit {u}")
    return n * u / (1 - n * u)


def dot_bound(a: Tensor, b: Tensor, u: float = _U32) -> Tensor:
    """|fl(a @ b) - a @ b| for a [m, K], b [K, n] that holds in every order of summation.

    Each product passes at most K roundings (its own and K - 1 sums), so the error is at most
    gamma_K · (|a| @ |b|). FP8 products are exact in float32, which the bound gives away. Hardware
    that accumulates with fewer bits has its own u: pass it.
    """
    return gamma(a.shape[-1], u) * (a.double().abs() @ b.double().abs())


def rounded_bound(exact: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound after a result, already off from ``exact`` by ``bound``, is rounded to ``dtype``."""
    u = UNIT_ROUNDOFF[dtype]
    return bound + u * (exact.double().abs() + bound) + SUBNORMAL_SPACING[dtype] / 2


def binomial_bound(p: Tensor | float, trials: int) -> Tensor:
    """|hits/trials - p| that chance exceeds with a probability under 3e-8.

    Bernstein's inequality at z = 6 sigma: with t = z sqrt(p(1 - p)/n) + z²/(3n),
    P(|mean - p| >= t) <= 2 exp(-z²/2). The second term covers p near 0 and 1, where the binomial
    is far from normal.
    """
    p = torch.as_tensor(p, dtype=torch.float64)
    return SIGMAS * (p * (1 - p) / trials).sqrt() + SIGMAS**2 / (3 * trials)


def chi_square_bound(freedom: int) -> tuple[float, float]:
    """(low, high) of a chi-square statistic with k degrees of freedom at 6 sigma.

    Wilson-Hilferty: (chi²/k)^(1/3) is near normal, mean 1 - 2/(9k) and variance 2/(9k), for k in
    the hundreds; unlike mean k, variance 2k it keeps the skew.
    """
    mean, width = 1 - 2 / (9 * freedom), SIGMAS * math.sqrt(2 / (9 * freedom))
    return freedom * (mean - width) ** 3, freedom * (mean + width) ** 3


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Compare in float64, element by element, and name the worst element. NaN never passes."""
    actual, expected = actual.double(), expected.double()
    bound = torch.as_tensor(bound, dtype=torch.float64).expand_as(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual - expected).abs()
    bad = ~(error <= bound)
    if bad.any():
        excess = torch.where(bad, (error / bound).nan_to_num(float("inf"), float("inf")), 0.0)
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} beyond the bound; worst at {at}: "
            f"{actual[at].item()} against {expected[at].item()}, "
            f"off by {error[at].item():.3e}, allowed {bound[at].item():.3e}"
        )


@dataclass(frozen=True)
class Approx:
    """An exact float64 ``value`` and a ``bound`` on how far the computed one is off.

    Running error analysis (Higham, chapter 3): each operation of the code under test is repeated
    here on ``value``, and what the operands' errors and its own roundings may cost goes into
    ``bound``. Sums and products are exact until `rounded` says where a result is rounded.
    """

    value: Tensor
    bound: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> Approx:
        return cls(value.double(), torch.zeros_like(value, dtype=torch.float64))

    @property
    def largest(self) -> Tensor:
        return self.value.abs() + self.bound

    def rounded(self, *dtypes: torch.dtype) -> Approx:
        """After one rounding to each of ``dtypes``, one after the other."""
        bound = self.bound
        for dtype in dtypes:
            bound = rounded_bound(self.value, bound, dtype)
        return Approx(self.value, bound)

    def __getitem__(self, at: Any) -> Approx:
        return Approx(self.value[at], self.bound[at])

    def t(self) -> Approx:
        return Approx(self.value.t(), self.bound.t())

    def __add__(self, other: Approx) -> Approx:
        return Approx(self.value + other.value, self.bound + other.bound)

    def __mul__(self, other: Approx) -> Approx:
        off = self.largest * other.bound + self.bound * other.value.abs()
        return Approx(self.value * other.value, off)

    def __matmul__(self, other: Approx) -> Approx:
        """Accumulated in float32, in any order (`dot_bound`)."""
        off = self.largest @ other.bound + self.bound @ other.value.abs()
        own = dot_bound(self.largest, other.largest)
        return Approx(self.value @ other.value, off + own)

    def addmm(self, a: Approx, b: Approx, dtype: torch.dtype) -> Approx:
        """self + a @ b in ``dtype``. Implementations may start the sum with self (one rounding
        more for everything, float32) or round a @ b to ``dtype`` first: the bound admits both.
        """
        product = a @ b
        own = gamma(a.value.shape[-1] + 1) * (self.largest + a.largest @ b.largest)
        total = self + product.rounded(dtype)
        return Approx(total.value, total.bound + own).rounded(dtype)

    def assert_holds(self, actual: Tensor) -> None:
        assert_within(actual, self.value, self.bound)


@dataclass(frozen=True)
class Parameters:
    """What a site consists of: W, an adapter and, in ``others``, (A, B, scaling) of further ones.

    Where the first adapter reads x behind a dropout, ``mask`` is what x is multiplied by there: 0
    or a power of two, which is exact.
    """

    base: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None
    lora_bias: Tensor | None = None  # of B, scaled by at most `scaling` or 1
    others: tuple[tuple[Tensor, Tensor, float], ...] = ()
    mask: Tensor | None = None

    @property
    def adapters(self) -> tuple[tuple[Tensor, Tensor, float], ...]:
        return ((self.lora_a, self.lora_b, self.scaling), *self.others)


@dataclass(frozen=True)
class SiteBounds:
    """How far the output and the gradients of a rewritten site may be off, flat over tokens;
    ``adapters`` are those of dL/dA and dL/dB of each adapter.
    """

    y: Tensor
    grad_x: Tensor
    adapters: tuple[tuple[Tensor, Tensor], ...]

    @property
    def grad_a(self) -> Tensor:
        return self.adapters[0][0]

    @property
    def grad_b(self) -> Tensor:
        return self.adapters[0][1]


def site_bounds(x: Tensor, grad: Tensor, p: Parameters) -> SiteBounds:
    """A rewritten site (row and pow2 scales) against exact arithmetic on its unquantized operands:
    y = x·Wᵀ + Σ s·(x·Aᵀ)·Bᵀ + biases, dL/dx, dL/dA and dL/dB.

    Three casts to E4M3 (x, A and W), one to E5M2 (dL/dO), and the roundings in between. Scales are
    powers of two, so that decoded operands are exact in bfloat16 as in float32.
    """
    dtype = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    ones = torch.ones(x.shape)
    masks = [ones if p.mask is None else p.mask.reshape(x.shape), *(ones for _ in p.others)]
    qx, qw, exact = _row_cast(Approx.exact(x)), _row_cast(Approx.exact(p.base)), Approx.exact(grad)

    y = (qx @ qw.t()).rounded(dtype)
    through: list[tuple[Approx, Approx]] = []  # D and A of each adapter, for dL/dx
    adapters = []
    for (lora_a, lora_b, scaling), mask in zip(p.adapters, masks):
        own = _row_cast(Approx.exact(x * mask))
        factor = Approx.exact(torch.tensor(scaling, dtype=torch.float64)).rounded(torch.float32)
        b = (Approx.exact(lora_b) * factor).rounded(torch.float32, dtype)
        qa = _row_cast(Approx.exact(lora_a))
        out_a = (own @ qa.t()).rounded(dtype)
        y = y.addmm(out_a, b.t(), dtype)
        d = (exact @ b).rounded(dtype)
        through.append((d, qa))
        product = (exact.rounded(dtype).t() @ out_a).rounded(dtype)
        grad_b = (product * factor).rounded(torch.float32, lora_b.dtype)
        grad_a = (d.t() @ own).rounded(dtype, lora_a.dtype)
        adapters.append((grad_a.bound, grad_b.bound))
    if p.bias is not None:
        y = (y + Approx.exact(p.bias).rounded(dtype)).rounded(dtype)
    y = y.rounded(grad.dtype)
    if p.lora_bias is not None:
        largest = torch.tensor(max(abs(p.scaling), 1.0))
        term = (Approx.exact(p.lora_bias) * Approx.exact(largest)).rounded(p.lora_bias.dtype)
        y = (y + term).rounded(grad.dtype, grad.dtype)

    # q(dL/dO · s_W) / s_W: s_W drops out but where the cast underflows.
    amax = p.base.double().abs().amax(1) / torch.finfo(torch.float8_e4m3fn).max
    g_scale = 2 * (exact.largest * 2 * amax).amax(1, keepdim=True)
    g_scale = g_scale / torch.finfo(torch.float8_e5m2).max
    quotient = g_scale.clamp(min=torch.finfo(torch.float32).tiny) / amax
    qg = Approx(exact.value, fp8_cast_bound(grad, quotient, torch.float8_e5m2) * (1 + gamma(4)))
    if p.mask is None:  # one product, [q(dL/dO) | D] · [W; A]
        left, right = zip((qg, qw), *through)
        grad_x = (side_by_side(left, 1) @ side_by_side(right, 0)).rounded(dtype, x.dtype)
    else:
        grad_x = (qg @ qw).rounded(dtype, x.dtype)
        for (d, qa), mask in zip(through, masks):
            part = (d @ qa).rounded(dtype, x.dtype) * Approx.exact(mask)
            grad_x = (grad_x + part).rounded(x.dtype)
    return SiteBounds(y.bound, grad_x.bound, tuple(adapters))


def side_by_side(parts: Iterable[Approx], dim: int) -> Approx:
    """Matrices joined along ``dim``."""
    values, bounds = zip(*((part.value, part.bound) for part in parts))
    return Approx(torch.cat(values, dim), torch.cat(bounds, dim))


def _row_cast(a: Approx) -> Approx:
    """After a cast to E4M3, a row at a time. A scale of a power of two is below 2·amax/448."""
    e4m3 = torch.float8_e4m3fn
    scale = 2 * a.largest.amax(1, keepdim=True) / torch.finfo(e4m3).max
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return Approx(a.value, a.bound + fp8_cast_bound(a.largest, scale, e4m3))
