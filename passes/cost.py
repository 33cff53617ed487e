"""The cost model: FLOPs and bytes of one Linear+LoRA layer and step, and when merging it pays.

A variant is a list of kernels (`Kernel`), each with its FLOPs, its bytes to and from memory and its
casts, as expressions in tokens n, in, out, rank r and written rows k: Python numbers, sympy
expressions or Dynamo's symbols alike. A kernel takes launch + max(FLOPs / rate, bytes / bandwidth,
casts / rate) (the roofline), and on a CPU the page faults of new memory: of what a layer hands out
or keeps for backward, since all layers' lives at once and is freed at the end of a step, whereas
one layer's temporaries become the next one's. A variant takes the sum, as on one stream. All terms
are affine in n, so the break-even is found exactly, segment by segment.

Variants of the step (paper sections 1 to 3; e bytes an activation, a bytes an adapter element):

    lora       O = x·Wᵀ + s·B(A x) in the model's dtype: what runs before the rewrite
    fp8_lora   the same with every GEMM in FP8: A, B and O_A are cast each step (the problem)
    merged     one FP8 GEMM on W' = [W; A] with FP8 matrix units
    emulated   the same arithmetic where there are none: W' is decoded and multiplied in bf16
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.passes import cards
from falqon_fx.passes.cards import Card
from falqon_fx.report import Cost, Rejected, Site

N, IN, OUT, R, K = sympy.symbols("n in out r k", positive=True, integer=True)
_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
_ADAM = 7  # p, g, m, v read; p, m, v written


@dataclass(frozen=True)
class Kernel:
    """One launch: FLOPs of its matrix product in ``dtype``, bytes moved, elements cast, and those
    bytes of its result that are kept or handed out.
    """

    phase: str
    name: str
    dtype: str
    flops: Any
    bytes: Any
    casts: Any = 0
    kept: Any = 0


@dataclass(frozen=True)
class Shape:
    """A layer and its step, in numbers or expressions.

    ``siblings`` layers share x, so that its cast is counted 1 / siblings times for each.
    """

    n: Any = N
    features: Any = IN
    out: Any = OUT
    rank: Any = R
    rows: Any = K
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    pending: bool = True
    train_a: bool = True
    siblings: int = 1


def lora(s: Shape) -> list[Kernel]:
    """The layer as PEFT computes it, elementwise work fused as Inductor does."""
    n, i, o, r = s.n, s.features, s.out, s.rank
    e, a = _WIDTH[s.dtype], _WIDTH[s.adapter_dtype]
    wide = s.adapter_dtype
    kernels = [_gemm("forward", "x·Wᵀ", s.dtype, n, i, o, e)]
    if e != a:
        kernels.append(Kernel("forward", "cast x", wide, 0, n * i * (e + a), kept=n * i * a))
    kernels += [
        _gemm("forward", "A", wide, n, i, r, a),
        _gemm("forward", "B", wide, n, r, o, a),
        Kernel("forward", "add", wide, 0, n * o * (2 * e + a), kept=n * o * e),
        _gemm("backward", "dO·W", s.dtype, n, o, i, e),
        Kernel("backward", "s·dO", wide, 0, n * o * (e + a)),
        _gemm("backward", "dO·B", wide, n, o, r, a),
        _gemm("backward", "dO_A·A", wide, n, r, i, a),
        Kernel("backward", "add", wide, 0, n * i * (2 * e + a), kept=n * i * e),
        _gemm("backward", "dB", wide, o, n, r, a),
    ]
    if s.train_a:
        kernels.append(_gemm("backward", "dA", wide, r, n, i, a))
    return [*kernels, _optimizer(s, r * (i * int(s.train_a) + o))]


def fp8_lora(s: Shape) -> list[Kernel]:
    """FP8 GEMMs with a separate LoRA path, one scale a tensor: amax, then cast, of each operand."""
    n, i, o, r = s.n, s.features, s.out, s.rank
    e, a = _WIDTH[s.dtype], _WIDTH[s.adapter_dtype]
    return [
        *_cast("forward", "x", n * i, e),
        *_cast("forward", "A", r * i, a),
        *_cast("forward", "B", o * r, a),
        _gemm("forward", "x·Wᵀ", "float8", n, i, o, 1, e),
        _gemm("forward", "A", "float8", n, i, r, 1, e),
        *_cast("forward", "O_A", n * r, e),
        _gemm("forward", "B", "float8", n, r, o, 1, e),
        Kernel("forward", "add", s.dtype, 0, 3 * n * o * e, kept=n * o * e),
        *_cast("backward", "dO", n * o, e),
        _gemm("backward", "dO·W", "float8", n, o, i, 1, e),
        _gemm("backward", "dO·B", "float8", n, o, r, 1, e),
        *_cast("backward", "dO_A", n * r, e),
        _gemm("backward", "dO_A·A", "float8", n, r, i, 1, e),
        Kernel("backward", "add", s.dtype, 0, 3 * n * i * e, kept=n * i * e),
        _gemm("backward", "dB", "float8", o, n, r, 1, a),
        *([_gemm("backward", "dA", "float8", r, n, i, 1, a)] if s.train_a else []),
        _optimizer(s, r * (i * int(s.train_a) + o)),
    ]


def merged(s: Shape) -> list[Kernel]:
    """The merged op on FP8 matrix units; x and dL/dO are cast in one pass each, row by row."""
    n, i, o, r = s.n, s.features, s.out, s.rank
    e = _WIDTH[s.dtype]
    kernels = [
        Kernel("forward", "cast x", "float8", 0, n * i * (e + 1) / s.siblings),
        _handed_out(_gemm("forward", "x·W'ᵀ", "float8", n, i, o + r, 1, e), n * o * e),
        Kernel("backward", "cast dO", "float8", 0, n * o * (e + 1)),
        _handed_out(_gemm("backward", "dO·W", "float8", n, o, i, 1, e), n * i * e),
        _gemm("backward", "dB", s.dtype, o, n, r, e),
    ]
    return [*kernels, *_pending(s), _optimizer(s, r * o), *_write_back(s)]


def emulated(s: Shape) -> list[Kernel]:
    """The merged op as ATen: casts that keep bf16, W' decoded before each GEMM."""
    n, i, o, r = s.n, s.features, s.out, s.rank
    e = _WIDTH[s.dtype]
    kernels = [
        Kernel("forward", "cast x", s.dtype, 0, n * i * 2 * e / s.siblings, n * i / s.siblings),
        Kernel("forward", "decode W'", s.dtype, 0, i * (o + r) * (1 + e), i * (o + r)),
        _handed_out(_gemm("forward", "x·Wᵀ", s.dtype, n, i, o, e), n * o * e),
        _gemm("forward", "x·Aᵀ", s.dtype, n, i, r, e),
        Kernel("backward", "cast dO", s.dtype, 0, n * o * 2 * e, n * o),
        Kernel("backward", "decode W'", s.dtype, 0, i * (o + r) * (1 + e), i * (o + r)),
        _handed_out(_gemm("backward", "dO·W", s.dtype, n, o, i, e), n * i * e),
        _gemm("backward", "dB", s.dtype, o, n, r, e),
    ]
    return [*kernels, *_pending(s), _optimizer(s, r * o), *_write_back(s)]


