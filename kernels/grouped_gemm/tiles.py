"""Which tiles a GEMM over experts takes on which architecture. All compile without spills (`make
kernels`); none has been timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from falqon_fx.kernels.grouped_gemm.spec import GroupedGemmSpec
from falqon_fx.kernels.hardware import FP8, reads_columns
from falqon_fx.kernels.spec import Fp8Format, InputDtype, columns_of


class Tile(NamedTuple):
    """Block sizes of one program and how it is run."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# An expert of 128 gets 256 of 4096 tokens at top 8: high tiles would be half empty.
_FORWARD = {
    120: Tile(64, 128, 64, 4, 3),
    100: Tile(128, 128, 128, 8, 3),
    90: Tile(64, 128, 128, 4, 3),
    0: Tile(64, 128, 64, 4, 3),
}
_BACKWARD = {100: Tile(128, 128, 128, 8, 3), 90: Tile(64, 128, 64, 4, 3), 0: Tile(64, 64, 64, 4, 3)}
_INTERPRETED = Tile(16, 32, 32, 4, 1)


def is_compiled(rank: int, sizes: Sequence[int], dtype: str) -> bool:
    """Whether kernels have been compiled ahead for such a stack of experts: in bfloat16, with
    ``sizes`` of W that are multiples of 16, and a rank that is such or below 16, up to 64.
    """
    of_rank = rank <= 16 or rank in range(32, 65, 16)
    return of_rank and dtype == "bfloat16" and not any(size % 16 for size in sizes)


def grouped_spec(
    architecture: int,
    k: int,
    *,
    rank: int = 0,
    gather: bool = False,
    backward: bool = False,
    x: Fp8Format | InputDtype | None = None,
    dtype: InputDtype = "bfloat16",
    a_dtype: InputDtype = "bfloat16",
    columns: int | None = None,
) -> GroupedGemmSpec:
    """O, or dL/dx with ``backward``, on sm_``architecture`` (0: the interpreter) for sums over
    ``k`` elements; ``columns`` where there are few, as of O_A and D. Where tensor cores don't read
    W by columns, its bytes and those of dL/dO are decoded in the kernel.
    """
    table = _BACKWARD if backward else _FORWARD
    tile = table.get(architecture, table[0]) if architecture else _INTERPRETED
    if backward and dtype == "float32" and architecture:  # results leave by more registers
        tile = tile._replace(n=min(tile.n, 64), k=64, warps=8)
    if columns is not None:
        tile = tile._replace(n=min(tile.n, columns_of(columns)))
    of_x = x or ("e5m2" if backward else "e4m3")
    is_fp8 = of_x in ("e4m3", "e5m2")
    native = architecture >= FP8 and (not backward or reads_columns(architecture))
    return GroupedGemmSpec(
        x=of_x,
        operands="float32" if not architecture else _operands(is_fp8, native),
        w_scale="none" if backward else "row",
        out_dtype=dtype,
        a_dtype=a_dtype,
        layout="kn" if backward else "nk",
        gather=gather,
        extra=columns_of(rank) if rank else 0,
        even_k=k % tile.k == 0,
        block_m=tile.m,
        block_n=tile.n,
        block_k=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _operands(is_fp8: bool, native: bool) -> Literal["fp8", "bfloat16", "native"]:
    if not is_fp8:
        return "native"
    return "fp8" if native else "bfloat16"
