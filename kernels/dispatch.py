"""The products of the merged ops by whichever kernel is best here: ours, the library's, or plain.

Each function takes FP8 operands with their scales, lists the implementations that could do, and
runs the chosen one (`falqon_fx.kernels.choice`):

========================  ====================================================================
triton:<spec>             a generated kernel (`falqon_fx.kernels.gemm`)
scaled_mm                 ``torch._scaled_mm``, one call a weight (sm_89 and newer)
scaled_mm+triton:<spec>   the same for O, and a generated kernel for O_A
dequantize                ``torch.mm`` on decoded operands; takes everything
========================  ====================================================================

On CPU "dequantize" is the rule; ``kernel="triton"`` runs the generated kernels interpreted.

What is not among them, and why:

- One ``torch._scaled_mm`` over all out + r rows of W', with O as a strided view of its result. The
  choice falls when a product first runs, on the device; the strides of what an op returns are part
  of the graphs that were compiled before, and kept on disk, which assert them. Laid out anew, O
  would cost a pass of its own: 2 · 2 · n · out bytes, a fifth of the product's time at 4096³.
- Inductor's templates of scaled_mm. They are made while Inductor compiles a graph
  (max_autotune), as part of it; there is nothing to call with operands. To let Inductor have the
  products one would lower the ops to ``aten._scaled_mm`` before anything is timed, and lose O_A in
  its own tiles, the extra term and the kernels that add up siblings.
- dL/dB in the pass that casts dL/dO. Inductor casts dL/dO where it is made, dL/dB reads it once;
  a kernel for both would read it once and write its FP8, which is as many bytes. Where a library
  kernel makes dL/dO it would save one read of two, but a row's scale must be known before its first
  tile is cast: rowwise it needs that read for the scale.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from falqon_fx import serving
from falqon_fx._compat import scaled_mm
from falqon_fx.products import plain_grad_b

from . import backward, stored
from .backward_spec import GradBSpec
from .choice import Candidate, Choice, choices_for
from .gemm import Piece, Product, gemm, programs
from .gemm_spec import Accumulation, GemmSpec
from .interpreter import runs_interpreted
from .loader import serves
from .spec import InputDtype
from .tiles import GemmProblem, gemm_specs, likeliest

E4M3 = torch.float8_e4m3fn
Transpose = Literal["auto", "transient", "store", "kernel"]
Turn = Callable[[Tensor], Tensor]  # W [out, in] -> Wᵀ
_TIMED = 3  # generated kernels that are tried for one problem
_MAX_PIECES = 8  # weights in one launch
_MAX_RANK = 256  # of the term that is added


@dataclass(frozen=True)
class Options:
    """How the products are to be computed (see `FalqonConfig`)."""

    kernel: str = "auto"
    accumulation: Accumulation = "fast"
    transpose: Transpose = "auto"


def forward(
    q: Tensor,
    q_scale: Tensor,
    pieces: Sequence[Piece],
    a_pieces: int,
    out_dtype: torch.dtype,
    a_dtype: torch.dtype,
    options: Options,
) -> list[Tensor]:
    """Y_g = (q · W_gᵀ) ⊙ s_q ⊙ s_W,g + left_g · right_gᵀ + bias_g: one [n, rows_g] for each piece,
    the last ``a_pieces`` side by side in one (O_A).

    Raises ValueError where no kernel, or not the one asked for, takes the operands; the message
    holds the reason of each.
    """
    contest = forward_contest(q, q_scale, pieces, a_pieces, out_dtype, a_dtype, options)
    return _run(contest, q, options)


def grad_x(
    products: Sequence[Product],
    left: Tensor | None,
    right: Tensor | None,
    x_dtype: torch.dtype,
    options: Options,
) -> Tensor:
    """dL/dx [n, in] = Σ_s (q_s · W_s) ⊙ s_q,s + left · rightᵀ, for weights W_s [out_s, in] as
    stored. ``left`` [n, r] and ``right`` [in, r] have one dtype.

    Where the tensor cores want Wᵀ row by row, its bytes are transposed first, each time
    (transpose="transient"), or a copy is kept beside W (transpose="store"), unless a kernel reads W
    as it lies (transpose="kernel"). "auto" takes the faster of the first and the last.

    Raises ValueError as `forward` does.
    """
    (result,) = _run(
        grad_x_contest(products, left, right, x_dtype, options), products[0].q, options
    )
    return result


def grad_b(
    grad: Tensor, out_a: Tensor, scaling: float, b_dtype: torch.dtype, kernel: str
) -> Tensor:
    """dL/dB [out, r] = scaling · gradᵀ · out_a, for dL/dO [n, out] and O_A [n, r].

    Raises ValueError as `forward` does.
    """
    wanted = kernel if kernel in ("triton", "dequantize") else "auto"
    contest = grad_b_contest(grad, out_a, scaling, b_dtype)
    (result,) = _run(contest, grad, Options(kernel=wanted))
    return result


@dataclass(frozen=True)
class Contest:
    """The implementations of one product on given operands; ``key`` says what it is."""

    key: str
    candidates: dict[str, Candidate]


def forward_contest(
    q: Tensor,
    q_scale: Tensor,
    pieces: Sequence[Piece],
    a_pieces: int,
    out_dtype: torch.dtype,
    a_dtype: torch.dtype,
    options: Options,
) -> Contest:
    """What could compute `forward`."""
    problem = _problem(q, q_scale, pieces, a_pieces, out_dtype, a_dtype, options)
    y_pieces = len(pieces) - a_pieces
    dtypes = [out_dtype] * y_pieces + [a_dtype] * a_pieces
    typed = [*zip(pieces, dtypes, strict=True)]
    mode = options.accumulation

    def library() -> list[Tensor]:
        return _join([_scaled_mm(q, q_scale, p, dtype, mode) for p, dtype in typed], a_pieces)

    def plain() -> list[Tensor]:
        return _join([_plain(q, q_scale, p, dtype) for p, dtype in typed], a_pieces)

    candidates: dict[str, Candidate] = dict(_triton(problem, q, q_scale, pieces))
    candidates["scaled_mm"] = library
    if 0 < a_pieces < len(pieces):
        # O by the library, and all of O_A by one skinny kernel of ours.
        rest = pieces[y_pieces:]
        narrow = replace(problem, rows=problem.rows[y_pieces:], bias="none")
        for name, skinny in _triton(narrow, q, q_scale, rest):

            def both(skinny: Candidate = skinny) -> list[Tensor]:
                wide = [_scaled_mm(q, q_scale, p, dtype, mode) for p, dtype in typed[:y_pieces]]
                return [*wide, *skinny()]

            candidates[f"scaled_mm+{name}"] = both
    candidates["dequantize"] = plain
    return Contest(_key("forward", problem), candidates)


def grad_x_contest(
    products: Sequence[Product],
    left: Tensor | None,
    right: Tensor | None,
    x_dtype: torch.dtype,
    options: Options,
) -> Contest:
    """What could compute `grad_x`; each gives a list of one."""
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

        def library() -> list[Tensor]:
            mode = options.accumulation
            parts = [
                _scaled_mm(p.q, p.q_scale, Piece(turn(p.weight), None), x_dtype, mode)
                for p in products
            ]
            return [_finish(_sum(parts), piece, x_dtype)]

        candidates[f"scaled_mm{suffix}"] = library

    def plain() -> list[Tensor]:
        parts = [
            (_decoded(p.q, x_dtype) @ _decoded(p.weight, x_dtype)).to(torch.float32) * p.q_scale
            for p in products
        ]
        return [_finish(_sum(parts), piece, x_dtype)]

    candidates["dequantize"] = plain
    return Contest(_key("dL/dx", problem), candidates)


def grad_b_contest(grad: Tensor, out_a: Tensor, scaling: float, b_dtype: torch.dtype) -> Contest:
    """What could compute `grad_b`; each gives a list of one."""
    interpreted = runs_interpreted(grad)
    spec = GradBSpec.for_rank(
        out_a.shape[1],
        grad_dtype=_name(grad.dtype),
        a_dtype=_name(out_a.dtype),
        b_dtype=_name(b_dtype),
        operands="float32" if interpreted else "native",
    )

    def generated() -> list[Tensor]:
        if why := _untried(interpreted):
            return _refuse(why)
        return [backward.grad_b(grad, out_a, scaling, spec)]

    candidates: dict[str, Candidate] = {
        f"triton:{spec.name}": generated,
        "dequantize": lambda: [plain_grad_b(grad, out_a, scaling, b_dtype)],
    }
    return Contest(f"dL/dB n={_bucket(len(grad))} out={grad.shape[1]} {spec.name}", candidates)


def forward_choice(device: torch.device, features: int, out: int) -> Choice | None:
    """The newest choice made on ``device`` for the forward product of a site's shape, if any."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    wanted = (f" k={features},", f" rows=({out},")
    made = [c for c in choices_for(device).all() if c.key.startswith("forward ")]
    matching = [c for c in made if all(text in c.key for text in wanted)]
    return matching[-1] if matching else None


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


