"""The casts of adapters that are compiled ahead of time, and the one whose source is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from falqon_fx.kernels.adapter_cast.launch import signatures
from falqon_fx.kernels.adapter_cast.spec import AdapterCastSpec
from falqon_fx.kernels.hardware import cast_mode
from falqon_fx.kernels.kernel import Kernel

LAYER = AdapterCastSpec(
    input_dtype="float32", b_dtype="bfloat16", scale="pow2", cast="hardware", adapters=7
)


def ahead(architecture: int) -> Iterator[AdapterCastSpec]:
    """A Llama layer's seven adapters, in float32 and bfloat16, and one alone."""
    made = replace(LAYER, cast=cast_mode(architecture))
    yield made
    yield replace(made, input_dtype="bfloat16")
    yield replace(made, adapters=1)
    yield replace(made, input_dtype="float16", b_dtype="float32", scale="amax")


GOLDEN = (replace(LAYER, adapters=2),)
# A scale a row: one element of each A.
KERNEL = Kernel(AdapterCastSpec, signatures, ahead, GOLDEN)
