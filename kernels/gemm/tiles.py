"""The tuning table: which tiles a GEMM may take on which architecture, and which suit a shape.

All compile without spills (`make kernels`). Which is fastest, the device decides
(`falqon_fx.kernels.products.choice`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from falqon_fx.config import Accumulation, Granularity
from falqon_fx.kernels.gemm.spec import (
    Format,
    GemmSpec,
    Layout,
    Memory,
    Operands,
    WeightScale,
)
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.spec import MAX_RANK, InputDtype, columns_of


@dataclass(frozen=True)
class GemmProblem:
    """Everything about a GEMM that decides which kernels can compute it, and how fast.

    ``rows`` are the columns of each output, those of O_A last (``a_pieces`` of them). ``rank`` is
    the largest rank of the extra term, 0 without one. ``one_tensor``: the weights are consecutive
    rows of one tensor. ``more_k`` is the K of each further product (see `GemmSpec.k_pieces`), and
    ``tail`` says that the extra term is FP8. ``packed`` says that W is NVFP4.
    """

    n: int
    k: int
    rows: tuple[int, ...]
    a_pieces: int
    x: Format
    x_scale: Granularity
    w_scale: WeightScale
    out_dtype: InputDtype
    a_dtype: InputDtype
    bias: Literal["none", "float32", "bfloat16", "float16"] = "none"
    rank: int = 0
    layout: Layout = "nk"
    accumulation: Accumulation = "fast"
    one_tensor: bool = False
    more_k: tuple[int, ...] = ()
    tail: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Tile:
    """Block sizes of one program and how it is run."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    memory: Memory = "pointer"


