"""What sites share: a base weight, and an adapter's casts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from falqon_fx.passes.terms import Param


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
