"""How much of an adapter adapter_dtype="fp8" has clamped in earlier calls.

A step only counts, on its device. Whoever compiles may wait for the count: a site some of whose
adapter was clamped gets it in bfloat16 from then on, alone of its graph. Processes that compute one
model together keep what they have, as each would count something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from falqon_fx._compat import is_fake
from falqon_fx.ops.fp8_adapter import clamped
from falqon_fx.passes.scope import Scope, attribute
from falqon_fx.passes.terms import Param


class Saturation:
    """The counts of a graph's adapters, found by the B that is among its ``inputs``."""

    def __init__(self, root: Scope, inputs: Sequence[Any]) -> None:
        placeholders = root.gm.graph.find_nodes(op="placeholder")
        self._gm, self._inputs = root.gm, dict(zip(placeholders, inputs, strict=False))

    def __call__(self, scope: Scope, lora_b: Param) -> int:
        if distributed.is_available() and distributed.is_initialized():
            return 0
        value: Any = lora_b.value
        if lora_b.node is not None:
            outer = scope.outer(lora_b.node)
            reads = outer.op == "get_attr"
            value = attribute(self._gm, str(outer.target)) if reads else self._inputs.get(outer)
        known = isinstance(value, Tensor) and not is_fake(value) and not value.is_meta
        with torch.inference_mode(False):
            return clamped.of(value) if known else 0
