"""The GEMMs that are compiled ahead of time, and those whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from falqon_fx.kernels.gemm.forms import PROBLEM, tabled
from falqon_fx.kernels.gemm.launch import signatures, unaligned
from falqon_fx.kernels.gemm.spec import GemmSpec
from falqon_fx.kernels.gemm.tiles import gemm_specs
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.spec import Sizes


def ahead(architecture: int) -> Iterator[tuple[GemmSpec, Sizes]]:
    """All that may run; on sm_80, of which there is no table, one product of each kind."""
    if architecture >= FP8:
        yield from tabled(architecture)
        return
    site = replace(PROBLEM, rows=(4096,), a_pieces=0)
    grad_x = replace(site, x="e5m2", w_scale="none")
    out_a = replace(PROBLEM, rows=(64,))
    for problem in (PROBLEM, out_a, site, replace(site, rank=64), grad_x, replace(grad_x, rank=64)):
        for spec in gemm_specs(problem, architecture):
            yield spec, "aligned"


_INT8 = replace(PROBLEM, rows=(4096,), a_pieces=0, x="int8")
# O, with an adapter, of q, k and v, with a bias; O_A, of q, k and v.
INT8_PROBLEMS = (
    _INT8,
    replace(_INT8, rank=64),
    replace(_INT8, rows=(4096, 1024, 1024), rank=64, one_tensor=False),
    replace(_INT8, rank=64, bias="bfloat16"),
    replace(_INT8, rows=(64,), a_pieces=1),
    replace(_INT8, rows=(64, 64, 64), a_pieces=3, one_tensor=False),
    replace(_INT8, out_dtype="float16", a_dtype="float32"),
)


SITE = GemmSpec(
    x="e4m3",
    operands="fp8",
    accumulation="fast",
    x_scale="row",
    w_scale="row",
    out_dtype="bfloat16",
    a_dtype="bfloat16",
    pieces=2,
    a_pieces=1,
    bias="none",
    extra=0,
    layout="nk",
    memory="tma",
    persistent=True,
    even_k=False,
    block_m=128,
    block_n=256,
    block_k=128,
)
SIBLINGS = replace(
    SITE, pieces=6, a_pieces=3, memory="pointer", persistent=False, even_k=True, block_n=128
)
PACKED = replace(
    SIBLINGS, pieces=1, a_pieces=0, operands="float16", w_scale="tensor", packed=True, block_k=64
)
GOLDEN = (
    SITE,
    replace(SITE, out_dtype="float16", a_dtype="float32", bias="bfloat16", memory="pointer"),
    SIBLINGS,
    replace(SIBLINGS, pieces=1, a_pieces=0, extra=128),
    replace(SIBLINGS, pieces=3, a_pieces=0, extra=64, tail=True),
    replace(
        SIBLINGS, pieces=1, a_pieces=0, x="e5m2", w_scale="none", k_pieces=3, operands="bfloat16"
    ),
    replace(PACKED, extra=16),
    replace(PACKED, x="e5m2", w_scale="none", layout="kn"),
)
KERNEL = Kernel(GemmSpec, signatures, ahead, GOLDEN, unaligned)
