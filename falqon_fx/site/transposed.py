"""Wᵀ kept beside W for dL/dx, where transpose="store" asks for it.

A copy is made when dL/dx first asks for it, and lives as long as the memory of its W. W is
constant, and so is the copy. With update="rows" W is part of W'; behind each update the rows that
were written become columns of the copy (`falqon_fx.kernels.transpose.kept`). Whoever writes the
bytes of a W in another way, as loading a state dict does, calls `forget`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


def forget() -> None:
    """Drops all copies; the next dL/dx makes them anew."""
    _kept.clear()
