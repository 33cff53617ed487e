"""The casts of adapters that are compiled ahead of time, and the one whose source is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from falqon_fx.kernels.adapter_cast.launch import signatures
from falqon_fx.kernels.adapter_cast.spec import AdapterCastSpec
from falqon_fx.kernels.fixed import FIXED
from falqon_fx.kernels.hardware import cast_mode
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.spec import CASTS, Sizes

LAYER = AdapterCastSpec(
    input_dtype="float32", b_dtype="bfloat16", scale="pow2", cast="hardware", adapters=7
)


def ahead(architecture: int) -> Iterator[tuple[AdapterCastSpec, Sizes]]:
    """Adapters in float32 and bfloat16 of bfloat16 models, alone and beside fixed ones."""
    made = replace(LAYER, cast=cast_mode(architecture))
    for fixed, dtype, adapters in product(FIXED, ("float32", "bfloat16"), CASTS):
        spec = replace(made, fixed=fixed, input_dtype=dtype, adapters=adapters)  # type: ignore[arg-type]
        yield spec, "aligned"
        yield spec, "rank"


def unaligned(spec: AdapterCastSpec) -> dict[Sizes, str]:
    """The parameters that are no multiples of 16."""
    return {"rank": r"rank\d|fixed_rank\d|count\d"}


GOLDEN = (replace(LAYER, adapters=2), replace(LAYER, adapters=1, fixed="bfloat16"))
# A scale a row: one element of each A.
KERNEL = Kernel(AdapterCastSpec, signatures, ahead, GOLDEN, unaligned)
