"""Which products are computed by a generated kernel on a GPU: those whose compiled code is in the
table of `make kernels`.

`forms` lists them, `tabled` says which kernels with which sizes that makes, and `specs_for` finds
those for a problem. A problem outside has its adapter and bias added behind the kernel, or is for
the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from falqon_fx.kernels.gemm.spec import GemmSpec
from falqon_fx.kernels.gemm.tiles import GemmProblem, gemm_specs
from falqon_fx.kernels.hardware import FP8, reads_columns
from falqon_fx.kernels.spec import Sizes

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
_SITE = replace(PROBLEM, rows=(4096,), a_pieces=0)
_OUT_A = replace(PROBLEM, rows=(64,))
_GRAD_X = replace(_SITE, x="e5m2", w_scale="none")
_RANKS = (16, 64, 128)
_WEIGHTS = (4096, 1024, 1024)  # q, k and v of a grouped-query model; no launch takes more
Form = tuple[GemmProblem, Sizes]


def forms(architecture: int) -> Iterator[Form]:
    """The products on sm_``architecture``; of rare formats without an adapter or siblings."""
    yield from _forward()
    yield from _backward(architecture)
    if architecture < 90:
        yield from _integers()
    yield from _packed()
    others = [
        {"out_dtype": "float16", "a_dtype": "float32"},
        {"out_dtype": "float32", "a_dtype": "float32"},
        {"x_scale": "tensor", "w_scale": "tensor"},
    ]
    others += [{"accumulation": "promoted"}] if architecture == 90 else []
    for other in others:
        for problem in (PROBLEM, _SITE, _OUT_A, _GRAD_X):
            made = replace(problem, **other)  # type: ignore[arg-type]
            yield replace(made, w_scale="none") if problem is _GRAD_X else made, "aligned"


def _forward() -> Iterator[Form]:
    """O, with an adapter or without, and O_A of up to three sites in bfloat16."""
    for count in range(1, len(_WEIGHTS) + 1):
        rows, one_tensor = _WEIGHTS[:count], count == 1
        site = replace(_SITE, rows=rows, one_tensor=one_tensor)
        yield replace(site, rows=(*rows, *[64] * count), a_pieces=count), "aligned"
        for biased, ranks in ((site, _RANKS), (replace(site, bias="bfloat16"), _RANKS[:2])):
            yield biased, "aligned"
            yield replace(biased, rank=16), "rank"
            for rank in ranks:
                yield replace(biased, rank=rank), "aligned"
                yield replace(biased, rank=max(rank, 32), tail=True), "aligned"
        for rank in _RANKS:
            out_a = replace(_OUT_A, rows=(rank,) * count, a_pieces=count, one_tensor=False)
            yield out_a, "aligned"
            if rank < 128:
                yield out_a, "rank"
    yield _SITE, "any"


def _integers() -> Iterator[Form]:
    """The same of a base in INT8."""
    for count in range(1, len(_WEIGHTS) + 1):
        site = replace(_SITE, x="int8", rows=_WEIGHTS[:count], one_tensor=False)
        yield replace(site, rank=16), "rank"
        for rank in (0, *_RANKS[:2]):
            yield replace(site, rank=rank), "aligned"
        for rank in _RANKS[:2]:
            out_a = replace(site, rows=(rank,) * count, a_pieces=count)
            yield out_a, "aligned"
            yield out_a, "rank"


def _packed() -> Iterator[Form]:
    """The same of W in NVFP4, and dL/dx, which reads it as it lies and adds all adapters' terms."""
    for count in range(1, len(_WEIGHTS) + 1):
        rows, one = _WEIGHTS[:count], count == 1
        site = replace(_SITE, packed=True, w_scale="tensor", rows=rows, one_tensor=one)
        for biased in (site, replace(site, bias="bfloat16")):
            yield replace(biased, rank=16), "rank"
            for rank in (0, *_RANKS[:2]):
                yield replace(biased, rank=rank), "aligned"
        grad_x = replace(_GRAD_X, packed=True, layout="kn", more_k=rows[1:], one_tensor=one)
        low, *others = [64, 128, 256] if count == 3 else [16, 64, 128]
        yield replace(grad_x, rank=low), "rank"
        for rank in (0, low, *others):
            yield replace(grad_x, rank=rank), "aligned"


def _backward(architecture: int) -> Iterator[Form]:
    """dL/dx of up to three sites, from Wᵀ, or from W where tensor cores read columns."""
    for layout in ("nk", "kn") if reads_columns(architecture) else ("nk",):
        for count in range(1, len(_WEIGHTS) + 1):
            grad_x = replace(_GRAD_X, layout=layout, more_k=_WEIGHTS[1:count])
            grad_x = replace(grad_x, one_tensor=count == 1)
            # The term has the ranks of all sites: three of 64 take 256 columns, as do two with what
            # a calibration has made.
            for rank in (0, *_RANKS, *([256] if count > 1 else [])):
                yield replace(grad_x, rank=rank), "aligned"
            yield replace(grad_x, rank=16), "rank"
            if count == 3:  # three of 8
                yield replace(grad_x, rank=64), "rank"
        single = replace(_GRAD_X, layout=layout)
        yield replace(single, x="e4m3"), "aligned"
        if layout == "nk":
            yield single, "any"


@cache
def tabled(architecture: int) -> dict[tuple[GemmSpec, Sizes], None]:
    """The kernels that may run on sm_``architecture``, and the sizes that they may meet."""
    found: dict[tuple[GemmSpec, Sizes], None] = {}
    for problem, sizes in forms(architecture):
        for spec in gemm_specs(problem, architecture):
            if not _spills(spec, sizes, architecture):
                found[spec, sizes] = None
    return found


def _spills(spec: GemmSpec, sizes: Sizes, architecture: int) -> bool:
    """Whether a kernel would spill with sizes that are no multiples of 16: what is then loaded and
    stored in small pieces takes registers.
    """
    if sizes == "any":
        return spec.block_n > 128
    if sizes == "aligned" or spec.packed:
        return False
    low_of_siblings = spec.pieces > 1 and spec.extra > 0 and spec.block_m == 64
    high_of_sums = spec.k_pieces > 1 and spec.extra == 64 and spec.block_m == 128
    return {120: low_of_siblings, 90: high_of_sums}.get(architecture, False)


def specs_for(problem: GemmProblem, sizes: Sizes, architecture: int) -> list[GemmSpec]:
    """The kernels for a problem, the likeliest first. GPUs without FP8 and the interpreter have no
    table, and take all.
    """
    if architecture < FP8:
        return gemm_specs(problem, architecture)
    alone = replace(problem, rank=0, bias="none", out_dtype=problem.a_dtype)
    of_alone: Sizes = sizes if sizes == "any" or problem.a_pieces else "aligned"
    for tried, of in ((problem, sizes), (alone, of_alone)):
        known = tabled(architecture)
        found = [spec for spec in gemm_specs(tried, architecture) if (spec, of) in known]
        if found or problem.tail:
            return found
    return []