Variant = Callable[[Shape], list[Kernel]]
VARIANTS: dict[str, Variant] = {
    "lora": lora,
    "fp8_lora": fp8_lora,
    "merged": merged,
    "emulated": emulated,
}


def _gemm(
    phase: str, name: str, dtype: str, m: Any, k: Any, n: Any, width: int, out_width: int = 0
) -> Kernel:
    """[m, k] · [k, n]."""
    moved = width * (m * k + k * n) + (out_width or width) * m * n
    return Kernel(phase, name, dtype, 2 * m * k * n, moved)


def _handed_out(kernel: Kernel, kept: Any) -> Kernel:
    return replace(kernel, kept=kept)


def _adding(phase: str, name: str, dtype: str, m: Any, k: Any, n: Any, width: int) -> Kernel:
    """[m, k] · [k, n] added to what is there."""
    moved = width * (m * k + k * n + 2 * m * n)
    return Kernel(phase, name, dtype, 2 * m * k * n, moved)


def _cast(phase: str, name: str, count: Any, width: int) -> list[Kernel]:
    return [
        Kernel(phase, f"amax {name}", "float8", 0, count * width),
        Kernel(phase, f"cast {name}", "float8", 0, count * (width + 1), count),
    ]


def _pending(s: Shape) -> list[Kernel]:
    """What W' does not hold yet, added on both ways: O_A·pendingᵀ and (dO·pending)·A."""
    if not s.pending:
        return []
    n, i, o, r, e = s.n, s.features, s.out, s.rank, _WIDTH[s.dtype]
    return [
        Kernel("forward", "B - applied", s.dtype, 0, o * r * (_WIDTH[s.adapter_dtype] + 2 * e)),
        _adding("forward", "O_A·pendingᵀ", s.dtype, n, r, o, e),
        _gemm("backward", "dO·pending", s.dtype, n, o, r, e),
        _adding("backward", "(dO·pending)·A", s.dtype, n, r, i, e),
    ]


