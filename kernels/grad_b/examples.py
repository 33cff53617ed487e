"""The kernels of dL/dB that are compiled ahead of time, and the one whose source is kept."""

from __future__ import annotations

from collections.abc import Iterator

from falqon_fx.kernels.grad_b.launch import signatures
from falqon_fx.kernels.grad_b.spec import GradBSpec
from falqon_fx.kernels.kernel import Kernel


def ahead(architecture: int) -> Iterator[GradBSpec]:
    """Ranks from 16 to 256; a float16 model."""
    for rank in (16, 64, 128, 256):
        yield GradBSpec.for_rank(rank, grad_dtype="bfloat16", a_dtype="bfloat16", b_dtype="float32")
    yield GradBSpec.for_rank(64, grad_dtype="float16", a_dtype="float32", b_dtype="float32")


GOLDEN = (GradBSpec.for_rank(64, grad_dtype="bfloat16", a_dtype="bfloat16", b_dtype="float32"),)
KERNEL = Kernel(GradBSpec, signatures, ahead, GOLDEN, four_warps=frozenset({"add_up"}))
