"""The transposes that are compiled ahead of time, and whose sources are kept."""

from __future__ import annotations

from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.transpose import kept, launch
from falqon_fx.kernels.transpose.spec import StoredSpec, TransposeSpec

KERNEL = Kernel(
    TransposeSpec,
    launch.signatures,
    ahead=lambda architecture: (TransposeSpec(),),
    golden=(TransposeSpec(),),
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
