"""The GEMMs over experts that are compiled ahead of time, and those whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

from falqon_fx.kernels.grouped_gemm.launch import signatures
from falqon_fx.kernels.grouped_gemm.spec import GroupedGemmSpec
from falqon_fx.kernels.grouped_gemm.tiles import grouped_spec
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.spec import Sizes

_COLUMNS, _K = 1536, 2048  # gate_up of Qwen3-30B-A3B
_RANKS = (16, 64)


def ahead(architecture: int) -> Iterator[tuple[GroupedGemmSpec, Sizes]]:
    """O and dL/dx with an adapter and without, O_A and D, of bfloat16 models. K may be a multiple
    of 16 that no tile divides (gpt-oss: 2880).
    """
    if architecture < FP8:
        return
    for k, gather in product((_K, _K + 16), (True, False)):
        for rank in (0, *_RANKS):
            yield grouped_spec(architecture, k, rank=rank, gather=gather), "aligned"
        yield grouped_spec(architecture, k, rank=16, gather=gather), "rank"
        for rank in _RANKS:
            yield grouped_spec(architecture, k, gather=gather, columns=rank), "aligned"
        yield grouped_spec(architecture, k, gather=gather, columns=16), "rank"
    for k in (_COLUMNS, _COLUMNS + 16):
        for dtype in ("bfloat16", "float32"):  # what is added up over tokens' experts is float32
            grad_x = partial(grouped_spec, architecture, k, backward=True, dtype=dtype)
            for rank in (0, *_RANKS):
                yield grad_x(rank=rank), "aligned"
            yield grad_x(rank=16), "rank"
        for rank in _RANKS:
            yield _grad_out_a(architecture, k, rank), "aligned"
        yield _grad_out_a(architecture, k, 16), "rank"


def _grad_out_a(architecture: int, k: int, rank: int) -> GroupedGemmSpec:
    return grouped_spec(architecture, k, backward=True, x="bfloat16", columns=rank)


def unaligned(spec: GroupedGemmSpec) -> dict[Sizes, str]:
    """The parameters that are no multiples of 16: of O_A and D the columns are ranks."""
    return {"rank": "rank" if spec.extra else "columns"}


FORWARD = grouped_spec(90, _K, rank=16, gather=True)
GOLDEN = (
    FORWARD,
    grouped_spec(90, _COLUMNS, rank=16, backward=True),
    grouped_spec(90, _COLUMNS, backward=True, x="bfloat16", columns=16),
    replace(FORWARD, extra=128, even_k=False, gather=False, operands="float32"),
)
KERNEL = Kernel(
    GroupedGemmSpec, signatures, ahead, GOLDEN, unaligned, bytewise=frozenset({"grouped_gemm"})
)
