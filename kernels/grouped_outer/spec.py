"""`GroupedOuterSpec`: sums over the rows of each expert."""

from __future__ import annotations

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
class GroupedOuterSpec(KernelSpec):
    """Y_e = factor · low_eᵀ · wide_e [r, N] over the rows of each expert e, for low [S, r] and wide
    [S, N]: dL/dA_e of D and x̂, and dL/dB_e of O_A and dL/dO, transposed.

    ``wide_dtype`` is "e4m3" for the bytes of x̂, which are decoded in the kernel; with ``gather``
    row i of it is row ``rows[i]`` of what is given. ``store`` is how PEFT lays a gradient out:
    "slowest" [E, r, N] (lora_A, the experts slowest) or "fastest" [N, r, E] (lora_B). ``operands``
    is "native" (the multiply instruction takes ``low_dtype``) or "float32" (for the interpreter).
    ``rank`` is the padded r.

    Raises ValueError for a value outside its `Literal`, a size that is not a power of two, or a
    rank beyond 256.
    """

    template: ClassVar[str] = "grouped_outer"

    low_dtype: InputDtype
    wide_dtype: Literal["e4m3", "float32", "bfloat16", "float16"]
    out_dtype: InputDtype
    operands: Literal["native", "float32"]
    gather: bool
    store: Literal["slowest", "fastest"]
    rank: int
    block_n: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "rank", "block_n", "block_k", "num_warps")
        if not 16 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank={self.rank}: 16 to {MAX_RANK} columns")

    @classmethod
    def for_rank(
        cls,
        rank: int,
        *,
        low_dtype: InputDtype,
        wide_dtype: Literal["e4m3", "float32", "bfloat16", "float16"],
        out_dtype: InputDtype,
        gather: bool,
        store: Literal["slowest", "fastest"],
        interpreted: bool = False,
    ) -> GroupedOuterSpec:
        """The spec for adapters of a rank; float32 products take more registers. Wider tiles spill
        on sm_89 and sm_120.
        """
        return cls(
            low_dtype=low_dtype,
            wide_dtype=wide_dtype,
            out_dtype=out_dtype,
            operands="float32" if interpreted else "native",
            gather=gather,
            store=store,
            rank=columns_of(rank),
            block_k=32 if low_dtype == "float32" or columns_of(rank) > 16 else 64,
            num_warps=8 if columns_of(rank) > 128 else 4,
            num_stages=2 if low_dtype == "float32" else 3,
        )

    @property
    def name(self) -> str:
        return (
            f"{self.template}_{self.low_dtype}_{self.wide_dtype}_{self.out_dtype}_{self.operands}_"
            f"{'gather_' if self.gather else ''}{self.store}_r{self.rank}_"
            f"{self.block_n}x{self.block_k}_w{self.num_warps}_s{self.num_stages}"
        )

    @property
    def serves(self) -> str:
        """What the kernel is for, in words."""
        return "dL/dA of experts" if self.store == "slowest" else "dL/dB of experts"
