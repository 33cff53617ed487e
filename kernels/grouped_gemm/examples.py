"""The GEMMs over experts that are compiled ahead of time, and those whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from falqon_fx.kernels.grouped_gemm.launch import signatures
from falqon_fx.kernels.grouped_gemm.spec import GroupedGemmSpec
from falqon_fx.kernels.grouped_gemm.tiles import grouped_spec
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel

_COLUMNS, _K = 1536, 2048  # gate_up of Qwen3-30B-A3B


def ahead(architecture: int) -> Iterator[GroupedGemmSpec]:
    """Forward with an adapter and without, dL/dx of both, in bfloat16."""
    if architecture < FP8:
        return
    for rank in (0, 16, 64):
        yield grouped_spec(architecture, _K, rank=rank, gather=True)
        yield grouped_spec(architecture, _COLUMNS, rank=rank, backward=True)
        if rank:  # O_A and D
            yield grouped_spec(architecture, _K, gather=True, columns=rank)
            yield grouped_spec(architecture, _COLUMNS, backward=True, x="bfloat16", columns=rank)
    yield grouped_spec(architecture, _COLUMNS // 2, rank=16)  # down, whose rows are sorted


FORWARD = grouped_spec(90, _K, rank=16, gather=True)
GOLDEN = (
    FORWARD,
    grouped_spec(90, _COLUMNS, rank=16, backward=True),
    grouped_spec(90, _COLUMNS, backward=True, x="bfloat16", columns=16),
    replace(FORWARD, extra=128, even_k=False, gather=False, operands="float32"),
)
KERNEL = Kernel(GroupedGemmSpec, signatures, ahead, GOLDEN, bytewise=frozenset({"grouped_gemm"}))
