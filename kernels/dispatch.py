"""The products of the merged ops by whichever kernel is best here: ours, the library's, or plain.

Each function takes operands, FP8 ones with their scales, and lists the implementations that could
do; `Contest.run` runs the chosen one (`falqon_fx.kernels.choice`):

========================  ====================================================================
triton:<spec>             a generated kernel (`falqon_fx.kernels.gemm`)
scaled_mm                 ``torch._scaled_mm``, one call a weight (sm_89 and newer)
scaled_mm+triton:<spec>   the same for O, and a generated kernel for O_A
inductor                  Inductor's templates of ``torch._scaled_mm``, where autotuning was asked
                          for (`falqon_fx.kernels.inductor`)
dequantize                ``torch.mm`` on decoded operands; takes everything
========================  ====================================================================

On CPU "dequantize" is the rule; ``kernel="triton"`` runs the generated kernels interpreted.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from falqon_fx import serving
from falqon_fx._compat import scaled_mm
from falqon_fx.lowering import grad_b as grad_b_as_aten
from falqon_fx.products import cast_fp8 as cast_as_aten
from falqon_fx.spec import parse_spec

from . import backward, inductor, stored
from .activation_cast import activation_cast
from .backward_spec import GradBSpec
from .choice import Candidate, Choice, choices_for
from .gemm import Piece, Product, follows, gemm, programs
from .gemm_spec import Accumulation, GemmSpec
from .interpreter import runs_interpreted
from .loader import serves
from .spec import ActivationCastSpec, Fp8Format, InputDtype, KernelSpec
from .tiles import GemmProblem, gemm_specs, likeliest

E4M3 = torch.float8_e4m3fn
Transpose = Literal["auto", "transient", "store", "kernel"]
Turn = Callable[[Tensor], Tensor]  # W [out, in] -> Wᵀ
MatMul = Callable[..., Tensor]  # has the signature of `falqon_fx._compat.scaled_mm`
S = TypeVar("S", bound=KernelSpec)
AUTO = ("auto", "max-autotune")
_TIMED = 3  # generated kernels that are tried for one problem
_MAX_PIECES = 8  # weights in one launch


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
    pieces = _alike(pieces)
    problem = _problem(q, q_scale, pieces, a_pieces, out_dtype, a_dtype, options)
    y_pieces = len(pieces) - a_pieces
    dtypes = [out_dtype] * y_pieces + [a_dtype] * a_pieces
    typed = [*zip(pieces, dtypes, strict=True)]
    mode = options.accumulation

    def library(mm: MatMul) -> list[Tensor]:
        parts = [_scaled_mm(mm, q, q_scale, p, dtype, mode) for p, dtype in typed]
        return _join(parts, a_pieces)

    def plain() -> list[Tensor]:
        return _join([_plain(q, q_scale, p, dtype) for p, dtype in typed], a_pieces)

    candidates: dict[str, Candidate] = dict(_triton(problem, q, q_scale, pieces))
    candidates |= {name: partial(library, mm) for name, mm in _libraries(options)}
    if 0 < a_pieces < len(pieces):
        # O by the library, and all of O_A by one skinny kernel of ours.
        rest = pieces[y_pieces:]
        narrow = replace(problem, rows=problem.rows[y_pieces:], bias="none")
        for name, skinny in _triton(narrow, q, q_scale, rest):

            def both(skinny: Candidate = skinny) -> list[Tensor]:
                ys = typed[:y_pieces]
                wide = [_scaled_mm(scaled_mm, q, q_scale, p, dtype, mode) for p, dtype in ys]
                return [*wide, *skinny()]

            candidates[f"scaled_mm+{name}"] = both
    candidates["dequantize"] = plain
    return Contest(_key("forward", problem), candidates, q, options.kernel)


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
        _problem(q, q_scale, [piece], 0, x_dtype, a_dtype, options),
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
                _scaled_mm(mm, p.q, p.q_scale, Piece(turn(p.weight), None), x_dtype, mode)
                for p in products
            ]
            return [_finish(_sum(parts), piece, x_dtype)]

        candidates |= {f"{name}{suffix}": partial(library, mm) for name, mm in _libraries(options)}

    def plain() -> list[Tensor]:
        parts = [
            (_decoded(p.q, x_dtype) @ _decoded(p.weight, x_dtype)).to(torch.float32) * p.q_scale
            for p in products
        ]
        return [_finish(_sum(parts), piece, x_dtype)]

    candidates["dequantize"] = plain
    return Contest(_key("dL/dx", problem), candidates, q, options.kernel)


def grad_b(
    grad: Tensor, out_a: Tensor, scaling: float, b_dtype: torch.dtype, kernel: str
) -> Contest:
    """[dL/dB], dL/dB [out, r] = scaling · gradᵀ · out_a, for dL/dO [n, out] and O_A [n, r]."""

    def plain() -> list[Tensor]:
        return [grad_b_as_aten(grad, out_a, scaling, b_dtype)]

    def generated(spec: GradBSpec) -> list[Tensor]:
        return [backward.grad_b(grad, out_a, scaling, spec)]

    made = partial(_grad_b_spec, grad, out_a, b_dtype)
    return _pair(f"dL/dB out={grad.shape[1]}", grad, made, generated, plain, kernel)


def cast_fp8(x: Tensor, dtype: torch.dtype, spec: str) -> Contest:
    """[q, scale], x [n, k] ≈ q · scale, where Inductor can't cast (see `falqon_fx.products`)."""
    hardware = not runs_interpreted(x) and architecture(x.device) >= 89

    def plain() -> list[Tensor]:
        return [*cast_as_aten(x.to(torch.float32), dtype, spec)]

    def generated(made: ActivationCastSpec) -> list[Tensor]:
        return [*activation_cast(x, made)]

    made = partial(_cast_spec, x.shape[1], x.dtype, dtype, spec, hardware, serving.known())
    return _pair(f"cast width={x.shape[1]}", x, made, generated, plain, parse_spec(spec).kernel)


