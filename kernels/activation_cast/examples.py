"""The casts that are compiled ahead of time, and those whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from falqon_fx.config import Granularity
from falqon_fx.kernels.activation_cast.launch import signatures
from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.hardware import FP8, cast_mode
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.spec import Fp8Format, Sizes


def ahead(architecture: int) -> Iterator[tuple[ActivationCastSpec, Sizes]]:
    """Both formats with both kinds of scale, on GPUs without FP8; on others Inductor casts."""
    if architecture >= FP8:
        return
    for granularity in get_args(Granularity):
        for fp8 in get_args(Fp8Format):
            spec = ActivationCastSpec.for_width(
                4096,
                input_dtype="bfloat16",
                fp8=fp8,
                granularity=granularity,
                scale="pow2",
                cast=cast_mode(architecture),
            )
            yield spec, "aligned"


GOLDEN = (
    ActivationCastSpec.for_width(4096, input_dtype="bfloat16", granularity="row"),
    ActivationCastSpec.for_width(4096, input_dtype="bfloat16", granularity="tensor", scale="pow2"),
    ActivationCastSpec.for_width(
        32768, input_dtype="float32", fp8="e5m2", granularity="row", scale="pow2", cast="integer"
    ),
    ActivationCastSpec.for_width(
        256, input_dtype="float16", fp8="e4m3", granularity="tensor", cast="integer"
    ),
)
# cast_tiles begins with the partial maxima, 4 KB a program, which come as they come.
KERNEL = Kernel(ActivationCastSpec, signatures, ahead, GOLDEN, narrow=frozenset({"cast_tiles"}))
