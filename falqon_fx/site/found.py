"""What earlier calls of a graph found, so that a call like one of them asks the registry nothing.

A call is like another if its parameters lie where those lay, and the base weights (or the bytes of
prepared ones) have their versions, dtypes, shapes, strides and, on a CPU, the `sample` of their
contents: all that the registry itself goes by (`falqon_fx.site.base`), but that two tensors made of
one foreign memory, as by `torch.from_numpy` of one array, pass for one.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from falqon_fx import _compat
from falqon_fx.kernels.cpu import samples
from falqon_fx.site.base import Entry, bases
from falqon_fx.site.looks import looks_like, sample, waits


@dataclass(frozen=True)
class Parameters:
    """The parameters that a call brings: ``owners``, W or the bytes of a prepared W, one of each
    base; the ``scales`` of prepared ones; A and B of each adapter.
    """

    owners: list[Tensor]
    scales: list[Tensor]
    adapters: list[Tensor]

    def addresses(self) -> tuple[int, ...]:
        return tuple([t.data_ptr() for t in (*self.owners, *self.scales, *self.adapters)])

    def looks(self) -> list[Any]:
        """What else a write or a change of layout would show in."""
        return [
            _compat.versions(self.owners),
            _compat.versions(self.scales),
            [t.dtype for t in self.owners],
            [t.shape for t in self.owners],
            [t.stride() for t in self.owners],
        ]


@dataclass(frozen=True)
class _Found:
    """What a call found, none of which is kept alive here."""

    looks: list[Any]
    entries: list[weakref.ref[Entry]]
    changes: int  # of the adapters known to the registry, when this call's had been noted
    samples: samples.Samples | None
    memories: list[weakref.ref[Any]]

    def unchanged(self, owners: list[Tensor], entries: list[Entry]) -> bool:
        """Whether W looks the same wherever looking costs no wait for a device."""
        if self.samples is not None:
            return self.samples.unchanged()
        return all(looks_like(w, entry.seen) for w, entry in zip(owners, entries, strict=True))


class FoundByAddress:
    """What the calls of one graph found, by the addresses of their parameters while all of these
    live: blocks and models share a graph.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], _Found] = {}

    def get(self, given: Parameters) -> list[Entry] | None:
        """The entries of a call like an earlier one; None where the registry is to be asked."""
        found = self._found.get(given.addresses())
        if found is None or found.changes != bases.changes or found.looks != given.looks():
            return None
        entries = [entry for ref in found.entries if (entry := ref()) is not None]
        alive = len(entries) == len(found.entries)
        return entries if alive and found.unchanged(given.owners, entries) else None

    def put(self, given: Parameters, looks: list[Any], entries: list[Entry], changes: int) -> None:
        """Remember what a call found whose parameters had these ``looks`` before it asked."""
        addresses, found = given.addresses(), self._found
        if 0 in addresses:  # no memory to tell them apart by
            return

        def forget(_: object) -> None:
            found.pop(addresses, None)

        tensors = (*given.owners, *given.scales, *given.adapters)
        pairs = [
            (sample(owner.detach()), entry.seen)
            for owner, entry in zip(given.owners, entries, strict=True)
            if not waits(owner)
        ]
        found[addresses] = _Found(
            looks,
            [weakref.ref(entry) for entry in entries],
            changes,
            samples.Samples(pairs) if not pairs or samples.library() is not None else None,
            [weakref.ref(tensor.untyped_storage(), forget) for tensor in tensors],
        )