def _optimizer(s: Shape, parameters: Any) -> Kernel:
    return Kernel("update", "AdamW", "float32", 0, _ADAM * 4 * parameters)


def _write_back(s: Shape) -> list[Kernel]:
    """Fingerprints of B and A, scores of all rows, and k rows read, changed and written."""
    i, o, r, k = s.features, s.out, s.rank, s.rows
    a = _WIDTH[s.adapter_dtype]
    return [
        Kernel("update", "fingerprints", "float32", 0, a * r * (o + i)),
        Kernel("update", "scores", "float32", 0, r * o * (a + _WIDTH[s.dtype])),
        Kernel("update", "rows", "float32", 2 * k * r * i, i * (2 * k + r), k * i),
    ]


def flops(kernels: list[Kernel], phase: str | None = None) -> Any:
    """FLOPs of the matrix products of a phase ("forward", "backward", "update"), or of all."""
    return sum(k.flops for k in kernels if phase in (None, k.phase))


def moved(kernels: list[Kernel], phase: str | None = None) -> Any:
    """Bytes to and from memory of a phase, or of all."""
    return sum(k.bytes for k in kernels if phase in (None, k.phase))


def seconds(kernels: list[Kernel], card: Card, phase: str | None = None) -> Any:
    """Predicted time of a phase, or of all: a number, or a sympy expression in what is symbolic.

    Raises:
        FalqonError: the card has no matrix unit for a kernel's dtype.
    """
    return sum(_time(k, card) for k in kernels if phase in (None, k.phase))


def _time(kernel: Kernel, card: Card) -> Any:
    bounds = _bounds(kernel, card)
    symbolic = any(isinstance(b, sympy.Basic) and b.free_symbols for b in bounds)
    longest = sympy.Max(*bounds) if symbolic else max(map(float, bounds))
    faults = kernel.kept / card.fresh if card.fresh else 0
    return card.launch + longest + faults


def _bounds(kernel: Kernel, card: Card) -> list[Any]:
    """What each resource of the card alone would take."""
    bounds = [kernel.bytes / card.bandwidth]
    if kernel.flops != 0:
        name = "bfloat16" if kernel.dtype == "float16" else kernel.dtype
        if name not in card.flops:
            raise FalqonError(card.name, f"has no {name} matrix units", "Compare another variant")
        bounds = [kernel.bytes / card.thin.get(name, card.bandwidth)]
        bounds.append(kernel.flops / card.flops[name])
    if kernel.casts != 0 and card.casts:
        bounds.append(kernel.casts / card.casts)
    return bounds


