"""The kernels of dL/dO_A that are compiled ahead of time, and the one whose source is kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from falqon_fx.kernels.grad_out_a.launch import signatures
from falqon_fx.kernels.grad_out_a.spec import GradOutASpec
from falqon_fx.kernels.kernel import Kernel

_made = partial(GradOutASpec.for_ranks, grad_dtype="bfloat16", a_dtype="bfloat16")


def ahead(architecture: int) -> Iterator[GradOutASpec]:
    """Ranks from 16 to 256 of one adapter, of q, k, v and of gate, up; a float16 model."""
    for rank in (16, 64, 128, 256):
        for adapters in (1, 2, 3):
            yield _made([rank] * adapters)
    yield GradOutASpec.for_ranks([64], grad_dtype="float16", a_dtype="float32")


GOLDEN = (_made([64] * 2),)
KERNEL = Kernel(GradOutASpec, signatures, ahead, GOLDEN)
