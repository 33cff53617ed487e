"""What a calibration adds to adapters: rows behind A, columns behind B, all of them constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from falqon_fx.kernels.spec import POINTER, aligned, rank_of

FixedDtype = Literal["none", "bfloat16", "float32", "float16"]
# What kernels are compiled ahead for: a calibration of a bfloat16 model keeps its dtype.
FIXED: tuple[FixedDtype, ...] = ("none", "bfloat16")

Name = Literal["fixed_a", "fixed_b", "columns", "fixed_rank", "count"]
NAMES: tuple[Name, ...] = ("fixed_a", "fixed_b", "columns", "fixed_rank", "count")


class Fixed(NamedTuple):
    """What a calibration has made for adapters, one of each adapter or none at all, which counts as
    no rows and columns. Behind A_j of each adapter j stand the rows of A_c [r_c, in], behind
    scaling_j · B_j the columns of B_c [out, r_c], both with zeros up to a multiple of 16; behind b
    the ``columns`` W_S [out, c].
    """

    error_a: Sequence[Tensor] = ()
    error_b: Sequence[Tensor] = ()
    columns: Sequence[Tensor] = ()

    def of(self, adapters: Sequence[int]) -> Fixed:
        """That of some of the adapters."""
        return Fixed(*([column[j] for j in adapters if column] for column in self))

    def rank(self, rank: int) -> int:
        """The rows of Â of an adapter of that rank that has all of this."""
        error, columns = (sum(t.shape[1] for t in part) for part in (self.error_b, self.columns))
        return rank_of(rank, error, columns)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [tensor for column in self for tensor in column]

    def ranks(self, adapters: int) -> list[int]:
        """The rows behind A of each of so many adapters."""
        return [len(a) for a in self.error_a] or [0] * adapters

    def counts(self, adapters: int) -> list[int]:
        """The columns of W_S of each of so many adapters."""
        return [t.shape[1] for t in self.columns] or [0] * adapters

    def rows(self, lora_a: Sequence[Tensor]) -> list[int]:
        """The rows of each Â: with what is behind A up to a multiple of 16 (`rank_of`)."""
        if not self.tensors:
            return [*map(len, lora_a)]
        return [aligned(len(a) + r) for a, r in zip(lora_a, self.ranks(len(lora_a)), strict=True)]

    def in_fp8(self, lora_a: Sequence[Tensor]) -> list[int]:
        """The columns of each b in FP8: those beside O_A, and those of W_S, up to multiples of 16
        each.
        """
        counts = self.counts(len(lora_a))
        return [aligned(r) + aligned(c) for r, c in zip(self.rows(lora_a), counts, strict=True)]

    def arguments(self, adapters: int, names: Sequence[Name] = NAMES) -> list[list[Any]]:
        """What a kernel takes of each adapter: A_c, B_c, W_S, rc, c. Where there is none of one, a
        tensor that is there stands in its place; with none at all a kernel takes nothing.
        """
        if not self.tensors:
            return [[]] * adapters
        there = [self.tensors[0]] * adapters
        found: dict[Name, Sequence[Any]] = {
            "fixed_a": [t.contiguous() for t in self.error_a or there],
            "fixed_b": [t.contiguous() for t in self.error_b or there],
            "columns": [t.contiguous() for t in self.columns or there],
            "fixed_rank": self.ranks(adapters),
            "count": self.counts(adapters),
        }
        return [[found[name][j] for name in names] for j in range(adapters)]

    def check(
        self, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], dtype: FixedDtype, what: str
    ) -> None:
        """Raises ValueError where a kernel for fixed tensors of ``dtype`` doesn't take these."""
        adapters = len(lora_a)
        ranks, counts = self.ranks(adapters), self.counts(adapters)
        fitting = (
            (self.error_a, [(rank, a.shape[1]) for rank, a in zip(ranks, lora_a, strict=False)]),
            (self.error_b, [(len(b), rank) for rank, b in zip(ranks, lora_b, strict=False)]),
            (self.columns, [(len(b), count) for count, b in zip(counts, lora_b, strict=False)]),
        )
        halves = bool(self.error_a) != bool(self.error_b)
        if halves or any(len(of) not in (0, adapters) for of, _ in fitting):
            raise ValueError(f"{what}: fixed tensors of some of {adapters} adapters")
        for of, shapes in fitting:
            if of and [tuple(t.shape) for t in of] != shapes:
                raise ValueError(f"{what}: fixed {[tuple(t.shape) for t in of]}, not {shapes}")
        wanted = set() if dtype == "none" else {getattr(torch, dtype)}
        if {t.dtype for t in self.tensors} != wanted:
            raise ValueError(f"{what}: fixed tensors of other dtypes than {dtype}")


NONE_FIXED = Fixed()


def joined(parts: Sequence[Tensor], dim: int, size: int = 0) -> Tensor:
    """The parts one behind the other, in the dtype of the first, with zeros up to ``size``."""
    whole = parts[0]
    if len(parts) > 1:
        whole = torch.cat([part.to(whole.dtype) for part in parts], dim=dim)
    lacking = size - whole.shape[dim]
    return F.pad(whole, [0, lacking] if dim else [0, 0, 0, lacking]) if lacking > 0 else whole


def signature(j: int, dtype: FixedDtype, names: Sequence[Name] = NAMES) -> dict[str, str]:
    """Argument types of `Fixed.arguments` of adapter j: aligned, sizes divisible by 16."""
    if dtype == "none":
        return {}
    sizes = ("fixed_rank", "count")
    types = {f"{name}{j}_ptr": POINTER[dtype] for name in names if name not in sizes}
    return types | {f"{name}{j}": "i32:16" for name in names if name in sizes}
