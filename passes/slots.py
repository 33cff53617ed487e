"""What sites share: a base weight, and an adapter's casts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor, fx

from falqon_fx._compat import hint
from falqon_fx.kernels.spec import aligned, rank_of
from falqon_fx.passes.match.dataflow import NO_CORRECTION, Correction
from falqon_fx.passes.terms import Param
from falqon_fx.report.data import Transposes, WithRoom


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
class CopySlot(ABC):
    """The bases of sites of whose W a copy is kept, all in one, with ``room`` columns behind them.
    ``name`` is that of the kind.
    """

    bases: tuple[BaseSlot, ...]
    room: int
    name: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """That of the copy, which is FP8."""

    @property
    def nbytes(self) -> int:
        rows, columns = map(hint, self.shape)
        return rows * columns

    @abstractmethod
    def make(self, weights: Sequence[Tensor]) -> Tensor:
        """The copy of the FP8 weights of its bases, with whatever is in the room."""

    def is_of(self, bases: Iterable[object], room: int) -> bool:
        """Whether it is that of a group of sites."""
        return self.room == room and [*map(id, bases)] == [*map(id, self.bases)]


class TurnedSlot(CopySlot):
    """[W_1ᵀ | W_2ᵀ ... | room for Âᵀ], each from a multiple of 16 columns on."""

    name = "turned"

    @property
    def shape(self) -> tuple[int, int]:
        columns = sum(aligned(base.out) for base in self.bases) + self.room
        return self.bases[0].features, columns

    def make(self, weights: Sequence[Tensor]) -> Tensor:
        from falqon_fx.kernels.transpose.kept import transposed_together, with_room

        return with_room(transposed_together(weights), self.room)


class JoinedSlot(CopySlot):
    """[W_1; W_2; ... | room for b], each row filled up to a multiple of 16 columns."""

    name = "joined"

    @property
    def shape(self) -> tuple[int, int]:
        return sum(base.out for base in self.bases), aligned(self.bases[0].features) + self.room

    def make(self, weights: Sequence[Tensor]) -> Tensor:
        from falqon_fx.kernels.products.in_k import with_room_for

        return with_room_for(weights, self.room)


S = TypeVar("S", bound=CopySlot)


def find(slots: Iterable[S], bases: Sequence[object], room: int) -> S | None:
    """What is kept of some bases, of what is kept."""
    return next((slot for slot in slots if slot.is_of(bases, room)), None)


@dataclass(frozen=True)
class Turned:
    """What is kept transposed, and what a report says of it."""

    slots: tuple[TurnedSlot, ...] = ()
    report: Transposes | None = None


@dataclass(frozen=True)
class Joined:
    """The W that are kept with room for adapters, and what a report says of them."""

    slots: tuple[JoinedSlot, ...] = ()
    report: WithRoom | None = None


@dataclass(frozen=True)
class AdapterSlot:
    """(A, B, scaling) of a graph, whose casts all sites share that use it, with the ``correction``
    that is cast with it. ``wide``: b is float32. ``base``: in the units of whose scale b is cast to
    FP8. ``fixed``: it is no adapter of the user's, and stands for the cast error of W.
    """

    path: str
    lora_a: Param
    lora_b: Param
    scaling: float
    wide: bool
    base: BaseSlot | None
    fixed: bool
    correction: Correction = NO_CORRECTION

    @property
    def kind(self) -> tuple[bool, ...]:
        """What adapters share that are cast by one op."""
        own = self.correction
        return self.wide, self.base is not None, own.error is not None, own.columns is not None

    @property
    def rank(self) -> int:
        """The rows of Â."""
        own = self.correction
        return rank_of(int(self.lora_a.value.shape[0]), own.rank, own.width)

    @property
    def width(self) -> int:
        """The columns of b, with those of W_S."""
        return self.rank + self.correction.width
