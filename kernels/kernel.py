"""What the folder of a kernel says of itself, for whoever goes through all kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from falqon_fx.kernels.spec import KernelSpec

S = TypeVar("S", bound=KernelSpec)


@dataclass(frozen=True)
class Kernel(Generic[S]):
    """One template. Its source may hold several functions; a step launches each in turn.

    Attributes:
        spec: the class of its specs.
        signatures: argument types of each function of a spec, for `aot.compile_ahead`.
        ahead: the specs that may run on sm_80, 89 and so on; `make kernels` compiles them.
        golden: the specs whose sources are kept in tests/kernels/golden.
        four_warps: functions that are launched with four warps whatever the spec says.
        narrow: functions that may do without 16-byte loads.
        bytewise: functions that may load and store single bytes.
    """

    spec: type[S]
    signatures: Callable[[S], Mapping[str, Mapping[str, str]]]
    ahead: Callable[[int], Iterable[S]]
    golden: tuple[S, ...]
    four_warps: frozenset[str] = frozenset()
    narrow: frozenset[str] = frozenset()
    bytewise: frozenset[str] = frozenset()

    def warps(self, spec: S, function: str) -> int:
        """The warps that a function of ``spec`` is launched with."""
        return 4 if function in self.four_warps else int(spec.fields["num_warps"])
