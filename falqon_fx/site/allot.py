"""A budget of bytes, spent where it lowers an expected loss most."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

STEP = 8  # units that are bought at a time: of columns of K fewer cost a kernel as much


@dataclass(frozen=True)
class Offer:
    """Units (ranks, channels) that can be bought under ``key``: the first of them takes
    ``shares[0]`` of the loss ``worth`` away, the next ``shares[1]``, never more than the one
    before. Each costs ``price``.
    """

    key: Hashable
    shares: Tensor
    worth: float
    price: int

    def gain(self, first: int) -> float:
        """What the step that begins at unit ``first`` buys for one of the budget."""
        step = self.shares[first : first + STEP]
        return self.worth * float(step.sum()) / (self.price * max(1, len(step)))


def allot(offers: Sequence[Offer], budget: int) -> dict[Hashable, int]:
    """How many units of each offer are bought: step by step what buys most for its price, until
    no step is left that ``budget`` pays for. Since a step never buys more than the one before it,
    no other choice of the same price buys more, up to the last steps.
    """
    bought: dict[Hashable, int] = {offer.key: 0 for offer in offers}
    heap = [(-offer.gain(0), i) for i, offer in enumerate(offers)]
    heapq.heapify(heap)
    while heap:
        gain, i = heapq.heappop(heap)
        offer = offers[i]
        first = bought[offer.key]
        count = len(offer.shares[first : first + STEP])
        if not gain or not count or count * offer.price > budget:
            continue
        budget -= count * offer.price
        bought[offer.key] = first + count
        heapq.heappush(heap, (-offer.gain(first + count), i))
    return bought
