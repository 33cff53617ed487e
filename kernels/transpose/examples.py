"""The transposes that are compiled ahead of time, and whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator

from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.transpose import kept, launch
from falqon_fx.kernels.transpose.spec import StoredSpec, TransposeSpec


def ahead(architecture: int) -> Iterator[TransposeSpec]:
    """One weight, gate and up, q, k and v."""
    for matrices in (1, 2, 3):
        yield TransposeSpec(matrices, architecture >= FP8)


KERNEL = Kernel(
    TransposeSpec, launch.signatures, ahead, golden=(TransposeSpec(), TransposeSpec(2, fp8=False))
)
# Both of its functions read addresses and sizes out of a table; a step copies few columns of bytes.
STORED = Kernel(
    StoredSpec,
    kept.signatures,
    ahead=lambda architecture: (StoredSpec(),),
    golden=(StoredSpec(),),
    narrow=frozenset({"refresh", "seal"}),
    bytewise=frozenset({"refresh"}),
)
