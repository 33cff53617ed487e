"""What a write-back did, for those who watch it (`falqon_fx.watch`); else nothing is computed.

The update op runs as Python in every compiled graph, so watching needs no other graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from falqon_fx.kernels.cpu.native import ChosenRows
from falqon_fx.site.numerics import E4M3, FP8_MAX, decode_fp8

# Columns of `WriteBackBatch.table`: fields of `falqon_fx.report.Audit`.
COLUMNS = ("step", "asked", "kept", "lost", "clamped", "saturated", "underflowed", "pending")


@dataclass(frozen=True)
class WriteBackBatch(ChosenRows):
    """One batch of G sites of one shape, k rows of each.

    Attributes:
        applied: the sites' state tensors, by which they are known.
        step: int64 [G], each site's count of optimizer steps.
        code, scale: what was written, uint8 [G, k, in] and float32 [G, k or 1, 1].
    """

    applied: list[Tensor]
    step: Tensor
    code: Tensor
    scale: Tensor

    def table(self) -> Tensor:
        """Float64 [G, len(COLUMNS) + 2k] on the device: `COLUMNS`, then ``rows``, then ``worth``.

        Few passes over [G, k, in], all of kinds that vectorise on CPU: comparisons in place, which
        give numbers instead of booleans, and sums of one row each.
        """
        kept = decode_fp8(self.code, self.scale, self.old.dtype).sub_(self.old)
        squares = [_square_sums(self.asked), _square_sums(kept)]
        squares.append(_square_sums(kept.sub_(self.asked)))
        scaled = torch.mul(self.value, self.scale.reciprocal(), out=kept)  # kept is done with
        clamped = scaled.abs_().gt_(FP8_MAX[E4M3]).sum(-1)
        saturated = self._codes(0x7E)
        # Zero is cast to zero; the other zeros are what underflowed.
        underflowed = self._codes(0) - torch.eq(self.value, 0, out=kept).sum(-1)
        written = self.score.gather(-1, self.rows) - self.remains
        each = torch.stack([*squares, clamped, saturated, underflowed, written])
        sums = each.where(self.worth, 0).sum(-1, dtype=torch.float64)  # [7, G]
        sums[:3].sqrt_()
        sums[4:6] /= (self.worth.sum(-1) * self.asked.shape[-1]).clamp(min=1)
        sums[6] = self.score.sum(-1) - sums[6]
        return torch.cat([self.step[:, None], sums.t(), self.rows, self.worth], -1)

    def _codes(self, size: int) -> Tensor:
        """How many elements of each row have this code, whatever their sign."""
        return (self.code & 0x7F).eq_(size).sum(-1, dtype=torch.int32)


def _square_sums(value: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(value, dim=-1)
    return norm.square_()


class WriteBackObservers:
    """Process-wide observers of write-backs: an op can't carry Python objects. An observer knows
    its own sites by ``WriteBackBatch.applied``.
    """

    def __init__(self) -> None:
        self._watchers: tuple[Callable[[WriteBackBatch], None], ...] = ()

    def __bool__(self) -> bool:
        return bool(self._watchers)

    @contextmanager
    def subscribed(self, watcher: Callable[[WriteBackBatch], None]) -> Iterator[None]:
        """While this is open, ``watcher`` is called with each write-back."""
        self._watchers = (*self._watchers, watcher)
        try:
            yield
        finally:
            self._watchers = tuple(other for other in self._watchers if other != watcher)

    def notify(self, written: WriteBackBatch) -> None:
        for watcher in self._watchers:
            watcher(written)


observers = WriteBackObservers()
