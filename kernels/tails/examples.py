"""The kernels of adapters' columns that are compiled ahead of time, and whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.tails.launch import signatures
from falqon_fx.kernels.tails.spec import TailsSpec

_forward = partial(
    TailsSpec.for_ranks, direction="forward", x="e4m3", scales="row", a_dtype="bfloat16"
)
_backward = partial(
    TailsSpec.for_ranks, direction="backward", x="e5m2", scales="row", a_dtype="bfloat16"
)


def ahead(architecture: int) -> Iterator[TailsSpec]:
    """Ranks from 16 to 128 of one adapter, of gate, up and of q, k, v; other formats and scales."""
    if architecture < FP8:
        return
    for adapters in (1, 2, 3):
        for rank in (32, 64, 128):
            yield _forward([rank] * adapters)
        for rank in (16, 32, 64, 128):
            yield _backward([rank] * adapters)
    for made in (_forward, _backward):
        yield made([64], scales="tensor")
        yield made([64], a_dtype="float32")
    yield _backward([64], x="e4m3")
    yield _backward([64], stores=False)


GOLDEN = (_forward([64] * 2), _backward([64]), replace(_backward([64]), stores=False))
# Backward decodes dL/dO on its way from shared memory into registers, two bytes at a time.
KERNEL = Kernel(TailsSpec, signatures, ahead, GOLDEN, bytewise=frozenset({"backward_tails"}))
