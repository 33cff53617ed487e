"""How much of adapters in FP8 a GPU has clamped, by the base weight that they are added to.

Kernels add to a count on the device. Nobody waits for it: it is copied behind a call now and then,
and read when the next copy is due.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from falqon_fx.errors import one_line

AGAIN = (
    "The next compilation (torch.compiler.reset() brings it about) gives the site its adapter in "
    'bfloat16; with several processes set adapter_dtype="bfloat16".'
)
_EVERY = 256  # calls between two looks; at first they double


class ClampedCount:
    """The count of one base weight, int32 [1] on its device."""

    def __init__(self, device: torch.device) -> None:
        pinned = device.type == "cuda"
        with torch.inference_mode(False):
            self.count = torch.zeros(1, dtype=torch.int32, device=device)
            self._seen = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self._said = False

    def look(self, path: str) -> None:
        """Warn once, if there was any when this was called last."""
        if not self._said and int(self._seen):
            self._said = True
            warnings.warn(
                f"falqon: the adapter of {one_line(path)} (or of a block like it) is so large "
                f'beside its base weight that adapter_dtype="fp8" clamps some of it ('
                f"{int(self._seen)} elements so far). falqon_fx.adapters(model) counts them, by "
                f"site, as .saturated. {AGAIN}",
                stacklevel=2,
            )
        self._seen.copy_(self.count, non_blocking=True)

    def __int__(self) -> int:
        """The number since the start; waits for the device."""
        return int(self.count)


class Looks:
    """When a graph's counts are looked at: in calls 1, 2, 4, ... and in every 256th."""

    def __init__(self) -> None:
        self._calls = 0

    def due(self, count: Tensor) -> bool:
        """Whether it is time, in the call that asks; never while a graph is captured."""
        self._calls += 1
        if self._calls & (self._calls - 1) and self._calls % _EVERY:
            return False
        return not (count.is_cuda and torch.cuda.is_current_stream_capturing())
