"""`AdapterGradsSpec`: dL/dB and dL/dA of adapters that read the same x."""

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
class AdapterGradsSpec(KernelSpec):
    """dL/dB_j = scaling_j · dL/dO_jᵀ · O_A,j of ``adapters`` adapters j, and, where ``x_rank``,
    dL/dA_j = (D_j ⊙ s_x)ᵀ · q for x̂ = q · s_x in E4M3.

    Both are split over tokens into partial sums that are added in order. ``rank`` is the padded
    largest rank, ``x_rank`` the padded sum of all ranks, 0 where no A trains. ``operands`` is
    "native" (the tensor cores take ``a_dtype``) or "float32" (widened first, for the interpreter).
    ``fp8``: q comes as FP8, and not as bytes, which the interpreter and GPUs below sm_89 need.
    ``block_m`` counts columns of dL/dO, ``block_x`` those of x, ``block_k`` tokens.

    Raises ValueError for ranks beyond 256.
    """

    template: ClassVar[str] = "adapter_grads"

    grad_dtype: InputDtype
    a_dtype: InputDtype
    out_dtype: InputDtype
    x_scale: Literal["row", "tensor"]
    fp8: bool
    operands: Literal["native", "float32"]
    adapters: int
    rank: int
    x_rank: int
    block_m: int = 128
    block_x: int = 128
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "rank", "block_m", "block_x", "block_k", "num_warps")
        if self.adapters < 1 or self.rank < 16 or self.x_rank & (self.x_rank - 1):
            raise ValueError(f"{self}: tensor cores take at least 16 columns, powers of two")
        if max(self.rank, self.x_rank) > MAX_RANK:
            raise ValueError(f"rank={max(self.rank, self.x_rank)}: at most {MAX_RANK} columns")

    @classmethod
    def for_ranks(
        cls,
        ranks: Sequence[int],
        *,
        grad_dtype: InputDtype,
        a_dtype: InputDtype,
        out_dtype: InputDtype,
        x_scale: Literal["row", "tensor"] = "row",
        train_a: bool = True,
        fp8: bool = True,
        operands: Literal["native", "float32"] = "native",
    ) -> AdapterGradsSpec:
        """The spec for adapters of these ranks; float32 products take three times the registers."""
        rank, wide = columns_of(max(ranks)), a_dtype == "float32"
        # Of as many adapters of the largest rank: few numbers, so that all can be compiled ahead.
        x_rank = min(MAX_RANK, columns_of(rank * len(ranks))) if train_a else 0
        if sum(ranks) > MAX_RANK and train_a:
            raise ValueError(f"ranks {[*ranks]}: at most {MAX_RANK} columns")
        return cls(
            grad_dtype=grad_dtype,
            a_dtype=a_dtype,
            out_dtype=out_dtype,
            x_scale=x_scale,
            fp8=fp8 and train_a,
            operands=operands,
            adapters=len(ranks),
            rank=rank,
            x_rank=x_rank,
            block_m=64 if rank > 64 or wide else 128,
            block_x=64 if x_rank > 64 else 128,
            block_k=32 if wide or len(ranks) > 2 else 64,
            num_warps=8,
            num_stages=2 if wide else 3,
        )

    @property
    def name(self) -> str:
        operands = self.operands + ("_fp8" if self.fp8 else "")
        return (
            f"{self.template}_{self.grad_dtype}_{self.a_dtype}_{self.out_dtype}_{self.x_scale}_"
            f"{operands}_{self.adapters}b_r{self.rank}_x{self.x_rank}_"
            f"{self.block_m}x{self.block_x}x{self.block_k}_w{self.num_warps}_s{self.num_stages}"
        )
