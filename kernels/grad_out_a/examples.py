"""The kernels of dL/dO_A that are compiled ahead of time, and the one whose source is kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from falqon_fx.kernels.grad_out_a.launch import signatures
from falqon_fx.kernels.grad_out_a.spec import GradOutASpec
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.spec import MAX_SIBLINGS, Sizes

_made = partial(GradOutASpec.for_ranks, grad_dtype="bfloat16", a_dtype="bfloat16")


def ahead(architecture: int) -> Iterator[tuple[GradOutASpec, Sizes]]:
    """Up to three adapters of bfloat16 models, one of others."""
    for rank in (16, 64, 128, 256):
        for adapters in range(1, MAX_SIBLINGS + 1):
            yield _made([rank] * adapters), "aligned"
            if rank == 16:
                yield _made([rank] * adapters), "rank"
    for grad_dtype in ("float16", "float32"):
        for rank in (16, 64):
            yield _made([rank], grad_dtype=grad_dtype, a_dtype="float32"), "aligned"


def unaligned(spec: GradOutASpec) -> dict[Sizes, str]:
    """The parameters that are no multiples of 16."""
    return {"rank": r"rank\d|b\d_(stride|ptr)|d_stride"}


GOLDEN = (_made([64] * 2),)
KERNEL = Kernel(GradOutASpec, signatures, ahead, GOLDEN, unaligned)
