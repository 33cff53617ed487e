"""The transposes that are compiled ahead of time, and whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator

from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.spec import Sizes
from falqon_fx.kernels.transpose import kept, launch
from falqon_fx.kernels.transpose.spec import StoredSpec, TransposeSpec


def ahead(architecture: int) -> Iterator[tuple[TransposeSpec, Sizes]]:
    """W of up to three sites and Â of their adapters; their rows may be any number."""
    for matrices in range(1, kept.MOST + 1):
        yield TransposeSpec(matrices, architecture >= FP8), "aligned"
        yield TransposeSpec(matrices, architecture >= FP8), "rank"


def unaligned(spec: TransposeSpec) -> dict[Sizes, str]:
    """The parameters that are no multiples of 16."""
    return {"rank": r"rows\d|y_stride"}


KERNEL = Kernel(
    TransposeSpec,
    launch.signatures,
    ahead,
    (TransposeSpec(), TransposeSpec(2, fp8=False)),
    unaligned,
)
# Both of its functions read addresses and sizes out of a table; a step copies few columns of bytes.
STORED = Kernel(
    StoredSpec,
    kept.signatures,
    ahead=lambda architecture: ((StoredSpec(), "aligned"),),
    golden=(StoredSpec(),),
    narrow=frozenset({"refresh", "seal"}),
    bytewise=frozenset({"refresh"}),
)
