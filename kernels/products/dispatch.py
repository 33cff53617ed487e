"""The products of the merged ops by whichever kernel is best here: ours, the library's, or plain.

Each function takes operands, FP8 ones with their scales, and lists the implementations that could
do; `Contest.run` runs the chosen one (`falqon_fx.kernels.products.choice`):

========================  ====================================================================
triton:<spec>             a generated kernel (`falqon_fx.kernels.gemm.launch`)
scaled_mm                 ``torch._scaled_mm``, one call a weight (sm_89 and newer)
int_mm                    ``torch._int_mm`` in its place, of INT8 (sm_75 and newer)
scaled_mm+triton:<spec>   the same for O, and a generated kernel for O_A
inductor                  Inductor's templates of ``torch._scaled_mm``, where autotuning was asked
                          for (`falqon_fx.kernels.products.inductor`)
dequantize                ``torch.mm`` on decoded operands; takes everything
========================  ====================================================================

On CPU "dequantize" is the rule; ``kernel="triton"`` runs the generated kernels interpreted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from falqon_fx._compat import scaled_mm
from falqon_fx.kernels.gemm.forms import specs_for
from falqon_fx.kernels.gemm.launch import Piece, Product, gemm, programs
from falqon_fx.kernels.gemm.spec import Format, GemmSpec, Layout
from falqon_fx.kernels.gemm.tiles import GemmProblem, likeliest
from falqon_fx.kernels.hardware import FP8, architecture, multiplies_fp8, reads_columns
from falqon_fx.kernels.products import inductor
from falqon_fx.kernels.products.choice import (
    Candidate,
    Choice,
    choices_for,
    refuse,
    refuses,
)
from falqon_fx.kernels.products.contest import Contest, Options, untried, where_runs
from falqon_fx.kernels.products.pieces import (
    MatMul,
    added,
    alike,
    by_library,
    by_mm,
    decoded,
    finished,
    int_mm,
    joined,
)
from falqon_fx.kernels.products.problem import (
    key_of,
    problem_of,
    rounded,
)
from falqon_fx.kernels.spec import MAX_PIECES, Sizes, sizes_of
from falqon_fx.kernels.transpose import kept as stored
from falqon_fx.site.numerics import INT8, filled
from falqon_fx.site.nvfp4 import shape_of

Turn = Callable[[Sequence[Tensor]], list[Tensor]]  # each W [out, in] -> Wᵀ
_TIMED = 3  # generated kernels that are tried for one problem


def forward(
    q: Tensor,
    q_scale: Tensor,
    pieces: Sequence[Piece],
    a_pieces: int,
    out_dtype: torch.dtype,
    a_dtype: torch.dtype,
    options: Options,
) -> Contest:
    """Y_g = (q · W_gᵀ) ⊙ s_q ⊙ s_W,g + left_g · right_gᵀ + bias_g: one [n, rows_g] for each piece,
    the last ``a_pieces`` side by side in one (O_A). All pieces have ``left`` and ``right``, of any
    rank, or none has.
    """
    pieces = alike(pieces)
    problem = problem_of(q, q_scale, pieces, a_pieces, out_dtype, a_dtype, options.accumulation)
    y_pieces = len(pieces) - a_pieces
    dtypes = [out_dtype] * y_pieces + [a_dtype] * a_pieces
    typed = [*zip(pieces, dtypes, strict=True)]
    mode = options.accumulation

    def library(mm: MatMul) -> list[Tensor]:
        parts = [by_library(mm, q, q_scale, p, dtype, mode) for p, dtype in typed]
        return joined(parts, a_pieces)

    def plain() -> list[Tensor]:
        return joined([by_mm(q, q_scale, p, dtype) for p, dtype in typed], a_pieces)

    candidates: dict[str, Candidate] = dict(generated_candidates(problem, q, q_scale, pieces))
    sizes = [problem.k, *problem.rows]
    if not problem.packed:
        candidates |= by_libraries(options, q, sizes, library)
    if 0 < a_pieces < len(pieces):
        # O by the library, and all of O_A by one skinny kernel of ours.
        rest, of_sites = pieces[y_pieces:], [problem.k, *problem.rows[:y_pieces]]
        own, mm = next(libraries(options, problem.x))
        of_y = by_libraries(options, q, of_sites, library)[own]
        narrow = replace(problem, rows=problem.rows[y_pieces:], bias="none")
        for name, skinny in generated_candidates(narrow, q, q_scale, rest):

            def both(skinny: Candidate = skinny) -> list[Tensor]:
                ys = typed[:y_pieces]
                wide = [by_library(mm, q, q_scale, p, dtype, mode) for p, dtype in ys]
                return [*wide, *skinny()]

            refused = next(filter(refuses, (skinny, of_y)), None)
            candidates[f"{own}+{name}"] = refused or both
    candidates["dequantize"] = plain
    return Contest(forward_key(problem), candidates, q, options.kernel)


def grad_x(
    products: Sequence[Product],
    left: Tensor | None,
    right: Tensor | None,
    x_dtype: torch.dtype,
    options: Options,
    kept: Sequence[Tensor] = (),
) -> Contest:
    """[dL/dx], dL/dx [n, in] = Σ_s (q_s · W_s) ⊙ s_q,s + left · rightᵀ, for weights W_s [out_s, in]
    as stored. ``left`` [n, r] and ``right`` [in, r] have one dtype.

    Where the tensor cores want Wᵀ row by row, its bytes are transposed first, each time
    (transpose="transient"), unless a kernel reads W as it lies (transpose="kernel"); "auto" is the
    faster where a GPU can do both. ``kept`` has W_sᵀ [in, out_s] of each, filled up by zeros, where
    they are there already; those of transpose="store" with update="rows" are looked up. NVFP4
    is always read as it lies: what is decoded can be turned.
    """
    weight, features = products[0].weight, shape_of(products[0].weight)[1]
    a_dtype = x_dtype if left is None else left.dtype
    piece = Piece(weight, None, None, left, right)

    def problem_with(of: Sequence[Product], layout: Layout) -> GemmProblem:
        first, *more = of
        q, scale = first.q, first.q_scale
        return replace(
            problem_of(q, scale, [piece], 0, x_dtype, a_dtype, options.accumulation),
            k=q.shape[1],
            rows=(features,),
            more_k=tuple(other.q.shape[1] for other in more),
            layout=layout,
            one_tensor=not more,
        )

    q, q_scale, more = products[0].q, products[0].q_scale, products[1:]
    problem = problem_with(products, "kn")
    candidates: dict[str, Candidate] = {}
    storing = bool(kept) or options.transpose == "store"
    untransposed = not storing and options.transpose == "auto" and reads_columns(where_runs(q))
    if untransposed or options.transpose == "kernel" or problem.packed:
        candidates |= generated_candidates(problem, q, q_scale, [piece], more)
    if options.transpose != "kernel" and not problem.packed:
        suffix = "+stored" if storing else "+transpose"

        def turn(weights: Sequence[Tensor]) -> list[Tensor]:
            if kept:
                return [*kept]
            return stored.kept(weights) if storing else stored.transposed(weights)

        # Transposes have as many columns; those behind Wᵀ are zeros.
        wide = [replace(p, q=filled(p.q)) for p in products]
        turned = problem_with(wide, "nk")
        made = generated_candidates(turned, wide[0].q, q_scale, [piece], wide[1:], turn)
        candidates |= {f"{name}{suffix}": run for name, run in made}

        def library(mm: MatMul) -> list[Tensor]:
            mode, turned = options.accumulation, turn([p.weight for p in products])
            parts = [
                by_library(mm, p.q, p.q_scale, Piece(w, None), x_dtype, mode)
                for p, w in zip(wide, turned, strict=True)
            ]
            return [finished(added(parts), piece, x_dtype)]

        sizes = [turned.k, *turned.more_k, features]
        candidates |= by_libraries(options, q, sizes, library, suffix)

    def plain() -> list[Tensor]:
        parts = [
            (decoded(p.q, x_dtype) @ decoded(p.weight, x_dtype)).to(torch.float32) * p.q_scale
            for p in products
        ]
        return [finished(added(parts), piece, x_dtype)]

    candidates["dequantize"] = plain
    what = "dL/dx by kept" if storing else "dL/dx"
    return Contest(key_of(what, problem), candidates, q, options.kernel)


def forward_choice(
    device: torch.device, problem: GemmProblem, kernel: str, kept: bool = False
) -> Choice | None:
    """The choice made on ``device`` for a forward product with the option ``kernel``, if any."""
    return choices_for(device).known(forward_key(problem, kept), kernel)


def forward_key(problem: GemmProblem, kept: bool = False) -> str:
    """The key of a forward product; ``kept``: W lies there with room for adapters in K, if any."""
    in_k = "forward in K by kept" if kept else "forward in K"
    return key_of(in_k if problem.tail else "forward", problem)


def libraries(options: Options, x: Format = "e4m3") -> Iterator[tuple[str, MatMul]]:
    """What multiplies FP8 or INT8 matrices beside our kernels. Inductor tries dozens of kernels a
    shape, for which one has to have asked.
    """
    if x == "int8":
        yield "int_mm", int_mm
        return
    yield "scaled_mm", scaled_mm
    if options.kernel in ("max-autotune", "inductor"):
        yield "inductor", inductor.scaled_mm


def by_libraries(
    options: Options,
    q: Tensor,
    sizes: Sequence[int],
    run: Callable[[MatMul], list[Tensor]],
    suffix: str = "",
) -> dict[str, Candidate]:
    """``run`` with each of the libraries. Their products on a GPU take ``sizes`` that are multiples
    of 16, of integers those of 8.
    """
    x: Format = "int8" if q.dtype == INT8 else "e4m3"
    unit = 8 if x == "int8" else 16
    odd = q.is_cuda and any(size % unit for size in sizes)
    refused = partial(refuse, f"the library takes multiples of {unit}") if odd else None
    return {f"{name}{suffix}": refused or partial(run, mm) for name, mm in libraries(options, x)}


def generated_candidates(
    problem: GemmProblem,
    q: Tensor,
    q_scale: Tensor,
    pieces: Sequence[Piece],
    more: Sequence[Product] = (),
    turn: Turn | None = None,
) -> Iterator[tuple[str, Candidate]]:
    """The likeliest generated kernels for a problem; where none takes it, one that says why."""
    where = where_runs(q)
    as_fp8 = where >= FP8 and not problem.packed
    if as_fp8 and not multiplies_fp8(architecture(q.device)):
        yield "triton", partial(refuse, "this Triton would decode FP8 before it multiplies")
        return
    if why := _refusal(problem, interpreted=where == 0):
        yield "triton", partial(refuse, why)
        return
    of_sites = len(problem.rows) - problem.a_pieces
    ranks = [size for piece in pieces for size in _of_adapter(piece)]
    sizes = sizes_of([*problem.rows[of_sites:], *ranks], problem.rows[:of_sites])
    try:
        specs = _specs(rounded(problem), sizes, where, programs(q.device))
    except ValueError as error:  # a dtype that no spec has
        yield "triton", partial(refuse, str(error))
        return
    if not specs:
        yield "triton", partial(refuse, "no kernel has been compiled ahead for such a product")
    for name, spec in specs:
        yield name, partial(_generated, q, q_scale, pieces, spec, more, turn, problem)


def _of_adapter(piece: Piece) -> list[int]:
    """The rank of a piece's adapter, and where its columns of O_A start."""
    if piece.left is None or piece.right is None:
        return []
    return [piece.right.shape[1], piece.left.stride(0), int(piece.left.storage_offset())]


