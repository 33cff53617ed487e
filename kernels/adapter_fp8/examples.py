"""The casts of adapters in FP8 that are compiled ahead of time, and the source that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from falqon_fx.kernels.adapter_fp8.launch import signatures
from falqon_fx.kernels.adapter_fp8.spec import AdapterFp8Spec
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel

LAYER = AdapterFp8Spec(input_dtype="float32", scale="pow2", cast="hardware", adapters=7, rank=64)


def ahead(architecture: int) -> Iterator[AdapterFp8Spec]:
    """A Llama layer's seven adapters of ranks from 16 to 128, in float32 and bfloat16, and one."""
    if architecture < FP8:
        return
    for rank in (16, 32, 64, 128):
        yield replace(LAYER, rank=rank)
    yield replace(LAYER, input_dtype="bfloat16")
    yield replace(LAYER, adapters=1)
    yield replace(LAYER, input_dtype="float16", scale="amax")


GOLDEN = (replace(LAYER, adapters=2),)
# The conditions on α, of one row of a tile, change hands byte by byte.
KERNEL = Kernel(AdapterFp8Spec, signatures, ahead, GOLDEN, bytewise=frozenset({"cast_b"}))
