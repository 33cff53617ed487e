"""`GroupedGemmSpec`: one FP8 GEMM over the rows of all experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from falqon_fx.kernels.spec import (
    MAX_RANK,
    Fp8Format,
    InputDtype,
    KernelSpec,
    check_literals,
    check_powers_of_two,
)


@dataclass(frozen=True)
class GroupedGemmSpec(KernelSpec):
    """Y_e [S_e, N] = (x_e · W_eᵀ) ⊙ s_x ⊙ s_W,e + left_e · right_eᵀ for the rows of each expert e.

    x [n, K] and W_e are FP8, or both of a wider dtype ``x`` (D = dL/dO · B) and without scales.
    ``layout`` says how a W_e lies: "nk" [N, K] (W in forward) or "kn"
    [K, N] (W in backward, as it is stored). With ``gather`` row i of the product reads row
    ``rows[i]`` of x, so that x is cast, and lies in memory, once a token. A tile is of one expert:
    which one, and where its rows begin, stands in a table (`falqon_fx.kernels.grouped_gemm.launch`)
    that a device makes of the routing, and so does the number of tiles, at which the persistent
    programs end.

    ``extra`` is 0, or the padded rank of left [S, r] and right, which lies as the W_e do: [N, r] or
    [r, N]. ``operands`` are what the multiply instruction gets: "fp8" the bytes themselves,
    "bfloat16" and "float32" the bytes decoded in the kernel, exactly, "native" what is no FP8 as it
    is. ``even_k`` says that block_k
    divides K.

    Raises ValueError for a value outside its `Literal`, a size that is not a power of two, or
    operands that are not those of x.
    """

    template: ClassVar[str] = "grouped_gemm"

    x: Fp8Format | InputDtype
    operands: Literal["fp8", "bfloat16", "float32", "native"]
    w_scale: Literal["row", "none"]
    out_dtype: InputDtype
    a_dtype: InputDtype
    layout: Literal["nk", "kn"]
    gather: bool
    extra: int
    even_k: bool
    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "block_m", "block_n", "block_k", "num_warps")
        if self.extra and (not 16 <= self.extra <= MAX_RANK or self.extra & (self.extra - 1)):
            raise ValueError(f"extra={self.extra}: expected 0 or a power of two, 16 to {MAX_RANK}")
        fitting = ("fp8", "bfloat16", "float32") if self.is_fp8 else ("native", "float32")
        if self.operands not in fitting or not (self.is_fp8 or self.w_scale == "none"):
            raise ValueError(f"operands={self.operands!r}, w_scale={self.w_scale!r} of {self.x}")

    @property
    def is_fp8(self) -> bool:
        return self.x in ("e4m3", "e5m2")

    @property
    def name(self) -> str:
        flags = (("gather", self.gather), (f"r{self.extra}", self.extra), ("evenk", self.even_k))
        on = "".join(f"_{text}" for text, said in flags if said)
        return (
            f"{self.template}_{self.x}_{self.operands}_{self.w_scale}_{self.out_dtype}_"
            f"{self.a_dtype}_{self.layout}{on}_{self.block_m}x{self.block_n}x{self.block_k}"
            f"_w{self.num_warps}_s{self.num_stages}"
        )

    @property
    def serves(self) -> str:
        """What the kernel is for, in words."""
        if not self.is_fp8:
            return "D = dL/dO · B of experts"
        return "O, O_A of experts" if self.layout == "nk" else "dL/dx = q(dL/dO) · W of experts"