@functools.lru_cache(maxsize=4096)  # each call of each product of a step asks
def _specs(
    problem: GemmProblem, sizes: Sizes, where: int, processors: int
) -> list[tuple[str, GemmSpec]]:
    """Names and specs of the kernels to try, in the order of all that share a choice."""
    specs = likeliest(specs_for(problem, sizes, where), problem, processors)[:_TIMED]
    return [(f"triton:{spec.name}", spec) for spec in specs]


def _refusal(problem: GemmProblem, interpreted: bool) -> str:
    """Why no generated kernel takes a problem, or ""."""
    if why := untried(interpreted):
        return why
    if problem.k == 0:
        return "K is 0"
    if len(problem.rows) > MAX_PIECES:
        return f"{len(problem.rows)} weights, more than {MAX_PIECES}"
    return ""


def _generated(
    q: Tensor,
    q_scale: Tensor,
    pieces: Sequence[Piece],
    spec: GemmSpec,
    more: Sequence[Product],
    turn: Turn | None,
    problem: GemmProblem,
) -> list[Tensor]:
    """A generated kernel, and what it leaves over."""
    if turn is not None:
        (piece,) = pieces
        first, *others = turn([piece.weight, *(other.weight for other in more)])
        pieces = [replace(piece, weight=first)]
        more = [replace(m, weight=w) for m, w in zip(more, others, strict=True)]
    adds = any(piece.left is not None or piece.bias is not None for piece in pieces)
    if not adds or spec.extra or spec.bias != "none":
        return gemm(q, q_scale, pieces, spec, more)
    alone = [Piece(piece.weight, piece.scale) for piece in pieces]
    results = gemm(q, q_scale, alone, spec, more)
    dtype = getattr(torch, problem.out_dtype)
    of_sites = len(pieces) - problem.a_pieces  # behind them stands O_A, to which nothing is added
    done = [finished(y, p, dtype) for y, p in zip(results[:of_sites], pieces, strict=False)]
    return [*done, *results[of_sites:]]
