"""What sites share: a base weight, and an adapter's casts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from falqon_fx.kernels.spec import aligned
from falqon_fx.passes.terms import Param
from falqon_fx.report.data import Transposes


@dataclass(frozen=True)
class BaseSlot:
    """A base weight W of a graph, shared by all sites that use it.

    ``prepared`` are the root's nodes of the bytes, scale and digest that `prepare` made; else W's
    FP8 form is looked up by ``weight`` in each call.
    """

    path: str
    out: int
    features: int
    weight: Param | None
    prepared: tuple[fx.Node, ...] | None


@dataclass(frozen=True)
class TurnedSlot:
    """The bases of sites whose Wᵀ is kept, side by side, with ``room`` columns behind them."""

    bases: tuple[BaseSlot, ...]
    room: int

    @property
    def columns(self) -> int:
        """How many: each W begins at a multiple of 16."""
        return sum(aligned(base.out) for base in self.bases) + self.room

    def is_of(self, bases: Iterable[object], room: int) -> bool:
        """Whether it is that of a group of sites."""
        return self.room == room and [*map(id, bases)] == [*map(id, self.bases)]


@dataclass(frozen=True)
class Turned:
    """What is kept transposed, and what a report says of it."""

    slots: tuple[TurnedSlot, ...] = ()
    report: Transposes | None = None


@dataclass(frozen=True)
class AdapterSlot:
    """(A, B, scaling) of a graph, whose casts all sites share that use it.
    ``wide``: b is float32. ``base``: in the units of whose scale b is cast to FP8. ``fixed``: it is
    no adapter of the user's, and stands for the cast error of W.
    """

    path: str
    lora_a: Param
    lora_b: Param
    scaling: float
    wide: bool
    base: BaseSlot | None
    fixed: bool
