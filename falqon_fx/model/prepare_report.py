"""What `prepare` tells of what it did."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import printable


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` cast to FP8, what it left and why, and the bytes of the weights it touched.

    Attributes:
        frozen: those of the ``prepared`` layers that have no adapter.
        tokens: how many a calibration has read.
        calibrated: by layer, what is left of W's cast error in its output, compared with a cast to
            nearest, ‖(W - Ŵ - B_c · A_c) · L‖ / ‖(W - dq(q(W))) · L‖; 1 where no ranks were asked
            for.
        bought: by layer, how many ranks and how many channels of x it got.
        config: what ``torch.compile`` is to get: the one given, where exclude="sensitive:8" named
            layers with their paths.
    """

    prepared: tuple[str, ...]
    frozen: tuple[str, ...]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int
    tokens: int = 0
    calibrated: Mapping[str, float] = field(default_factory=dict)
    config: FalqonConfig = field(default_factory=FalqonConfig)
    bought: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{len(self.prepared)} layers prepared, {len(self.frozen)} of them without an adapter: "
            f"{self.bytes_before / 2**20:.1f} MiB of weights became "
            f"{self.bytes_after / 2**20:.1f} MiB"
        ]
        if self.tokens:
            left = statistics.fmean(self.calibrated.values()) if self.calibrated else 1.0
            ranks, channels = (_span([n[i] for n in self.bought.values()]) for i in (0, 1))
            lines.append(
                f"{len(self.calibrated)} layers calibrated on {self.tokens} tokens, with {ranks} "
                f"ranks and {channels} channels of x each: {left:.0%} of the cast error of their "
                "weights is left in their outputs, on average"
            )
            if rest := len(self.prepared) - len(self.calibrated):
                lines.append(f"{rest} layers have no calibration: its batches don't reach them")
        lines += [f"skipped {path}: {reason}" for path, reason in self.skipped.items()]
        return printable("\n".join(lines))


def _span(counts: Sequence[int]) -> str:
    least, most = min(counts, default=0), max(counts, default=0)
    return str(most) if least == most else f"{least} to {most}"


def track(layers: Sequence[Any], show: bool) -> Iterator[Any]:
    """Layers one by one, with a bar."""
    columns = (TextColumn("casting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show, transient=True) as bar:
        yield from bar.track(layers)
