"""The kernels of dL/dB, dL/dA that are compiled ahead of time, and those whose source is kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from falqon_fx.kernels.adapter_grads.launch import signatures
from falqon_fx.kernels.adapter_grads.spec import AdapterGradsSpec
from falqon_fx.kernels.kernel import Kernel

_made = partial(
    AdapterGradsSpec.for_ranks, grad_dtype="bfloat16", a_dtype="bfloat16", out_dtype="float32"
)


def ahead(architecture: int) -> Iterator[AdapterGradsSpec]:
    """Ranks from 16 to 256 of one adapter, of q, k, v and of gate, up; a float16 model."""
    for rank in (16, 64, 128, 256):
        yield _made([rank])
    for rank in (16, 64):
        yield _made([rank] * 3)
        yield _made([rank] * 2)
    yield _made([64], train_a=False)
    yield _made([64] * 3, train_a=False)
    yield AdapterGradsSpec.for_ranks(
        [64], grad_dtype="float16", a_dtype="float32", out_dtype="float32"
    )


GOLDEN = (_made([64] * 2), _made([64], train_a=False))
KERNEL = Kernel(AdapterGradsSpec, signatures, ahead, GOLDEN, four_warps=frozenset({"add_up"}))
