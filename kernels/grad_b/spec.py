"""`GradBSpec`: dL/dB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from falqon_fx.kernels.spec import InputDtype, KernelSpec, check_literals, check_powers_of_two


@dataclass(frozen=True)
class GradBSpec(KernelSpec):
    """dL/dB = scaling · dL/dOᵀ · O_A, split over tokens into partial sums that are added in order.

    ``operands`` is "native" (the tensor cores take ``a_dtype``) or "float32" (widened first, for
    the interpreter). ``rank`` is the padded rank, ``block_m`` counts columns of dL/dO, ``block_k``
    tokens.
    """

    template: ClassVar[str] = "grad_b"

    grad_dtype: InputDtype
    a_dtype: InputDtype
    b_dtype: InputDtype
    operands: Literal["native", "float32"]
    rank: int
    block_m: int = 128
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "rank", "block_m", "block_k", "num_warps")
        if self.rank < 16:
            raise ValueError(f"rank={self.rank}: tensor cores take at least 16 columns")

    @classmethod
    def for_rank(
        cls,
        rank: int,
        *,
        grad_dtype: InputDtype,
        a_dtype: InputDtype,
        b_dtype: InputDtype,
        operands: Literal["native", "float32"] = "native",
    ) -> GradBSpec:
        """The spec for an adapter of ``rank``; float32 products take three times the registers."""
        padded, wide = max(16, 1 << (rank - 1).bit_length()), a_dtype == "float32"
        return cls(
            grad_dtype=grad_dtype,
            a_dtype=a_dtype,
            b_dtype=b_dtype,
            operands=operands,
            rank=padded,
            block_m=64 if padded > 64 or wide else 128,
            block_k=32 if wide else 64,
            num_warps=8 if padded > 64 or wide else 4,
            num_stages=2 if wide else 3,
        )

    @property
    def name(self) -> str:
        return (
            f"{self.template}_{self.grad_dtype}_{self.a_dtype}_{self.b_dtype}_{self.operands}_"
            f"r{self.rank}_{self.block_m}x{self.block_k}_w{self.num_warps}_s{self.num_stages}"
        )
