"""The kernels of adapters' columns that are compiled ahead of time, and whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import get_args

from falqon_fx.config import Granularity
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.spec import MAX_SIBLINGS, Fp8Format, InputDtype, Sizes
from falqon_fx.kernels.tails.launch import signatures
from falqon_fx.kernels.tails.spec import RARE, TailsSpec

_forward = partial(
    TailsSpec.for_ranks, direction="forward", x="e4m3", scales="row", a_dtype="bfloat16"
)
_backward = partial(
    TailsSpec.for_ranks, direction="backward", x="e5m2", scales="row", a_dtype="bfloat16"
)


def ahead(architecture: int) -> Iterator[tuple[TailsSpec, Sizes]]:
    """Up to three adapters of bfloat16 models, 64 columns of one of others. No
    other kernel does what these do: whoever launches them takes one of these.
    """
    if architecture < FP8:
        return
    for spec in _usual():
        yield spec, "aligned"
        if spec.rank <= RARE:
            yield spec, "rank"
    for spec in _rare():
        yield spec, "aligned"


def _usual() -> Iterator[TailsSpec]:
    for adapters, rank in product(range(1, MAX_SIBLINGS + 1), (16, 64, 128)):
        yield _forward([rank] * adapters)
        for stores in (True, False):
            yield _backward([rank] * adapters, stores=stores)


def _rare() -> Iterator[TailsSpec]:
    scales: tuple[Granularity, ...] = get_args(Granularity)
    dtypes: tuple[InputDtype, ...] = ("bfloat16", "float32")
    for of, a_dtype in product(scales, dtypes):
        yield _forward([RARE], scales=of, a_dtype=a_dtype)
        for x, stores in product(get_args(Fp8Format), (True, False)):
            yield _backward([RARE], x=x, stores=stores, scales=of, a_dtype=a_dtype)


def unaligned(spec: TailsSpec) -> dict[Sizes, str]:
    """The parameters that are no multiples of 16."""
    return {"rank": r"(rank|before)\d|y_stride"}


GOLDEN = (_forward([64] * 2), _backward([64]), replace(_backward([64]), stores=False))
# Backward decodes dL/dO on its way from shared memory into registers, two bytes at a time.
# For other ranks than multiples of 16, sm_90 then takes both in smaller pieces, too.
KERNEL = Kernel(
    TailsSpec,
    signatures,
    ahead,
    GOLDEN,
    unaligned,
    narrow=frozenset({"backward_tails"}),
    bytewise=frozenset({"backward_tails"}),
)
