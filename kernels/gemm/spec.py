"""`GemmSpec`: one FP8 GEMM whose right operand lies in several pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from falqon_fx.config import Accumulation, Granularity
from falqon_fx.kernels.spec import (
    Fp8Format,
    InputDtype,
    KernelSpec,
    check_literals,
    check_powers_of_two,
)

# What the multiply instruction gets. "fp8": the bytes themselves (sm_89 and newer). "bfloat16" and
# "float32": the bytes decoded in the kernel, exactly, for GPUs without FP8 and the interpreter.
# "float16": FP8 widened, exactly, by the instruction that sm_89 and newer have for it, beside W in
# NVFP4. "int8": integers, whose sums are int32; the interpreter takes them as "float32", and adds
# up integers all the same.
Operands = Literal["fp8", "int8", "float16", "bfloat16", "float32"]
Format = Literal[Fp8Format, "int8"]
Memory = Literal["pointer", "tma"]
# How the right operand lies: "nk" row by row of the output's columns (W and Â in forward, Wᵀ in
# backward), "kn" the other way round (W as stored, in backward).
Layout = Literal["nk", "kn"]
WeightScale = Literal["tensor", "row", "none"]


@dataclass(frozen=True)
class GemmSpec(KernelSpec):
    """Y_g [n, rows_g] = (x · W_gᵀ) ⊙ s_x ⊙ s_W,g + left_g · right_gᵀ + bias_g, for pieces g.

    x [n, K] and W_g [rows_g, K] are FP8, or both INT8. The pieces are what one GEMM computes beside
    each other: the output O and the adapter's O_A of a site, or those of several sites that share
    x. The last ``a_pieces`` of ``pieces`` are stored side by side in one output of ``a_dtype``, the
    others in outputs of their own in ``out_dtype``. Each piece starts its own column of tiles.

    In backward of sites that share x, ``k_pieces`` > 1 such products are added up before the rest,
    Σ_s (x_s · W_sᵀ) ⊙ s_x,s, each with its own K.

    ``extra`` is 0, or the padded largest rank of the terms left_g · right_gᵀ (O_A · bᵀ in forward,
    D · Â in backward). With ``tail`` they are FP8 like x and W, and more of K: of what the scales
    multiply. ``block_scaled`` multiplies by the instruction for MXFP8, with scales of 1. ``bias``
    is "none" or the dtype of the biases. ``even_k`` says that block_k divides K. ``packed`` says
    that W is NVFP4 (`falqon_fx.site.nvfp4`), and the kernel decodes it tile by tile.

    Raises ValueError for a value outside its `Literal`, a size that is not a power of two, or a
    combination that the template does not have.
    """

    template: ClassVar[str] = "gemm"

    x: Format
    operands: Operands
    accumulation: Accumulation
    x_scale: Granularity
    w_scale: WeightScale
    out_dtype: InputDtype
    a_dtype: InputDtype
    pieces: int
    a_pieces: int
    bias: Literal["none", "float32", "bfloat16", "float16"]
    extra: int
    layout: Layout
    memory: Memory
    persistent: bool
    even_k: bool
    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 8
    num_stages: int = 3
    k_pieces: int = 1
    tail: bool = False
    block_scaled: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "block_m", "block_n", "block_k", "group_m", "num_warps")
        if not 0 <= self.a_pieces <= self.pieces or self.pieces < 1:
            raise ValueError(f"a_pieces={self.a_pieces} of pieces={self.pieces}")
        if self.extra and (self.extra < 16 or self.extra & (self.extra - 1)):
            raise ValueError(f"extra={self.extra}: expected 0 or a power of two from 16")
        if self.extra and self.a_pieces:
            raise ValueError("extra: O_A must be there before the launch that adds to O")
        if (self.x == "int8") != (self.operands == "int8") and (
            self.x != "int8" or self.operands != "float32"
        ):
            raise ValueError(f"x={self.x!r}: operands={self.operands!r} are others")
        if self.x == "int8" and (self.tail or self.k_pieces != 1):
            raise ValueError("x='int8': one product, of all of K")
        if self.block_scaled and self.operands != "fp8":
            raise ValueError("block_scaled: the instruction takes FP8")
        if (self.operands == "float16") > self.packed:
            raise ValueError("operands='float16': only beside W in NVFP4")
        if self.packed and (
            self.operands in ("fp8", "int8")
            or self.x == "int8"
            or self.tail
            or self.a_pieces
            or self.memory != "pointer"
            or not self.even_k
            or (self.block_k if self.layout == "nk" else self.block_n) < 64
        ):
            raise ValueError("packed: decoded products of W alone, by pointers, 64 weights a row")
        if self.tail and (self.extra < 32 or self.k_pieces != 1 or self.layout != "nk"):
            raise ValueError("tail: one product, of 32 columns and more, row by row")
        if self.layout == "kn" and self.pieces != 1:
            raise ValueError("layout='kn': one piece, whose rows lie one stride apart")
        if self.k_pieces != 1 and (self.memory, self.pieces, self.w_scale) != (
            "pointer",
            1,
            "none",
        ):
            raise ValueError("k_pieces: one output, by pointers, scales of W in those of x")
        if self.accumulation == "promoted" and self.operands != "fp8":
            raise ValueError("accumulation='promoted': only FP8 sums need it")

    @property
    def name(self) -> str:
        flags = "".join(
            f"_{text}"
            for text, on in (
                ("promoted", self.accumulation == "promoted"),
                (f"bias_{self.bias}", self.bias != "none"),
                (f"{'t' if self.tail else 'r'}{self.extra}", self.extra > 0),
                (f"k{self.k_pieces}", self.k_pieces > 1),
                ("mx", self.block_scaled),
                ("nvfp4", self.packed),
                ("persistent", self.persistent),
                ("evenk", self.even_k),
            )
            if on
        )
        return (
            f"{self.template}_{self.x}_{self.operands}_{self.x_scale}_{self.w_scale}_"
            f"{self.out_dtype}_{self.a_dtype}_{self.pieces - self.a_pieces}y{self.a_pieces}a_"
            f"{self.layout}_{self.memory}{flags}_"
            f"{self.block_m}x{self.block_n}x{self.block_k}_g{self.group_m}"
            f"_w{self.num_warps}_s{self.num_stages}"
        )

    @property
    def dtypes(self) -> list[InputDtype]:
        """The dtype of each output: one a piece, but that O_A of all adapters is one."""
        of_a = [self.a_dtype] if self.a_pieces else []
        return [self.out_dtype] * (self.pieces - self.a_pieces) + of_a

    @property
    def serves(self) -> str:
        """What the kernel is for, in words."""
        if self.w_scale == "none" or self.layout == "kn" or self.x == "e5m2":
            return "dL/dx = q(dL/dO) · W"
        y = self.pieces - self.a_pieces
        parts = [f"O of {y} site{'s' * (y > 1)}"] * (y > 0) + ["O_A"] * (self.a_pieces > 0)
        return " and ".join(parts) + (" that share x" if max(y, self.a_pieces) > 1 else "")
