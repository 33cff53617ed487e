"""What one launch takes: a product with whole waves of tiles, or a pass over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from falqon_fx.cost.step.figures import Figures

Part = Literal[
    "products",
    "adapter",
    "casts",
    "transposes",
    "sums",
    "dequantize",
    "attention",
    "elementwise",
    "head",
    "optimizer",
]
Tile = tuple[int, int, float]


@dataclass(frozen=True)
class Launch:
    """A kernel of a step.

    Attributes:
        seconds: its time on the GPU, with the gap to the next kernel.
        reads, writes: bytes, by the sizes of its arguments.
        kernels: what the host launches for it: attention's backward is three kernels, whose time
            is counted once.
        keeps: bytes of a copy of W that is there for it.
    """

    part: Part
    name: str
    seconds: float
    reads: float
    writes: float
    kernels: int = 1
    keeps: float = 0.0


@dataclass(frozen=True)
class Timer:
    """Times launches by a card's figures."""

    figures: Figures

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """A library's, with the rate of each."""
        f = self.figures
        return ((128, 256, 1.0), (128, 128, f.tile_128.value), (64, 128, f.tile_64.value))

    @property
    def own_tiles(self) -> tuple[Tile, ...]:
        """The tiles of our products with an epilogue, whose rate is that of 128 x 128."""
        f = self.figures
        return ((128, 128, 1.0), (64, 128, f.tile_64.value / f.tile_128.value))

    def moving(
        self, part: Part, name: str, reads: float, writes: float, share: float = 1.0
    ) -> Launch:
        """A kernel that its bytes bound, at a share of the bandwidth."""
        work = (reads + writes) / (self.figures.bandwidth.value * share)
        return Launch(part, name, self._whole(work), reads, writes)

    def fused(self, name: str, reads: float, writes: float) -> Launch:
        """A kernel that Inductor makes of norms, sums and the like."""
        return self.moving("elementwise", name, reads, writes)

    def thin(self, part: Part, name: str, reads: float, writes: float) -> Launch:
        """A product with a thin side."""
        return self.moving(part, name, reads, writes, self.figures.thin.value)

    def timed(self, part: Part, name: str, work: float, reads: float, writes: float) -> Launch:
        """A kernel that computes for ``work`` seconds, or moves its bytes for longer."""
        moving = (reads + writes) / self.figures.bandwidth.value
        return Launch(part, name, self._whole(max(work, moving)), reads, writes)

    def product(
        self,
        name: str,
        n: int,
        k: float,
        columns: Sequence[int],
        operand: int,
        rate: float,
        *,
        own: bool = False,
        part: Part = "products",
    ) -> Launch:
        """[n, k] · [k, Σ columns] in whole waves of the best tiles, with operands of ``operand``
        bytes and a bf16 result. Each of the ``columns`` starts its own tile.
        """
        reads = operand * k * (n + sum(columns))
        busy = self._busy(1, n, k, columns, rate, own)
        return self.timed(part, name, busy, reads, 2 * n * sum(columns))

    def grouped(
        self,
        name: str,
        rows: int,
        experts: int,
        k: int,
        out: int,
        operand: int,
        rate: float,
        *,
        own: bool = False,
    ) -> Launch:
        """The same of as many rows for each expert, times its [k, out]: tiles end with an expert's
        rows.
        """
        busy = self._busy(experts, ceil(rows / experts), k, [out], rate, own)
        reads = operand * k * (rows + experts * out)
        return self.timed("products", name, busy, reads, 2 * rows * out)

    def _busy(
        self, groups: int, n: int, k: float, columns: Sequence[int], rate: float, own: bool
    ) -> float:
        """What whole waves of the best tiles take, were they one processor's."""
        f, times = self.figures, []
        for high, wide, share in self.own_tiles if own else self.tiles:
            tiles = groups * ceil(n / high) * sum(ceil(c / wide) for c in columns)
            waves = ceil(tiles / int(f.processors.value))
            times.append(waves * high * wide * 2 * k / (rate * share))
        return min(times) * f.processors.value

    def more(self, launch: Launch, reads: float = 0, writes: float = 0) -> Launch:
        """A launch that moves so much more."""
        made = replace(launch, reads=launch.reads + reads, writes=launch.writes + writes)
        moving = (made.reads + made.writes) / self.figures.bandwidth.value
        return replace(made, seconds=max(made.seconds, self._whole(moving)))

    def again(self, part: Part, name: str, reads: float, writes: float, more: float) -> Launch:
        """A kernel that moves ``more`` bytes than its arguments have: it reads what it writes."""
        timed = self.moving(part, name, reads + more, writes)
        return replace(timed, reads=reads)

    def skinny(self, name: str, n: int, k: int, ranks: int, rank: int) -> Launch:
        """Our x·Aᵀ of ``ranks`` adapters: a program for 64 tokens of each, two a processor, which
        goes through all of K.
        """
        rounds = ceil(ceil(n / 64) * ranks / (2 * self.figures.processors.value))
        work = rounds * ceil(k / 128) * self.figures.skinny_step.value
        return self.timed("adapter", name, work, n * k + rank * ranks * k, 2 * n * rank * ranks)

    def _whole(self, work: float) -> float:
        return work + self.figures.ramp.value + self.figures.gap.value
