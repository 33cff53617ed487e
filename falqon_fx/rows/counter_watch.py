"""Warns once of rows of B that held NaN or Inf, and once of those that were too large, which both
were not written; raises for a stale W or A.

The counters live on the device. They are copied to the host without waiting, and looked at in the
next call: one step late at most, no synchronization.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError, named
from falqon_fx.site.record import NONFINITE, STALE, TOO_LARGE

_PROBLEMS = {
    NONFINITE: (
        "held NaN or Inf at an update and were not written into W'. See "
        "MergedAdapter.nonfinite_rows"
    ),
    TOO_LARGE: (
        "were not written into W': they would be NaN or Inf there, or so large that FP8 would "
        "round away what W was, which prepare() freed. They stay pending (are dropped with "
        'pending="drop"). See MergedAdapter.too_large_rows and MergedAdapter.flush'
    ),
}


class CounterWatch:
    """One compiled graph's view of the counters of its sites, which lie at ``paths``."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._copy: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        self._warned: set[int] = set()  # of these counters

    def copy_counters(self, sites: Sequence[Tensor]) -> None:
        """Start copying the counters of a call's sites to the host."""
        counters = torch.stack(list(sites))
        if counters.device.type == "cuda":
            self._copy = counters.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._copy = counters

    def check(self) -> None:
        """Warn about what the last copy shows.

        Raises:
            FalqonError: W or A changed in a way that only the device could see.
        """
        if self._copy is None or (self._event is not None and not self._event.query()):
            return
        seen, self._copy = self._copy, None
        if seen[:, STALE].any():
            raise FalqonError(
                self._named(seen[:, STALE]),
                "its base weight or lora_A was changed through .data while compiled, or another "
                "adapter was activated after prepare()",
                "Write it in place (copy_); after prepare(), call falqon_fx.restore(model) first",
            )
        for counter, problem in _PROBLEMS.items():
            rows = int(seen[:, counter].sum())
            if rows and counter not in self._warned:
                self._warned.add(counter)
                warnings.warn(
                    f"falqon: {rows} rows of lora_B of {self._named(seen[:, counter])} {problem}; "
                    "lower the learning rate or clip gradients.",
                    stacklevel=3,
                )

    def _named(self, count: Tensor) -> str:
        """The sites whose count is not zero; of many the first."""
        paths = [self._paths[i] for i in count.nonzero().flatten().tolist()]
        return named(paths)
