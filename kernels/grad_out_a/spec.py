"""`GradOutASpec`: dL/dO_A of adapters that read the same x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from falqon_fx.kernels.spec import (
    MAX_RANK,
    InputDtype,
    KernelSpec,
    check_literals,
    check_powers_of_two,
    columns_of,
)


@dataclass(frozen=True)
class GradOutASpec(KernelSpec):
    """D_j = dL/dO_j · b_j [n, r_j] of ``adapters`` adapters j, side by side.

    ``rank`` is the padded largest rank. ``operands`` is "native" (the tensor cores take
    ``a_dtype``, which b and D have) or "float32" (widened first, for the interpreter). ``block_m``
    counts tokens, ``block_k`` columns of dL/dO.

    Raises ValueError for ranks beyond 256.
    """

    template: ClassVar[str] = "grad_out_a"

    grad_dtype: InputDtype
    a_dtype: InputDtype
    operands: Literal["native", "float32"]
    adapters: int
    rank: int
    block_m: int = 32
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "rank", "block_m", "block_k", "num_warps")
        if self.adapters < 1 or not 16 <= self.rank <= MAX_RANK:
            raise ValueError(f"{self}: an adapter or more, 16 to {MAX_RANK} columns")

    @classmethod
    def for_ranks(
        cls,
        ranks: Sequence[int],
        *,
        grad_dtype: InputDtype,
        a_dtype: InputDtype,
        operands: Literal["native", "float32"] = "native",
    ) -> GradOutASpec:
        """The spec for adapters of these ranks; float32 products take three times the registers."""
        wide = a_dtype == "float32"
        return cls(
            grad_dtype=grad_dtype,
            a_dtype=a_dtype,
            operands=operands,
            adapters=len(ranks),
            rank=columns_of(max(ranks)),
            block_m=64 if max(ranks) > 128 else 32,
            block_k=64 if wide or max(ranks) > 64 else 128,
            num_warps=8 if max(ranks) > 128 else 4,
            num_stages=2 if wide else 3,
        )

    @property
    def name(self) -> str:
        return (
            f"{self.template}_{self.grad_dtype}_{self.a_dtype}_{self.operands}_{self.adapters}d_"
            f"r{self.rank}_{self.block_m}x{self.block_k}_w{self.num_warps}_s{self.num_stages}"
        )
