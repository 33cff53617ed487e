"""Specs of what backward needs beside `GemmSpec`: the transpose of W, and dL/dB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .spec import InputDtype, KernelSpec, check_choices, check_powers_of_two


@dataclass(frozen=True)
class TransposeSpec(KernelSpec):
    """The transpose of a byte matrix, one ``block`` × ``block`` tile a program.

    Bytes alone: a store of transposed FP8 values comes out wrong on some GPUs (triton#11111).
    """

    template: ClassVar[str] = "transpose"

    block: int = 128
    num_warps: int = 8

    def __post_init__(self) -> None:
        check_powers_of_two(self, "block", "num_warps")

    @property
    def name(self) -> str:
        return f"{self.template}_{self.block}_w{self.num_warps}"


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
        check_choices(
            self,
            {
                "grad_dtype": InputDtype,
                "a_dtype": InputDtype,
                "b_dtype": InputDtype,
                "operands": Literal["native", "float32"],
            },
        )
        check_powers_of_two(self, "rank", "block_m", "block_k", "num_warps")
        if self.rank < 16:
            raise ValueError(f"rank={self.rank}: tensor cores take at least 16 columns")

    @property
    def name(self) -> str:
        return (
            f"{self.template}_{self.grad_dtype}_{self.a_dtype}_{self.b_dtype}_{self.operands}_"
            f"r{self.rank}_{self.block_m}x{self.block_k}_w{self.num_warps}_s{self.num_stages}"
        )
