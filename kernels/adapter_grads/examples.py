"""The kernels of dL/dB, dL/dA that are compiled ahead of time, and those whose source is kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from falqon_fx.kernels.adapter_grads.launch import signatures
from falqon_fx.kernels.adapter_grads.spec import AdapterGradsSpec
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel

_made = partial(
    AdapterGradsSpec.for_ranks, grad_dtype="bfloat16", a_dtype="bfloat16", out_dtype="float32"
)


def ahead(architecture: int) -> Iterator[AdapterGradsSpec]:
    """Ranks from 16 to 256 of one adapter, of q, k, v and of gate, up; a float16 model."""
    made = partial(_made, fp8=architecture >= FP8)
    for rank in (16, 64, 128, 256):
        yield made([rank])
    for rank in (16, 64):
        yield made([rank] * 3)
        yield made([rank] * 2)
    yield made([64], train_a=False)
    yield made([64] * 3, train_a=False)
    yield made([64], grad_dtype="float16", a_dtype="float32")


GOLDEN = (_made([64] * 2), _made([64], train_a=False))
KERNEL = Kernel(AdapterGradsSpec, signatures, ahead, GOLDEN, four_warps=frozenset({"add_up"}))