@functools.lru_cache(maxsize=4096)
def _cast_spec(
    width: int, input_dtype: torch.dtype, dtype: torch.dtype, spec: str, hardware: bool, known: int
) -> ActivationCastSpec:
    """The spec, whose file's header names the sites: x is E4M3, dL/dO what the plan says."""
    plan = parse_spec(spec)
    made = ActivationCastSpec.for_width(
        width,
        input_dtype=_name(input_dtype),
        fp8=_format(dtype),
        granularity="row" if plan.per_row else "tensor",
        scale=plan.scale,
        cast="hardware" if hardware else "integer",
    )
    shapes: list[serving.Shape] = [(None, width)] if dtype == E4M3 else []
    serves(made, shapes + [(width, None)] * (dtype == plan.grad_dtype))
    return made


def _pair(
    what: str,
    like: Tensor,
    made: Callable[[], S],
    generated: Callable[[S], list[Tensor]],
    plain: Candidate,
    kernel: str,
) -> Contest:
    """A generated kernel, of the spec that is ``made``, against ATen."""
    why = _untried(runs_interpreted(like))
    try:
        spec = made()
    except ValueError as error:  # a dtype that no spec has
        name, run = "triton", partial(_refuse, str(error))
    else:
        name = f"triton:{spec.name}"
        run = partial(_refuse, why) if why else partial(generated, spec)
    wanted = kernel if kernel in ("triton", "dequantize") else "auto"
    key = f"{what} n={_bucket(len(like))} {like.dtype} {name}"
    return Contest(key, {name: run, "dequantize": plain}, like, wanted)


def _grad_b_spec(grad: Tensor, out_a: Tensor, b_dtype: torch.dtype) -> GradBSpec:
    dtypes = (_name(grad.dtype), _name(out_a.dtype), _name(b_dtype))
    rank, shape = out_a.shape[1], (grad.shape[1], None)
    return _known_grad_b_spec(rank, dtypes, runs_interpreted(grad), shape, serving.known())


