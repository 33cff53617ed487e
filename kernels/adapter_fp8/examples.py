"""The casts of adapters in FP8 that are compiled ahead of time, and the source that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

from falqon_fx.kernels.adapter_fp8.launch import signatures
from falqon_fx.kernels.adapter_fp8.spec import AdapterFp8Spec
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.spec import CASTS, InputDtype, Sizes

_made = partial(AdapterFp8Spec.for_rank, scale="pow2", cast="hardware")
LAYER = _made(64, "float32", adapters=7)


def ahead(architecture: int) -> Iterator[tuple[AdapterFp8Spec, Sizes]]:
    """Adapters in float32 of ranks up to 128, and in bfloat16 from 17 to 64; beside fixed ones, of
    which a b has 17 columns or more.
    """
    if architecture < FP8:
        return
    for rank, adapters in product((16, 64, 128), CASTS):
        yield _made(rank, "float32", adapters=adapters), "aligned"
        if rank == 16:
            yield _made(rank, "float32", adapters=adapters), "rank"
        if rank == 64:  # with 16 columns casts from bfloat16 would spill
            yield _made(rank, "bfloat16", adapters=adapters), "aligned"
    dtypes: tuple[InputDtype, ...] = ("float32", "bfloat16")
    for rank, dtype, adapters in product((64, 128), dtypes, CASTS):
        made = _made(rank, dtype, adapters=adapters, fixed="bfloat16")
        yield made, "aligned"
        if rank == 64:
            yield made, "rank"


def unaligned(spec: AdapterFp8Spec) -> dict[Sizes, str]:
    """The parameters that are no multiples of 16."""
    return {"rank": r"rank\d|fixed_rank\d|count\d"}


GOLDEN = (
    replace(LAYER, adapters=2),
    _made(64, "float32", adapters=1, fixed="bfloat16"),
)
# The conditions on α, of one row of a tile, change hands byte by byte.
KERNEL = Kernel(
    AdapterFp8Spec, signatures, ahead, GOLDEN, unaligned, bytewise=frozenset({"cast_b"})
)