def _run(contest: Contest, like: Tensor, options: Options) -> list[Tensor]:
    candidates = contest.candidates
    plain_here = not like.is_cuda and options.kernel == "auto"
    if plain_here or like.shape[0] == 0:
        result: list[Tensor] = candidates["dequantize"]()
        return result
    # While a CUDA graph is captured nothing can be timed; warming up came before.
    time = like.is_cuda and not torch.cuda.is_current_stream_capturing()
    choice = choices_for(like.device).get(contest.key, candidates, options.kernel, time=time)
    result = candidates[choice.winner]()
    return result


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
        yield "triton", functools.partial(_refuse, why)
        return
    for name, spec in _specs(_rounded(problem), where, programs(q.device)):
        yield name, functools.partial(_generated, q, q_scale, pieces, spec, more, turn, problem)


@functools.lru_cache(maxsize=4096)  # each call of each product of a step asks
def _specs(problem: GemmProblem, where: int, processors: int) -> list[tuple[str, GemmSpec]]:
    """Names and specs of the kernels to try, in the order of all that share a choice."""
    specs = likeliest(gemm_specs(problem, where), problem, processors)[:_TIMED]
    for spec in specs:
        serves(spec, serving.sites(_weights(problem)))
    return [(f"triton:{spec.name}", spec) for spec in specs]