@functools.lru_cache(maxsize=4096)
def _known_grad_b_spec(
    rank: int,
    dtypes: tuple[InputDtype, InputDtype, InputDtype],
    interpreted: bool,
    shape: serving.Shape,
    known: int,
) -> GradBSpec:
    """The spec, whose file's header names the sites of ``shape``."""
    spec = GradBSpec.for_rank(
        rank,
        grad_dtype=dtypes[0],
        a_dtype=dtypes[1],
        b_dtype=dtypes[2],
        operands="float32" if interpreted else "native",
    )
    serves(spec, [shape])
    return spec


def forward_choice(device: torch.device, problem: GemmProblem, kernel: str) -> Choice | None:
    """The choice made on ``device`` for a forward product with the option ``kernel``, if any."""
    return choices_for(device).known(_key("forward", problem), kernel)


def architecture(device: torch.device) -> int:
    """90 for sm_90 and so on; 0 for a CPU, where kernels are interpreted.

    A GPU without FP8 tensor cores is named once: it saves memory, and no time.
    """
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        _warn_below_fp8(torch.cuda.get_device_name(device), major * 10 + minor)
    return major * 10 + minor


@functools.cache
def _warn_below_fp8(card: str, number: int) -> None:
    warnings.warn(
        f"falqon: {card} (sm_{number}) has no FP8 tensor cores (sm_89 and newer have): weights "
        "stay FP8 in memory, and are decoded to bfloat16 in every product. Memory is saved, time "
        "is not.",
        stacklevel=5,
    )


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
        specs = _specs(_rounded(problem), where, programs(q.device), serving.known())
    except ValueError as error:  # a dtype that no spec has
        yield "triton", partial(_refuse, str(error))
        return
    for name, spec in specs:
        yield name, partial(_generated, q, q_scale, pieces, spec, more, turn, problem)


@functools.lru_cache(maxsize=4096)  # each call of each product of a step asks
def _specs(
    problem: GemmProblem, where: int, processors: int, known: int
) -> list[tuple[str, GemmSpec]]:
    """Names and specs of the kernels to try, in the order of all that share a choice."""
    specs = likeliest(gemm_specs(problem, where), problem, processors)[:_TIMED]
    for spec in specs:
        serves(spec, _weights(problem))
    return [(f"triton:{spec.name}", spec) for spec in specs]


def _weights(problem: GemmProblem) -> list[serving.Shape]:
    """[out, in] of the weights of a problem; of O_A's, in alone."""
    if problem.w_scale == "none":  # dL/dx
        return [(k, problem.rows[0]) for k in (problem.k, *problem.more_k)]
    outs = problem.rows[: len(problem.rows) - problem.a_pieces]
    return [(out, problem.k) for out in outs or (None,)]


def _refusal(problem: GemmProblem, interpreted: bool) -> str:
    """Why no generated kernel takes a problem, or ""."""
    if why := _untried(interpreted):
        return why
    if problem.k == 0:
        return "K is 0"
    if len(problem.rows) > _MAX_PIECES:
        return f"{len(problem.rows)} weights, more than {_MAX_PIECES}"
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
    return [_finish(y, piece, dtype) for y, piece in zip(results, pieces, strict=True)]


def _scaled_mm(
    mm: MatMul,
    q: Tensor,
    q_scale: Tensor,
    piece: Piece,
    dtype: torch.dtype,
    accumulation: Accumulation,
) -> Tensor:
    """One piece by a library: its own GEMM, then the extra term and the bias."""
    n, rows = q.shape[0], piece.weight.shape[0]
    one = torch.ones((), dtype=torch.float32, device=q.device)
    w_scale = one if piece.scale is None else piece.scale
    if q_scale.numel() > 1 or w_scale.numel() > 1:  # the library wants both by row, or neither
        q_scale = q_scale.reshape(-1, 1).expand(n, 1).contiguous()
        w_scale = w_scale.reshape(1, -1).expand(1, rows).contiguous()
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    fast = accumulation == "fast"
    y = mm(q, piece.weight.t(), q_scale, w_scale, out_dtype=wide, use_fast_accum=fast)
    return _finish(y, piece, dtype)


