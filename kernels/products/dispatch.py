"""The products of the merged ops by whichever kernel is best here: ours, the library's, or plain.

Each function takes operands, FP8 ones with their scales, and lists the implementations that could
do; `Contest.run` runs the chosen one (`falqon_fx.kernels.products.choice`):

========================  ====================================================================
triton:<spec>             a generated kernel (`falqon_fx.kernels.gemm.launch`)
scaled_mm                 ``torch._scaled_mm``, one call a weight (sm_89 and newer)
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
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from falqon_fx._compat import scaled_mm
from falqon_fx.config import Accumulation, Transpose
from falqon_fx.kernels.activation_cast.launch import activation_cast
from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.gemm.launch import Piece, Product, gemm, programs
from falqon_fx.kernels.gemm.spec import GemmSpec
from falqon_fx.kernels.gemm.tiles import GemmProblem, gemm_specs, likeliest
from falqon_fx.kernels.grad_b import launch as grad_b_launch
from falqon_fx.kernels.grad_b.spec import GradBSpec
from falqon_fx.kernels.hardware import architecture, cast_mode
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.products import inductor
from falqon_fx.kernels.products.choice import Candidate, Choice, choices_for
from falqon_fx.kernels.products.pieces import (
    MatMul,
    added,
    alike,
    by_library,
    by_mm,
    decoded,
    finished,
    joined,
)
from falqon_fx.kernels.products.problem import (
    bucket,
    dtype_name,
    fp8_format,
    key_of,
    problem_of,
    rounded,
)
from falqon_fx.kernels.spec import CastMode, InputDtype, KernelSpec
from falqon_fx.kernels.transpose import kept as stored
from falqon_fx.site.casts import cast_fp8 as cast_as_aten
from falqon_fx.site.spec import parse_spec

E4M3 = torch.float8_e4m3fn
Turn = Callable[[Tensor], Tensor]  # W [out, in] -> Wᵀ
S = TypeVar("S", bound=KernelSpec)
AUTO = ("auto", "max-autotune")
_TIMED = 3  # generated kernels that are tried for one problem
MAX_PIECES = 8  # weights in one launch


@dataclass(frozen=True)
class Options:
    """How the products are to be computed (see `FalqonConfig`); kernel="max-autotune" is "auto" in
    Inductor's mode of that name.
    """

    kernel: str = "auto"
    accumulation: Accumulation = "fast"
    transpose: Transpose = "auto"


@dataclass(frozen=True)
class Contest:
    """The implementations of one product on given operands; ``key`` says what it is, ``like`` is
    one of the operands, and ``wanted`` the option ``kernel``.
    """

    key: str
    candidates: dict[str, Candidate]
    like: Tensor
    wanted: str

    def run(self) -> list[Tensor]:
        """The results of the chosen one, see `forward`, `grad_x`, `grad_b` and `cast_fp8`.

        Raises ValueError where no kernel, or not the one asked for, takes the operands; the message
        holds the reason of each.
        """
        like, on_gpu = self.like, self.like.is_cuda
        name = "dequantize"
        if like.shape[0] and (on_gpu or self.wanted not in AUTO):
            # While a CUDA graph is captured nothing can be timed; warming up came before.
            time = on_gpu and not torch.cuda.is_current_stream_capturing()
            choices = choices_for(like.device)
            name = choices.get(self.key, self.candidates, self.wanted, time=time).winner
        result: list[Tensor] = self.candidates[name]()
        return result


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

    candidates: dict[str, Candidate] = dict(_triton(problem, q, q_scale, pieces))
    candidates |= {name: partial(library, mm) for name, mm in _libraries(options)}
    if 0 < a_pieces < len(pieces):
        # O by the library, and all of O_A by one skinny kernel of ours.
        rest = pieces[y_pieces:]
        narrow = replace(problem, rows=problem.rows[y_pieces:], bias="none")
        for name, skinny in _triton(narrow, q, q_scale, rest):

            def both(skinny: Candidate = skinny) -> list[Tensor]:
                ys = typed[:y_pieces]
                wide = [by_library(scaled_mm, q, q_scale, p, dtype, mode) for p, dtype in ys]
                return [*wide, *skinny()]

            candidates[f"scaled_mm+{name}"] = both
    candidates["dequantize"] = plain
    return Contest(key_of("forward", problem), candidates, q, options.kernel)


def grad_x(
    products: Sequence[Product],
    left: Tensor | None,
    right: Tensor | None,
    x_dtype: torch.dtype,
    options: Options,
) -> Contest:
    """[dL/dx], dL/dx [n, in] = Σ_s (q_s · W_s) ⊙ s_q,s + left · rightᵀ, for weights W_s [out_s, in]
    as stored. ``left`` [n, r] and ``right`` [in, r] have one dtype.

    Where the tensor cores want Wᵀ row by row, its bytes are transposed first, each time
    (transpose="transient"), or a copy is kept beside W (transpose="store"), unless a kernel reads W
    as it lies (transpose="kernel"). "auto" takes the faster of the first and the last.
    """
    q, q_scale, weight = products[0].q, products[0].q_scale, products[0].weight
    more = products[1:]
    features = weight.shape[1]
    a_dtype = x_dtype if left is None else left.dtype
    piece = Piece(weight, None, None, left, right)
    problem = replace(
        problem_of(q, q_scale, [piece], 0, x_dtype, a_dtype, options.accumulation),
        k=q.shape[1],
        rows=(features,),
        more_k=tuple(other.q.shape[1] for other in more),
        layout="kn",
        one_tensor=not more,
    )
    candidates: dict[str, Candidate] = {}
    if options.transpose in ("auto", "kernel"):
        candidates |= _triton(problem, q, q_scale, [piece], more)
    if options.transpose != "kernel":
        storing = options.transpose == "store"
        turn, suffix = (stored.kept, "+stored") if storing else (stored.transposed, "+transpose")
        turned = replace(problem, layout="nk")
        candidates |= {
            f"{name}{suffix}": run for name, run in _triton(turned, q, q_scale, [piece], more, turn)
        }

        def library(mm: MatMul) -> list[Tensor]:
            mode = options.accumulation
            parts = [
                by_library(mm, p.q, p.q_scale, Piece(turn(p.weight), None), x_dtype, mode)
                for p in products
            ]
            return [finished(added(parts), piece, x_dtype)]

        candidates |= {f"{name}{suffix}": partial(library, mm) for name, mm in _libraries(options)}

    def plain() -> list[Tensor]:
        parts = [
            (decoded(p.q, x_dtype) @ decoded(p.weight, x_dtype)).to(torch.float32) * p.q_scale
            for p in products
        ]
        return [finished(added(parts), piece, x_dtype)]

    candidates["dequantize"] = plain
    return Contest(key_of("dL/dx", problem), candidates, q, options.kernel)


def grad_b(
    grad: Tensor, out_a: Tensor, scaling: float, b_dtype: torch.dtype, kernel: str
) -> Contest:
    """[dL/dB], dL/dB [out, r] = scaling · gradᵀ · out_a, for dL/dO [n, out] and O_A [n, r]."""

    def plain() -> list[Tensor]:
        product = grad.to(out_a.dtype).t() @ out_a
        return [(product.to(torch.float32) * scaling).to(b_dtype)]

    def generated(spec: GradBSpec) -> list[Tensor]:
        return [grad_b_launch.grad_b(grad, out_a, scaling, spec)]

    made = partial(_grad_b_specs, grad, out_a, b_dtype)
    return _contest(f"dL/dB out={grad.shape[1]}", grad, made, generated, plain, kernel)


def cast_fp8(x: Tensor, dtype: torch.dtype, spec_text: str) -> Contest:
    """[q, scale], x [n, k] ≈ q · scale, where Inductor can't cast (see
    `falqon_fx.ops.products`).
    """
    cast = cast_mode(0 if runs_interpreted(x) else architecture(x.device))

    def plain() -> list[Tensor]:
        return [*cast_as_aten(x.to(torch.float32), dtype, spec_text)]

    def generated(made: ActivationCastSpec) -> list[Tensor]:
        return [*activation_cast(x, made)]

    made = partial(_cast_specs, x.shape[1], x.dtype, dtype, spec_text, cast)
    return _contest(
        f"cast width={x.shape[1]}", x, made, generated, plain, parse_spec(spec_text).kernel
    )


@functools.lru_cache(maxsize=4096)
def _cast_specs(
    width: int, input_dtype: torch.dtype, dtype: torch.dtype, spec_text: str, cast: CastMode
) -> tuple[ActivationCastSpec, ...]:
    spec = parse_spec(spec_text)
    made = ActivationCastSpec.for_width(
        width,
        input_dtype=dtype_name(input_dtype),
        fp8=fp8_format(dtype),
        granularity=spec.granularity,
        scale=spec.scale,
        cast=cast,
    )
    return (made,)


def _contest(
    what: str,
    like: Tensor,
    made: Callable[[], Sequence[S]],
    generated: Callable[[S], list[Tensor]],
    plain: Candidate,
    kernel: str,
) -> Contest:
    """Generated kernels, of the specs that are ``made``, against ATen."""
    why = _untried(runs_interpreted(like))
    candidates: dict[str, Candidate] = {}
    try:
        for spec in made():
            run = partial(_refuse, why) if why else partial(generated, spec)
            candidates[f"triton:{spec.name}"] = run
    except ValueError as error:  # a dtype that no spec has
        candidates["triton"] = partial(_refuse, str(error))
    wanted = kernel if kernel in ("triton", "dequantize") else "auto"
    key = f"{what} n={bucket(len(like))} {like.dtype} {' '.join(candidates)}"
    return Contest(key, {**candidates, "dequantize": plain}, like, wanted)


def _grad_b_specs(grad: Tensor, out_a: Tensor, b_dtype: torch.dtype) -> tuple[GradBSpec, ...]:
    dtypes = (dtype_name(grad.dtype), dtype_name(out_a.dtype), dtype_name(b_dtype))
    return _known_grad_b_specs(out_a.shape[1], dtypes, runs_interpreted(grad))


@functools.lru_cache(maxsize=4096)
def _known_grad_b_specs(
    rank: int,
    dtypes: tuple[InputDtype, InputDtype, InputDtype],
    interpreted: bool,
) -> tuple[GradBSpec, ...]:
    made = GradBSpec.for_rank(
        rank,
        grad_dtype=dtypes[0],
        a_dtype=dtypes[1],
        b_dtype=dtypes[2],
        operands="float32" if interpreted else "native",
    )
    return (made,)


def forward_choice(device: torch.device, problem: GemmProblem, kernel: str) -> Choice | None:
    """The choice made on ``device`` for a forward product with the option ``kernel``, if any."""
    return choices_for(device).known(key_of("forward", problem), kernel)


def _libraries(options: Options) -> Iterator[tuple[str, MatMul]]:
    """What multiplies FP8 matrices beside our kernels. Inductor tries dozens of kernels a shape,
    for which one has to have asked.
    """
    yield "scaled_mm", scaled_mm
    if options.kernel in ("max-autotune", "inductor"):
        yield "inductor", inductor.scaled_mm


def _triton(
    problem: GemmProblem,
    q: Tensor,
    q_scale: Tensor,
    pieces: Sequence[Piece],
    more: Sequence[Product] = (),
    turn: Turn | None = None,
) -> Iterator[tuple[str, Candidate]]:
    """The likeliest generated kernels for a problem; where none takes it, one that says why."""
    interpreted = runs_interpreted(q)
    where = 0 if interpreted else architecture(q.device)
    if why := _refusal(problem, interpreted):
        yield "triton", partial(_refuse, why)
        return
    try:
        specs = _specs(rounded(problem), where, programs(q.device))
    except ValueError as error:  # a dtype that no spec has
        yield "triton", partial(_refuse, str(error))
        return
    for name, spec in specs:
        yield name, partial(_generated, q, q_scale, pieces, spec, more, turn, problem)


@functools.lru_cache(maxsize=4096)  # each call of each product of a step asks
def _specs(problem: GemmProblem, where: int, processors: int) -> list[tuple[str, GemmSpec]]:
    """Names and specs of the kernels to try, in the order of all that share a choice."""
    specs = likeliest(gemm_specs(problem, where), problem, processors)[:_TIMED]
    return [(f"triton:{spec.name}", spec) for spec in specs]


def _refusal(problem: GemmProblem, interpreted: bool) -> str:
    """Why no generated kernel takes a problem, or ""."""
    if why := _untried(interpreted):
        return why
    if problem.k == 0:
        return "K is 0"
    if len(problem.rows) > MAX_PIECES:
        return f"{len(problem.rows)} weights, more than {MAX_PIECES}"
    return ""


def _untried(interpreted: bool) -> str:
    tried = interpreted or torch.version.hip is None
    return "" if tried else "no kernel has been tried on an AMD GPU"


def _refuse(why: str) -> list[Tensor]:
    raise ValueError(why)


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
        pieces = [replace(piece, weight=turn(piece.weight)) for piece in pieces]
        more = [replace(other, weight=turn(other.weight)) for other in more]
    if pieces[0].left is None or spec.extra:
        return gemm(q, q_scale, pieces, spec, more)
    alone = [Piece(piece.weight, piece.scale) for piece in pieces]
    results = gemm(q, q_scale, alone, spec, more)
    dtype = getattr(torch, problem.out_dtype)
    return [finished(y, piece, dtype) for y, piece in zip(results, pieces, strict=True)]