# By the least architecture that they are for; the extra term takes registers, so it has its own.
_PLAIN = {
    80: (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)),
    120: (
        Tile(128, 128, 128, 8, 3, "tma"),
        Tile(128, 64, 128, 4, 3, "tma"),
        Tile(128, 128, 64, 4, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(128, 64, 64, 4, 3),
    ),
    100: (
        Tile(128, 256, 128, 8, 3, "tma"),
        Tile(128, 128, 128, 8, 4, "tma"),
        Tile(128, 128, 128, 8, 3),
        Tile(128, 64, 128, 4, 4),
    ),
    90: (
        Tile(128, 256, 128, 8, 3, "tma"),
        Tile(256, 128, 128, 8, 3, "tma"),
        Tile(128, 128, 128, 8, 4, "tma"),
        Tile(128, 128, 128, 8, 3),
        Tile(64, 128, 128, 4, 4),
    ),
    0: (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
}
_EXTRA = {
    120: (Tile(128, 128, 128, 8, 3, "tma"), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 8, 3)),
    100: (Tile(128, 128, 128, 8, 3, "tma"), Tile(128, 128, 128, 8, 3)),
    90: (Tile(128, 128, 128, 8, 3, "tma"), Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3)),
    0: (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 8, 3)),
}
# FP8 columns behind the others take few.
_TAIL = {
    90: (
        Tile(128, 256, 128, 8, 3, "tma"),
        Tile(256, 128, 128, 8, 3, "tma"),
        Tile(128, 128, 128, 8, 3, "tma"),
        Tile(128, 256, 128, 8, 3),
        Tile(128, 128, 128, 8, 3),
        Tile(64, 128, 128, 4, 3),
    ),
}
# Several products: a second accumulator.
_SUMMED = {
    100: (Tile(128, 64, 128, 8, 3), Tile(64, 128, 64, 8, 3)),
    90: (Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 8, 3)),
    0: (Tile(64, 128, 64, 8, 3), Tile(64, 64, 64, 8, 3)),
}
# Products of integers. Triton 3.7 has none for sm_75; those of sm_90 and later are the library's.
_INT8 = {
    86: (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
    80: (Tile(128, 128, 128, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)),
    0: (Tile(32, 32, 32, 4, 2),),
}
# W in NVFP4. Two of these programs share a processor, and while one decodes the other multiplies.
_PACKED = Tile(128, 128, 64, 8, 3)
# O_A alone is at most 256 columns wide, so tiles are low, and there are more of them.
_SKINNY = {90: (64, 128, 4, 4), 0: (64, 64, 4, 3)}


def operands(architecture: int, x: Format = "e4m3", packed: bool = False) -> Operands:
    """What the multiply instructions of sm_``architecture`` take (0: the interpreter)."""
    if x == "int8":
        return "int8" if architecture else "float32"
    if architecture < FP8:
        return "bfloat16" if architecture >= 80 else "float32"
    return "float16" if packed else "fp8"


def gemm_specs(problem: GemmProblem, architecture: int) -> list[GemmSpec]:
    """The kernels that can compute ``problem`` on sm_``architecture``, the likeliest first.

    None takes FP8 columns beside sums that are promoted, as sm_90 would serialize its products.
    Where the extra term is of more than 256 columns, or its factors are float32 (beside float16 and
    float32 results), they leave it and the bias out: three products of float32 factors each would
    spill, and on sm_100 take more tensor memory than there is.
    """
    serialized = problem.accumulation == "promoted" and architecture == 90
    if problem.tail and (problem.rank > MAX_RANK or serialized):
        return []
    wide = architecture and problem.a_dtype == "float32" and not problem.tail
    if problem.rank > MAX_RANK or (problem.rank and wide):
        problem = replace(problem, rank=0, bias="none", out_dtype=problem.a_dtype)
    tiles = [tile for tile in _tiles(problem, architecture) if _takes(tile, problem, architecture)]
    return [_spec(problem, tile, architecture) for tile in tiles]


def waves(problem: GemmProblem, spec: GemmSpec, processors: int) -> int:
    """Rounds in which ``processors`` work off the tiles; each piece starts its own column."""
    columns = sum(-(-rows // spec.block_n) for rows in problem.rows)
    return -(-columns * -(-problem.n // spec.block_m) // processors)


def likeliest(specs: list[GemmSpec], problem: GemmProblem, processors: int) -> list[GemmSpec]:
    """``specs`` in the order of the work that their waves are, idle processors included."""
    return sorted(specs, key=lambda s: waves(problem, s, processors) * s.block_m * s.block_n)


def _tiles(problem: GemmProblem, architecture: int) -> tuple[Tile, ...]:
    if problem.x == "int8":
        return _INT8.get(86 if 86 <= architecture < 90 else architecture, ())
    if architecture < 80:
        return (Tile(32, 64, 64, 4, 2) if problem.packed else Tile(32, 32, 32, 4, 2),)
    if problem.packed:
        m, k = 64 if _extra(problem) > 128 else 128, 128 if architecture == 90 else 64
        return (replace(_PACKED, m=m, n=64, k=k) if problem.more_k else _PACKED,)
    if problem.a_pieces == len(problem.rows):
        m, k, warps, stages = _SKINNY[90 if architecture in (90, 100) else 0]
        widest = min(128, columns_of(max(problem.rows)))
        return (Tile(m if architecture != 100 else 128, widest, k, warps, stages),)
    table = _SUMMED if problem.more_k else _EXTRA if problem.rank else _PLAIN
    if problem.more_k[1:] and columns_of(problem.rank) == 128 and architecture == 89:
        return table[0][:1]  # the lower tile would spill
    if problem.tail:
        table = {**_EXTRA, **_TAIL}
    tiles = table[architecture if architecture in table else 0]
    if len({problem.out_dtype, problem.a_dtype}) > 1 and problem.a_pieces:
        tiles = tuple(tile for tile in tiles if tile.n <= 128)  # two stores, two layouts
    if problem.bias != "none" and architecture == 100:
        tiles = tuple(tile for tile in tiles if tile.n <= 128)
    if problem.out_dtype == "float32" and architecture in (90, 100):
        tiles = tuple(
            tile for tile in tiles if tile.n <= 128
        )  # results leave through shared memory
    if problem.accumulation == "promoted" and architecture == 90:
        return tuple(tile for tile in tiles if tile.m * tile.n <= 128 * 128 and tile.warps == 8)
    return tiles


def _takes(tile: Tile, problem: GemmProblem, architecture: int) -> bool:
    """Rows of K start at multiples of 16, else kernels would read byte by byte; a K that no tile
    divides is read by descriptors alone. Rows of NVFP4 start there where 256 divides their length.
    """
    k = (problem.k, *problem.more_k)
    if problem.packed:
        unit, lengths = 256 if architecture else 64, problem.rows if problem.layout == "kn" else k
        return not any(size % unit for size in lengths) and not any(size % tile.k for size in k)
    if architecture >= FP8 and any(size % 16 for size in k):
        return False
    if tile.memory == "tma":
        return problem.one_tensor and not problem.more_k
    return architecture < FP8 or all(size % tile.k == 0 for size in k)


def _extra(problem: GemmProblem) -> int:
    if not problem.rank:
        return 0
    return 32 if problem.tail and problem.rank <= 32 else columns_of(problem.rank)


def _spec(problem: GemmProblem, tile: Tile, architecture: int) -> GemmSpec:
    kind = operands(architecture, problem.x, problem.packed)
    tma = tile.memory == "tma"
    return GemmSpec(
        x=problem.x,
        operands=kind,
        # Other tensor cores than sm_90's have nothing to promote.
        accumulation=problem.accumulation if architecture == 90 and kind == "fp8" else "fast",
        x_scale=problem.x_scale,
        w_scale=problem.w_scale,
        out_dtype=problem.out_dtype,
        a_dtype=problem.a_dtype,
        pieces=len(problem.rows),
        a_pieces=problem.a_pieces,
        bias=problem.bias,
        extra=_extra(problem),
        tail=problem.tail,
        block_scaled=architecture == 120 and kind == "fp8",
        packed=problem.packed,
        layout=problem.layout,
        memory=tile.memory,
        # Flattened into one loop, the extra term serializes sm_90's products.
        persistent=tma and not problem.rank,
        even_k=not tma and all(k % tile.k == 0 for k in (problem.k, *problem.more_k)),
        block_m=tile.m,
        block_n=tile.n,
        block_k=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
        k_pieces=1 + len(problem.more_k),
    )