def _plain(q: Tensor, q_scale: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
    """One piece by ``torch.mm`` on the decoded operands, in bfloat16 where the result is that."""
    y = _decoded(q, dtype) @ _decoded(piece.weight, dtype).t()
    wide = y.to(torch.float32) * q_scale
    if piece.scale is not None:
        wide = wide * piece.scale.reshape(1, -1)
    return _finish(wide, piece, dtype)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum, in float32 where there is something to add."""
    return functools.reduce(torch.add, [p.to(torch.float32) for p in parts[1:]], parts[0])


def _finish(y: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
    if piece.left is not None:
        assert piece.right is not None
        y = torch.addmm(y.to(piece.left.dtype), piece.left, piece.right.t())
    if piece.bias is not None:
        y = y + piece.bias.to(y.dtype)
    return y.to(dtype)


def _decoded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # bfloat16 holds every FP8 value; a raw FP8 sum overflows float16.
    return tensor.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def _join(parts: list[Tensor], a_pieces: int) -> list[Tensor]:
    if not a_pieces:
        return parts
    y, a = parts[: len(parts) - a_pieces], parts[len(parts) - a_pieces :]
    return [*y, a[0] if len(a) == 1 else torch.cat(a, dim=1)]


def _alike(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """The pieces with biases of one dtype: those of several become float32."""
    if len({piece.bias.dtype for piece in pieces if piece.bias is not None}) < 2:
        return pieces
    wide = [None if piece.bias is None else piece.bias.to(torch.float32) for piece in pieces]
    return [replace(piece, bias=bias) for piece, bias in zip(pieces, wide, strict=True)]


def _problem(
    q: Tensor,
    q_scale: Tensor,
    pieces: Sequence[Piece],
    a_pieces: int,
    out_dtype: torch.dtype,
    a_dtype: torch.dtype,
    options: Options,
) -> GemmProblem:
    n, k = q.shape
    biases = [p.bias for p in pieces if p.bias is not None]
    scales = [p.scale for p in pieces]
    rows = tuple(p.weight.shape[0] for p in pieces)
    return GemmProblem(
        n=n,
        k=k,
        rows=rows,
        a_pieces=a_pieces,
        x=_format(q.dtype),
        x_scale="row" if q_scale.dim() == 2 else "tensor",
        w_scale="none" if scales[0] is None else "row" if scales[0].dim() == 2 else "tensor",
        out_dtype=_name(out_dtype),
        a_dtype=_name(a_dtype),
        bias=_name(biases[0].dtype) if biases else "none",
        rank=max(0 if p.right is None else p.right.shape[1] for p in pieces),
        accumulation=options.accumulation,
        one_tensor=all(follows(a.weight, b.weight) for a, b in pairwise(pieces)),
    )


def _format(dtype: torch.dtype) -> Fp8Format:
    return "e4m3" if dtype == E4M3 else "e5m2"


def _name(dtype: torch.dtype) -> InputDtype:
    return cast(InputDtype, str(dtype).removeprefix("torch."))


def _bucket(n: int) -> int:
    """Token counts between two powers of two share a choice."""
    return 1 << max(0, n - 1).bit_length()


def _rounded(problem: GemmProblem) -> GemmProblem:
    n = _bucket(problem.n)
    return problem if n == problem.n else replace(problem, n=n)


def _key(what: str, problem: GemmProblem) -> str:
    return _key_of(what, _rounded(problem))


@functools.lru_cache(maxsize=4096)
def _key_of(what: str, problem: GemmProblem) -> str:
    fields = ", ".join(f"{name}={value}" for name, value in vars(problem).items())
    return f"{what} {fields}"
