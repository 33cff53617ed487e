"""The write-backs that are compiled ahead of time, and those whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from falqon_fx.kernels.hardware import cast_mode
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.spec import Sizes
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


def ahead(architecture: int) -> Iterator[tuple[UpdateSpec, Sizes]]:
    """The default rows, with a base weight in bfloat16 and without, and the public code's without:
    whole ones and pieces. Addresses and sizes stand in a table: no parameter has any.
    """
    shapes: list[dict[str, Any]] = [
        {"rows": 1, "width": 4096, "num_warps": 8},
        {"rows": 1, "width": 2048, "num_warps": 4},
        {"rows": 4, "width": 1024, "num_warps": 4, "loop": True},
    ]
    public_code = replace(TENSOR, drop=True, applied_dtype="float32")
    bases: list[dict[str, Any]] = [
        {"base_dtype": "none"},
        {"base_dtype": "bfloat16", "base_aligned": True},
    ]
    cast = cast_mode(architecture)
    for shape, rank in product(shapes, (16, 64)):
        for base in bases:
            yield replace(ROW, cast=cast, rank=rank, **shape, **base), "aligned"
        if "loop" not in shape:  # it would spill
            yield replace(public_code, cast=cast, rank=rank, **shape), "aligned"


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
