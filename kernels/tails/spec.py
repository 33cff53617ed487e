"""`TailsSpec`: the skinny products of adapters that are r more of K of the wide ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from falqon_fx.config import Granularity
from falqon_fx.kernels.gemm.spec import Operands
from falqon_fx.kernels.spec import (
    MAX_TAIL,
    CastMode,
    Fp8Format,
    InputDtype,
    KernelSpec,
    check_literals,
    check_powers_of_two,
    columns_of,
)

RARE = 64  # columns of a launch where formats or scales are rare


def is_usual(
    direction: Literal["forward", "backward"],
    x: Fp8Format,
    scales: Granularity,
    a_dtype: InputDtype,
) -> bool:
    """Whether formats and scales are those of a bfloat16 model with default options."""
    of_x = "e4m3" if direction == "forward" else "e5m2"
    return (x, scales, a_dtype) == (of_x, "row", "bfloat16")


@dataclass(frozen=True)
class TailsSpec(KernelSpec):
    """The skinny products of ``adapters`` adapters j, with the units s_x, s_g of the rows, or one
    of all (``scales``):

    "forward"   O_A,j = t_j ⊙ s_x ⊙ α_j, t_j = q((q(x_j) · Â_jᵀ ⊙ s_x,j ⊙ s_A,j) / (s_x ⊙ α_j))
    "backward"  D_j = (g_j · b_j) ⊙ s_g / α_j, and, where it ``stores``, D'_j = q(g_j · b_j ⊙
                s_A,j / α_j)

    t_j and D'_j are stored as FP8, of the format ``x`` that q(x) and g have, beside these, and what
    is clamped is counted. O_A and D are of ``a_dtype``, to which products are rounded first, as
    they are on a CPU. ``rank`` is the padded largest rank; ``block_m`` counts tokens.

    Raises ValueError for ranks beyond 128: accumulators of 256 columns spill.
    """

    template: ClassVar[str] = "tails"

    direction: Literal["forward", "backward"]
    x: Fp8Format
    operands: Operands
    scales: Granularity
    a_dtype: InputDtype
    adapters: int
    rank: int
    stores: bool
    cast: CastMode
    block_m: int = 64
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "rank", "block_m", "block_k", "num_warps")
        if self.adapters < 1 or not 16 <= self.rank <= MAX_TAIL:
            raise ValueError(f"{self}: an adapter or more, 16 to {MAX_TAIL} columns")
        if self.direction == "backward" and self.operands == "fp8":
            raise ValueError(f"{self}: tensor cores would want b the other way round")
        if self.direction == "forward" and not self.stores:
            raise ValueError(f"{self}: O_A is made of t")

    @classmethod
    def for_ranks(
        cls,
        ranks: Sequence[int],
        *,
        direction: Literal["forward", "backward"],
        x: Fp8Format,
        scales: Granularity,
        a_dtype: InputDtype,
        stores: bool = True,
        interpreted: bool = False,
    ) -> TailsSpec:
        """The spec for adapters of these ranks. Backward's b lies as the tensor cores of sm_90
        don't take FP8: bytes are decoded to bfloat16, which holds them.
        """
        fp8 = direction == "forward"
        wide, rank = a_dtype == "float32" and not fp8, columns_of(max(ranks))
        if fp8:  # bytes of fewer columns would be stored one by one
            rank = max(rank, 32)
        if not is_usual(direction, x, scales, a_dtype):
            rank = RARE  # one kernel for all ranks
        return cls(
            direction=direction,
            x=x,
            operands="float32" if interpreted else "fp8" if fp8 else "bfloat16",
            scales=scales,
            a_dtype=a_dtype,
            adapters=len(ranks),
            rank=rank,
            stores=stores,
            cast="integer" if interpreted else "hardware",
            block_m=128 if fp8 and rank == 32 else 64,
            block_k=64 if wide or rank > 64 else 128,
            num_warps=8 if rank > 64 and not fp8 else 4,
        )

    @property
    def name(self) -> str:
        stores = "_stores" if self.stores else ""
        return (
            f"{self.template}_{self.direction}_{self.x}_{self.operands}_{self.scales}_"
            f"{self.a_dtype}_{self.cast}_{self.adapters}t_r{self.rank}{stores}_"
            f"{self.block_m}x{self.block_k}_w{self.num_warps}_s{self.num_stages}"
        )
