"""The kernels that are compiled ahead of time, and those whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from falqon_fx.kernels.grouped_outer.launch import signatures
from falqon_fx.kernels.grouped_outer.spec import GroupedOuterSpec
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel

_made = partial(GroupedOuterSpec.for_rank, low_dtype="bfloat16", out_dtype="float32")
_of_a = partial(_made, wide_dtype="e4m3", gather=True, store="slowest")
_of_b = partial(_made, wide_dtype="bfloat16", gather=False, store="fastest")


def ahead(architecture: int) -> Iterator[GroupedOuterSpec]:
    """dL/dA of rows that are gathered and of sorted ones, and dL/dB, for ranks up to 64."""
    if architecture < FP8:
        return
    for rank in (16, 64):
        yield from (_of_a(rank), _of_a(rank, gather=False), _of_b(rank))


GOLDEN = (_of_a(16), _of_b(16))
KERNEL = Kernel(
    GroupedOuterSpec,
    signatures,
    ahead,
    GOLDEN,
    narrow=frozenset({"grouped_outer"}),
    bytewise=frozenset({"grouped_outer"}),
)
