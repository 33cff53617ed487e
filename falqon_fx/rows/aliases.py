"""Hands each call its own alias of a site's state, so that autograd can count writes rightly.

The update op declares that it writes W', and W' is saved for backward. With one tensor object, a
second forward pass before the backward pass of the first would look like an error even where
nothing was written. Aliases share the memory but not autograd's version counter. When B moved, W'
really changes under a backward pass that is still to come: then the aliases given out before are
marked as written, and that backward pass fails loudly, as it would in the original model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from falqon_fx._compat import version
from falqon_fx.site.numerics import as_operand

_REMEMBERED = 64  # forward passes between two optimizer steps that are still watched


class Aliases:
    """The aliases given out since A or B last moved, by B."""

    def __init__(self) -> None:
        self._by_b: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def detached_views(
        self, lora_a: Tensor, lora_b: Tensor, tensors: Sequence[Tensor]
    ) -> list[Tensor]:
        """Fresh aliases of a site's state for one call; the weight comes as E4M3."""
        now = (version(lora_a), version(lora_b))
        before, given = self._by_b.get(lora_b, (now, deque(maxlen=_REMEMBERED)))
        if now != before:
            for alias in given:
                torch.autograd.graph.increment_version(alias)
            given.clear()
        fresh = [as_operand(tensors[0].data), *(tensor.data for tensor in tensors[1:])]
        given.append(fresh[0])
        self._by_b[lora_b] = (now, given)
        return fresh

    def settle(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """The graph itself wrote B, behind its update of W' (it zeroes it with pending="drop"):
        that is no step.
        """
        _, given = self._by_b[lora_b]
        self._by_b[lora_b] = ((version(lora_a), version(lora_b)), given)


aliases = Aliases()
