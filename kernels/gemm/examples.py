"""The GEMMs that are compiled ahead of time, and those whose sources are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from falqon_fx.kernels.gemm.launch import signatures
from falqon_fx.kernels.gemm.spec import GemmSpec
from falqon_fx.kernels.gemm.tiles import GemmProblem, gemm_specs
from falqon_fx.kernels.kernel import Kernel

PROBLEM = GemmProblem(
    n=4096,
    k=4096,
    rows=(4096, 64),
    a_pieces=1,
    x="e4m3",
    x_scale="row",
    w_scale="row",
    out_dtype="bfloat16",
    a_dtype="bfloat16",
    one_tensor=True,
)


def ahead(architecture: int) -> Iterator[GemmSpec]:
    """All tiles that each of the problems may take."""
    for problem in _problems(architecture):
        yield from gemm_specs(problem, architecture)


def _problems(architecture: int) -> Iterator[GemmProblem]:
    """Llama's shapes in every form that the plan gives them."""
    site = PROBLEM
    only_a = replace(site, rows=(64,))
    frozen = replace(site, rows=(4096,), a_pieces=0)
    adapted = replace(site, rows=(4096,), a_pieces=0, rank=64)
    grad_x = replace(site, rows=(4096,), a_pieces=0, x="e5m2", w_scale="none")
    yield site
    yield only_a
    yield frozen
    yield adapted
    yield grad_x
    yield replace(grad_x, rank=64)
    if architecture == 80:
        return
    yield replace(site, x_scale="tensor", w_scale="tensor")
    yield replace(grad_x, x_scale="tensor", w_scale="tensor")
    yield replace(adapted, rank=16)
    yield replace(adapted, bias="bfloat16")
    yield replace(site, bias="bfloat16")
    yield replace(site, out_dtype="float16", a_dtype="float32")
    # q, k, v of a grouped-query model and gate, up: weights apart, so pointers.
    yield replace(site, rows=(4096, 1024, 1024, 64, 64, 64), a_pieces=3, one_tensor=False)
    yield replace(adapted, rows=(4096, 1024, 1024), one_tensor=False)
    yield replace(only_a, rows=(64, 64, 64), a_pieces=3, one_tensor=False)
    yield replace(grad_x, rank=192, more_k=(1024, 1024))
    # Some of them frozen: k and v, k alone beside two adapters, all three.
    yield replace(frozen, rows=(1024, 1024), one_tensor=False)
    yield replace(only_a, rows=(64, 64), a_pieces=2, one_tensor=False)
    yield replace(grad_x, rank=64, more_k=(1024, 1024))
    yield replace(grad_x, more_k=(1024, 1024))
    yield replace(site, rows=(11008, 11008, 64, 64), a_pieces=2, one_tensor=False)
    yield replace(adapted, rows=(11008, 11008), one_tensor=False)
    yield replace(grad_x, rank=128, more_k=(11008,))
    yield replace(adapted, rank=128)
    yield replace(adapted, rank=256)
    yield replace(adapted, x_scale="tensor", w_scale="tensor")
    # float16 and float32 models.
    yield replace(adapted, out_dtype="float16", a_dtype="float32")
    yield replace(only_a, out_dtype="float16", a_dtype="float32")
    yield replace(site, out_dtype="float32", a_dtype="float32")
    yield replace(grad_x, out_dtype="float32", a_dtype="float32")
    yield replace(grad_x, out_dtype="float32", a_dtype="float32", more_k=(1024, 1024))
    # Adapters in FP8: of one site, of siblings, with a bias, of all ranks, in other models.
    in_k = replace(adapted, tail=True)
    for rank in (16, 64, 128, 256):
        yield replace(in_k, rank=rank)
    yield replace(in_k, rows=(4096, 1024, 1024), one_tensor=False)
    yield replace(in_k, rows=(11008, 11008), one_tensor=False)
    yield replace(in_k, bias="bfloat16")
    yield replace(in_k, x_scale="tensor", w_scale="tensor")
    yield replace(in_k, out_dtype="float16", a_dtype="float16")
    yield replace(in_k, out_dtype="float32", a_dtype="float32")
    if architecture == 90:
        yield replace(site, accumulation="promoted")
    if architecture == 100:
        yield replace(grad_x, layout="kn")
        yield replace(grad_x, x="e4m3")


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
GOLDEN = (
    SITE,
    replace(SITE, out_dtype="float16", a_dtype="float32", bias="bfloat16", memory="pointer"),
    SIBLINGS,
    replace(SIBLINGS, pieces=1, a_pieces=0, extra=128),
    replace(SIBLINGS, pieces=3, a_pieces=0, extra=64, tail=True),
    replace(
        SIBLINGS, pieces=1, a_pieces=0, x="e5m2", w_scale="none", k_pieces=3, operands="bfloat16"
    ),
)
KERNEL = Kernel(GemmSpec, signatures, ahead, GOLDEN)
