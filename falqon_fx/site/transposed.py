"""Copies of W that are kept beside it: Wᵀ for dL/dx, and W with room for b.

W is constant, and so is its copy: it goes with the graphs that read it and with the `Entry` of W,
of which there is a new one whenever W has other bytes, or lies elsewhere. With update="rows" W is
part of W', and the copy goes with its memory: behind each update the rows that were written become
columns of it (`falqon_fx.kernels.transpose.kept`). Whoever writes the bytes of a W in another way,
as loading a state dict does, calls `forget`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from falqon_fx.site.base import Entry


@dataclass(frozen=True)
class Kept:
    """The copy of one W: bytes [in, out], rows at multiples of 16.

    With update="rows", as of when it is: ``seen`` is `MergedAdapter.writes` [out] and ``stamp``
    `MergedAdapter.counters` as they were when the copy was last up to date.
    """

    turned: Tensor
    seen: Tensor
    stamp: Tensor


_kept: weakref.WeakKeyDictionary[Any, dict[int, Kept]] = weakref.WeakKeyDictionary()  # by memory


def find(weight: Tensor) -> Kept | None:
    """The copy for a W, or for the W' that begins with it."""
    return _kept.get(weight.untyped_storage(), {}).get(weight.data_ptr())


def keep(weight: Tensor, turned: Tensor, counters: int) -> Kept:
    """Keeps ``turned``, a copy as of now; the next update of rows can't tell since when, and makes
    it anew.
    """
    seen = torch.zeros(weight.shape[0], dtype=torch.int32, device=weight.device)
    stamp = torch.full((counters,), -1, dtype=torch.int64, device=weight.device)
    kept = Kept(turned, seen, stamp)
    _kept.setdefault(weight.untyped_storage(), {})[weight.data_ptr()] = kept
    return kept


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy of the W of some entries, all in one ``tensor``: transposed, or with room for b."""

    kind: str
    of: list[weakref.ref[Entry]]
    tensor: Tensor


# By the entry of the first W.
_copies: weakref.WeakKeyDictionary[Entry, weakref.WeakSet[Copy]] = weakref.WeakKeyDictionary()
Held = weakref.WeakKeyDictionary[Entry, Copy]  # what a graph reads


def together(
    entries: Sequence[Entry],
    kind: str,
    shape: tuple[int, int],
    make: Callable[[], Tensor],
    held: Held,
) -> Tensor:
    """The copies of a kind of the W of some entries, in one of this ``shape``, of whose columns the
    last are for whoever is about to read them; made where there is none yet. Graphs share it, and
    it goes with the last that has ``held`` it.
    """
    known, own = _copies.setdefault(entries[0], weakref.WeakSet()), [*map(weakref.ref, entries)]
    alike = (c for c in known if c.of == own and (c.kind, c.tensor.shape) == (kind, shape))
    copy = next(alike, None)
    if copy is None:
        # It outlives the call: no inference tensor, no graph.
        with torch.inference_mode(False), torch.no_grad():
            copy = Copy(kind, own, make())
        known.add(copy)
    held[entries[0]] = copy
    return copy.tensor


def forget() -> None:
    """Drops all copies; whoever needs one next makes it anew."""
    _kept.clear()
    _copies.clear()
