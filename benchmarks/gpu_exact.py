"""What `gpu_check.py` holds results against: float64, with how far a bfloat16 result may be off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exact:
    """A float64 result: a sum of products, each of ``terms`` terms at most.

    ``gauge`` is the sum of the magnitudes of all terms, ``partial`` that of the products.
    """

    value: Tensor
    gauge: Tensor
    partial: Tensor
    terms: int

    def __add__(self, other: Exact) -> Exact:
        return Exact(
            self.value + other.value,
            self.gauge + other.gauge,
            self.partial + other.partial,
            max(self.terms, other.terms),
        )

    def columns(self, part: slice) -> Exact:
        fields = (self.value[:, part], self.gauge[:, part], self.partial[:, part])
        return Exact(*fields, self.terms)

    def beside(self, other: Exact) -> Exact:
        """Both, side by side."""
        pairs = (
            (self.value, other.value),
            (self.gauge, other.gauge),
            (self.partial, other.partial),
        )
        value, gauge, partial = (torch.cat(pair, dim=1) for pair in pairs)
        return Exact(value, gauge, partial, max(self.terms, other.terms))

    @property
    def bound(self) -> Tensor:
        """How far a bfloat16 result may be off.

        Tensor cores add 32 products at a time, and keep at least 13 bits behind the leading one of
        the largest addend (as has been reported of Hopper's). Each of the 32 loses 2**-13 of that
        largest one, and each of the K/32 sums 2**-13 of what has been added up so far; both are
        below the gauge. Some candidates round to bfloat16 (2**-9) after each product and each
        addition, at most eight times, what is below the sum of the products' magnitudes.
        """
        steps = self.terms / 32 + 32
        return self.gauge * (steps * 2.0**-13) + self.partial * 2.0**-6


def product(q: Tensor, weight: Tensor, scales: Tensor | float = 1.0) -> Exact:
    """q · weightᵀ ⊙ scales."""
    a, b = q.double(), weight.double()
    value = a @ b.t() * scales
    return Exact(value, a.abs() @ b.abs().t() * scales, value.abs(), q.shape[1])


def constant(value: Tensor) -> Exact:
    """Something exact that is added."""
    wide = value.double()
    return Exact(wide, wide.abs(), wide.abs(), 1)