def _weights(problem: GemmProblem) -> list[tuple[int | None, int]]:
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
    if problem.rank > _MAX_RANK:
        return f"rank {problem.rank}, more than {_MAX_RANK}"
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
    q: Tensor, q_scale: Tensor, piece: Piece, dtype: torch.dtype, accumulation: Accumulation
) -> Tensor:
    """One piece by the library: its own GEMM, then the extra term and the bias."""
    n, rows = q.shape[0], piece.weight.shape[0]
    one = torch.ones((), dtype=torch.float32, device=q.device)
    w_scale = one if piece.scale is None else piece.scale
    if q_scale.numel() > 1 or w_scale.numel() > 1:  # the library wants both by row, or neither
        q_scale = q_scale.reshape(-1, 1).expand(n, 1).contiguous()
        w_scale = w_scale.reshape(1, -1).expand(1, rows).contiguous()
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    fast = accumulation == "fast"
    y = scaled_mm(q, piece.weight.t(), q_scale, w_scale, out_dtype=wide, use_fast_accum=fast)
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
    biases = {_name(p.bias.dtype) for p in pieces if p.bias is not None}
    scales = [p.scale for p in pieces]
    rows = tuple(p.weight.shape[0] for p in pieces)
    ends = [p.weight.data_ptr() + p.weight.numel() for p in pieces]
    return GemmProblem(
        n=n,
        k=k,
        rows=rows,
        a_pieces=a_pieces,
        x="e4m3" if q.dtype == E4M3 else "e5m2",
        x_scale="row" if q_scale.dim() == 2 else "tensor",
        w_scale="none" if scales[0] is None else "row" if scales[0].dim() == 2 else "tensor",
        out_dtype=_name(out_dtype),
        a_dtype=_name(a_dtype),
        bias=biases.pop() if len(biases) == 1 else "none",
        rank=max(0 if p.right is None else p.right.shape[1] for p in pieces),
        accumulation=options.accumulation,
        one_tensor=all(a == b.weight.data_ptr() for a, b in zip(ends, pieces[1:], strict=False)),
    )


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
