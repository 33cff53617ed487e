"""What a write-back did, for those who watch it (`falqon_fx.watch`); else nothing is computed.

The update op runs as Python in every compiled graph, so watching needs no other graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from falqon_fx.numerics import E4M3, FP8_MAX, decode_fp8


@dataclass(frozen=True)
class Written:
    """One batch of G sites of one shape, k rows of each.

    Attributes:
        applied: the sites' state tensors, by which they are known.
        step: int64 [G], each site's count of optimizer steps.
        rows, worth: [G, k], the rows chosen and which of them were written.
        asked: float32 [G, k, in], scaling · ΔB · Â.
        old, value: float32 [G, k, in], W's rows before, and old + asked.
        code, scale: what was written, uint8 [G, k, in] and float32 [G, k or 1, 1].
        score: [G, out], Σ|B - applied| of each row before the write.
        remains: [G, k], the same of the chosen rows after it.
    """

    applied: list[Tensor]
    step: Tensor
    rows: Tensor
    worth: Tensor
    asked: Tensor
    old: Tensor
    value: Tensor
    code: Tensor
    scale: Tensor
    score: Tensor
    remains: Tensor

    def measures(self) -> dict[str, Tensor]:
        """Float32 [G] each, named as the fields of `falqon_fx.report.Audit`; on the device.

        Rows that were not written ask for nothing and keep what they had: they add 0 to each norm.
        """
        mask = self.worth[..., None]
        count = (self.worth.sum(-1) * self.asked.shape[-1]).clamp(min=1)
        kept = decode_fp8(self.code, self.scale, self.old.dtype) - self.old
        size = self.code & 0x7F  # without the sign
        zero = (size == 0) & (self.value != 0) & mask
        chosen = self.score.gather(-1, self.rows)
        left = self.score.sum(-1) - (chosen - self.remains).where(self.worth, 0.0).sum(-1)
        clamped = (self.value * self.scale.reciprocal()).abs() > FP8_MAX[E4M3]
        return {
            "asked": _norm(self.asked),
            "kept": _norm(kept),
            "lost": _norm(kept - self.asked),
            "clamped": (clamped & mask).sum((1, 2)),
            "pending": left,
            "saturated": ((size == 0x7E) & mask).sum((1, 2)) / count,
            "underflowed": zero.sum((1, 2)) / count,
        }


def _norm(value: Tensor) -> Tensor:
    flat = value.flatten(1)
    return torch.bmm(flat[:, None], flat[:, :, None]).flatten().sqrt()  # vectorised on CPU


class Audience:
    """Those who are told of each write-back. An op gets tensors alone, so there is one for all
    models in the process; a watcher tells its own sites by ``Written.applied``.
    """

    def __init__(self) -> None:
        self._watchers: tuple[Callable[[Written], None], ...] = ()

    def __bool__(self) -> bool:
        return bool(self._watchers)

    @contextmanager
    def joined_by(self, watcher: Callable[[Written], None]) -> Iterator[None]:
        """While this is open, ``watcher`` is called with each write-back."""
        self._watchers = (*self._watchers, watcher)
        try:
            yield
        finally:
            self._watchers = tuple(other for other in self._watchers if other != watcher)

    def tell(self, written: Written) -> None:
        for watcher in self._watchers:
            watcher(written)


audience = Audience()
