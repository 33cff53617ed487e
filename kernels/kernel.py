"""What the folder of a kernel says of itself, for whoever goes through all kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.spec import KernelSpec, Sizes

S = TypeVar("S", bound=KernelSpec)


def _all_aligned(spec: KernelSpec) -> Mapping[Sizes, str]:
    return {}


@dataclass(frozen=True)
class Kernel(Generic[S]):
    """One template. Its source may hold several functions; a step launches each in turn.

    Attributes:
        spec: the class of its specs.
        signatures: argument types of each function of a spec, for `aot.compile_ahead`.
        ahead: the specs that may run on sm_80, 89 and so on, with the sizes that they may meet;
            `make kernels` compiles them, and no GPU with FP8 gets others.
        golden: the specs whose sources are kept in tests/kernels/golden.
        unaligned: a pattern of the parameters of a spec that are no multiples of 16 with each kind
            of other sizes.
        four_warps: functions that are launched with four warps whatever the spec says.
        narrow: functions that may do without 16-byte loads.
        bytewise: functions that may load and store single bytes.
    """

    spec: type[S]
    signatures: Callable[[S], Mapping[str, Mapping[str, str]]]
    ahead: Callable[[int], Iterable[tuple[S, Sizes]]]
    golden: tuple[S, ...]
    unaligned: Callable[[S], Mapping[Sizes, str]] = _all_aligned
    four_warps: frozenset[str] = frozenset()
    narrow: frozenset[str] = frozenset()
    bytewise: frozenset[str] = frozenset()

    def warps(self, spec: S, function: str) -> int:
        """The warps that a function of ``spec`` is launched with."""
        return 4 if function in self.four_warps else int(spec.fields["num_warps"])

    def types(self, spec: S, sizes: Sizes) -> dict[str, dict[str, str]]:
        """`signatures` with such sizes."""
        of_all = self.signatures(spec)
        if sizes == "aligned":
            return {function: {**types} for function, types in of_all.items()}
        pattern = re.compile(self.unaligned(spec)[sizes])
        return {
            function: {
                name: kind.removesuffix(":16") if pattern.fullmatch(name) else kind
                for name, kind in types.items()
            }
            for function, types in of_all.items()
        }

    def takes(self, spec: S, sizes: Sizes, architecture: int) -> bool:
        """Whether ``spec`` may run with such sizes on sm_``architecture``: whether its compiled
        code is in the table. There is none of GPUs without FP8, nor of the interpreter (0).
        """
        return architecture < FP8 or (spec, sizes) in _table(self, architecture)


@cache
def _table(kernel: Kernel[Any], architecture: int) -> frozenset[tuple[KernelSpec, Sizes]]:
    return frozenset(kernel.ahead(architecture))
