"""The kernels that are compiled ahead of time, and those whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from falqon_fx.kernels.grouped_outer.launch import signatures
from falqon_fx.kernels.grouped_outer.spec import GroupedOuterSpec
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.spec import Sizes

_made = partial(GroupedOuterSpec.for_rank, low_dtype="bfloat16", out_dtype="float32")
_of_a = partial(_made, wide_dtype="e4m3", gather=True, store="slowest")
_of_b = partial(_made, wide_dtype="bfloat16", gather=False, store="fastest")


def ahead(architecture: int) -> Iterator[tuple[GroupedOuterSpec, Sizes]]:
    """dL/dA of rows that are gathered and of sorted ones, and dL/dB, of bfloat16 models."""
    if architecture < FP8:
        return
    for rank, out_dtype in product((16, 64), ("float32", "bfloat16")):
        of_a = partial(_of_a, rank, out_dtype=out_dtype)
        for spec in (of_a(), of_a(gather=False), _of_b(rank, out_dtype=out_dtype)):
            yield spec, "aligned"
            if rank == 16:
                yield spec, "rank"


def unaligned(spec: GroupedOuterSpec) -> dict[Sizes, str]:
    """The parameters that are no multiples of 16."""
    return {"rank": "rank"}


GOLDEN = (_of_a(16), _of_b(16))
KERNEL = Kernel(
    GroupedOuterSpec,
    signatures,
    ahead,
    GOLDEN,
    unaligned,
    narrow=frozenset({"grouped_outer"}),
    bytewise=frozenset({"grouped_outer"}),
)
