"""The write-backs that are compiled ahead of time, and those whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from falqon_fx.kernels.hardware import cast_mode
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.update.launch import signatures
from falqon_fx.kernels.update.spec import UpdateSpec

ROW = UpdateSpec(
    b_dtype="float32",
    a_dtype="float32",
    applied_dtype="bfloat16",
    base_dtype="none",
    granularity="row",
    scale="pow2",
    rounding="stochastic",
    drop=False,
    cast="hardware",
    rank=64,
    aligned=True,
    base_aligned=False,
    rows=1,
    width=4096,
    loop=False,
    num_warps=8,
)
TENSOR = replace(ROW, granularity="tensor", scale="amax", rounding="nearest")


def ahead(architecture: int) -> Iterator[UpdateSpec]:
    """Whole rows and pieces of them, with a base weight and without; sm_80 casts by integer
    steps.
    """
    pieces = replace(ROW, rows=4, width=1024, loop=True, num_warps=4)
    for spec in (
        ROW,
        pieces,
        replace(pieces, base_dtype="bfloat16", base_aligned=True),
        replace(ROW, b_dtype="bfloat16", a_dtype="bfloat16", rank=16),
        replace(TENSOR, drop=True, applied_dtype="float32"),
    ):
        yield replace(spec, cast=cast_mode(architecture))


GOLDEN = (
    replace(ROW, base_dtype="bfloat16", base_aligned=True),
    replace(TENSOR, drop=True, applied_dtype="float32"),
)
# They read addresses and sizes out of a table, or a few numbers a row: 0.2% of a step in all.
SMALL = frozenset({"fingerprint", "score", "select"})
# Which rows fit goes from the threads of a row to all of them as bytes, three times a tile.
KERNEL = Kernel(
    UpdateSpec,
    signatures,
    ahead,
    GOLDEN,
    four_warps=SMALL,
    narrow=SMALL,
    bytewise=frozenset({"write"}),
)
