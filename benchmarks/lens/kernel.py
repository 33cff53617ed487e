"""A Triton kernel of the generated code, by its text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Kernel:
    """A Triton kernel of the generated code: the names of what it is given, which of these it reads
    and writes, and the ops of the graph that it computes, as "aten.mul".
    """

    name: str
    source: str
    arguments: tuple[str, ...]
    reads: set[str]
    writes: set[str]
    ops: set[str] = field(default_factory=set)
    launched: Callable[[Kernel, Sequence[Any]], None] = field(default=lambda kernel, given: None)

    def run(self, *given: Any, **_: Any) -> None:
        self.launched(self, given)

    @property
    def elements(self) -> int:
        """Of the grid that Inductor's kernel goes through; 0 of another."""
        sizes = [int(size) for size in _NUMEL.findall(self.source)]
        return math.prod(sizes) if sizes else 0

    @classmethod
    def of(cls, name: str, source: str) -> Kernel:
        """A kernel by its code. Inductor names what its own kernels read and write; a constexpr
        isn't handed over.
        """
        found = re.search(rf"def {re.escape(name)}\(([^)]*)\)", source)
        assert found is not None, source
        parts = [part.strip() for part in found[1].split(",")]
        names = [re.split("[:=]", part)[0].strip() for part in parts if "constexpr" not in part]
        reads = {name for name in names if name.startswith("in_")}
        return cls(name, source, (*names,), reads, {n for n in names if _WRITTEN.match(n)})


_NUMEL = re.compile(r"^ +(?:[xyz]|r\d_)numel = (\d+)$", re.MULTILINE)
_WRITTEN = re.compile("(in_)?out_")
_OPS = re.compile(r"Original ATen: \[(.*)\]\n(?:#.*\n)*(\w+) = async_compile\.triton\(")


def name_ops(kernels: Mapping[str, Kernel], source: str) -> None:
    """Give each kernel of the generated code ``source`` the ops that Inductor says it computes."""
    for ops, name in _OPS.findall(source):
        kernels[name].ops = {*ops.split(", ")}
