"""The kernels of dL/dB, dL/dA that are compiled ahead of time, and those whose source is kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from falqon_fx.kernels.adapter_grads.launch import signatures
from falqon_fx.kernels.adapter_grads.spec import AdapterGradsSpec
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.spec import MAX_SIBLINGS, Sizes

_made = partial(
    AdapterGradsSpec.for_ranks, grad_dtype="bfloat16", a_dtype="bfloat16", out_dtype="float32"
)


def ahead(architecture: int) -> Iterator[tuple[AdapterGradsSpec, Sizes]]:
    """Up to three adapters of bfloat16 models, with gradients in float32 or bfloat16; one of
    others.
    """
    made = partial(_made, fp8=architecture >= FP8)
    for train_a in (True, False):
        for adapters, rank in product(range(1, MAX_SIBLINGS + 1), (16, 64, 128, 200)):
            ranks = [rank, *[1] * (adapters - 1)]
            for out_dtype in ("float32", "bfloat16"):
                spec = made(ranks, train_a=train_a, out_dtype=out_dtype)
                yield spec, "aligned"
                if rank == 16:
                    yield spec, "rank"
        # Of float32 the 16 columns of a small rank are read in pieces too small: those are ATen's.
        for grad_dtype, rank in (("float16", 16), ("float16", 64), ("float32", 64)):
            spec = made([rank], train_a=train_a, grad_dtype=grad_dtype, a_dtype="float32")
            yield spec, "aligned"


def unaligned(spec: AdapterGradsSpec) -> dict[Sizes, str]:
    """The parameters that are no multiples of 16."""
    return {"rank": r"(rank|begin)\d|[ad]_(stride|ptr)"}


GOLDEN = (_made([64] * 2), _made([64], train_a=False))
# On sm_100 the x of float16 models, which is multiplied as float32, is read byte by byte.
KERNEL = Kernel(
    AdapterGradsSpec,
    signatures,
    ahead,
    GOLDEN,
    unaligned,
    four_warps=frozenset({"add_up"}),
    bytewise=frozenset({"partial_a"}),
)