def break_even(before: Variant, after: Variant, shape: Shape, card: Card) -> int | None:
    """The least number of tokens from which on ``after`` is never slower than ``before``.

    1 where it never is, None where it is slower in the end. Exact: the difference of the two times
    is piecewise affine in n, and its pieces end where two bounds of a kernel cross.
    """

    def gain(n: float) -> float:
        at = replace(shape, n=n)
        return float(seconds(before(at), card)) - float(seconds(after(at), card))

    points = sorted({1.0, *_crossings(before, shape, card), *_crossings(after, shape, card)})
    end = 2 * points[-1] + 1
    slope = (gain(2 * end) - gain(end)) / end
    if slope < 0 or (slope == 0 and gain(end) < 0):
        return None
    if gain(end) < 0:  # the last piece rises above zero later
        return _ceil(end - gain(end) / slope)
    upper = end
    for lower in reversed(points):
        low, high = gain(lower), gain(upper)
        if low < 0:
            return _ceil(lower + (upper - lower) * -low / (high - low))
        upper = lower
    return 1


def _crossings(variant: Variant, shape: Shape, card: Card) -> Iterator[float]:
    """The n > 1 at which one bound of a kernel overtakes another."""
    first, second = (variant(replace(shape, n=n)) for n in (1, 2))
    for one, two in zip(first, second, strict=True):
        lines = [(a, b - a) for a, b in zip(_bounds(one, card), _bounds(two, card), strict=True)]
        for (a, slope_a), (b, slope_b) in itertools.combinations(lines, 2):
            if slope_a != slope_b and (n := 1 + (a - b) / (slope_b - slope_a)) > 1:
                yield float(n)


def _ceil(value: float) -> int:
    # An exact crossing may come out a rounding error above an integer.
    return max(1, math.ceil(value - 1e-6))


def shape_of(site: Site, pending: bool, siblings: int) -> Shape:
    """The layer of a site, tokens left open."""
    return Shape(
        features=site.in_features,
        out=site.out_features,
        rank=site.rank,
        rows=site.rows,
        dtype=site.out_dtype,
        adapter_dtype=site.adapter_dtype,
        pending=pending,
        train_a=site.train_a,
        siblings=siblings,
    )


def variant_of(kernel: str) -> str:
    """The variant that a kernel of the plan runs."""
    return "emulated" if kernel == "aten" else "merged"


TOKENS = tuple(2**i for i in range(4, 18))  # where a report states the speed-up


def predict(shape: Shape, after: str, card: Card, tokens: int) -> Cost:
    """What the rewrite of a layer from "lora" to the variant ``after`` is predicted to bring at
    ``tokens`` tokens and as a function of them.
    """
    old, new = VARIANTS["lora"], VARIANTS[after]

    def both(n: int) -> tuple[float, float]:
        at = replace(shape, n=n)
        return float(seconds(old(at), card)), float(seconds(new(at), card))

    at = replace(shape, n=tokens)
    return Cost(
        card=card.name,
        variant=after,
        tokens=tokens,
        seconds_before=both(tokens)[0],
        seconds_after=both(tokens)[1],
        flops_before=int(flops(old(at))),
        flops_after=int(flops(new(at))),
        moved_before=int(moved(old(at))),
        moved_after=int(moved(new(at))),
        break_even=break_even(old, new, shape, card),
        speedup={n: before / after for n in TOKENS for before, after in [both(n)]},
    )


def losing(site: Site, config: FalqonConfig, device: torch.device) -> Rejected | None:
    """The refusal of a site whose predicted gain lies below ``config.min_gain``.

    Raises:
        FalqonError: ``min_gain`` is set and nothing is known of the card.
    """
    if config.min_gain is None:
        return None
    card = cards.find(config.card) if config.card else cards.at_hand(device)
    if card is None:
        raise FalqonError("min_gain", *cards.unknown(device))
    shape = replace(shape_of(site, config.pending == "apply", 1), n=site.tokens_hint)
    after = VARIANTS[variant_of(site.kernel)]
    gain = float(seconds(lora(shape), card)) / float(seconds(after(shape), card))
    if gain >= config.min_gain:
        return None
    return Rejected(
        site.path,
        f"merged it is predicted to run {gain:.2f} times as fast at {site.tokens_hint} tokens on "
        f"{card.name}, below min_gain={config.min_gain:g}",
        "Use more tokens a step, or a lower min_gain",
        site.source,
    )
