"""One Linear+LoRA layer's step as a list of kernels, as it runs before the rewrite and after.

Each kernel (`Kernel`) has its FLOPs, its bytes to and from memory and its casts, as expressions in
tokens n, in, out and rank r: Python numbers, sympy expressions or Dynamo's symbols alike, affine in
n. e is bytes an activation, a bytes an adapter element, g bytes an operand that is multiplied in 16
or 32 bits:

    lora       O = x·Wᵀ + s·B(A x) in the model's dtype: what runs before the rewrite
    fp8_lora   the same with every GEMM in FP8: A, B and O_A are cast each step (the problem)
    merged     FP8 GEMMs with FP8 matrix units; s·O_A·Bᵀ and D·A come in their epilogues
    emulated   the same arithmetic where there are none: W is decoded and multiplied in g bytes

In INT8 both multiply integers forward, and decoded ones, A's behind W's, for dL/dx.

W is constant: nothing is cast of it in a step. A and s·B are cast in each forward pass. Where A
trains, the cast of x is kept for dL/dA: n·in bytes on FP8 units, shared by siblings. What a
calibration has added (`falqon_fx.prepare`) is a frozen adapter more, and a product of a few columns
of x behind the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
_ADAM = 7  # p, g, m, v read; p, m, v written


@dataclass(frozen=True)
class Kernel:
    """One launch, or a part of one that siblings share.

    Attributes:
        flops: of its matrix product in ``dtype``; ``added`` those of one in ``added_dtype`` that
            its epilogue adds.
        bytes: moved to and from memory.
        casts: elements cast to or from FP8 on a CPU.
        kept: those bytes of its result that are kept for backward or handed out.
        launches: 1 / the number of layers that share it.
    """

    phase: str
    name: str
    dtype: str
    flops: Any
    bytes: Any
    casts: Any = 0
    kept: Any = 0
    launches: float = 1.0
    added: Any = 0
    added_dtype: str = ""


@dataclass(frozen=True)
class Shape:
    """A layer and its step, in numbers or expressions. Rank 0 is a frozen layer without an adapter.

    ``siblings`` layers share x, ``adapted`` of them have an adapter: what is done once for all
    counts 1 / siblings times for each. ``wide`` is the dtype of products that are not in FP8;
    bfloat16 for bfloat16 and else float32 where nothing is given. ``compensate`` and ``outliers``
    are the ranks and the channels of a calibration. W takes ``width`` bytes a weight: 1, or less in
    NVFP4, which is decoded where it is multiplied, and so multiplied in ``wide``. ``integers``: W,
    x and A are INT8.
    """

    n: Any
    features: Any
    out: Any
    rank: Any
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    train_a: bool = True
    train_b: bool = True
    siblings: int = 1
    adapted: int = 1
    wide: str = ""
    compensate: Any = 0
    outliers: Any = 0
    width: float = 1
    integers: bool = False

    @property
    def low(self) -> Any:
        """The rows of A, with those of A_c."""
        return self.rank + self.compensate

    @property
    def added(self) -> Any:
        """The columns of b: of B, B_c and W_S."""
        return self.low + self.outliers

    @property
    def operands(self) -> str:
        return self.wide or ("bfloat16" if self.dtype == "bfloat16" else "float32")


def symbolic() -> Shape:
    """The layer whose n, in, out and r are sympy symbols: its FLOPs and bytes are formulas."""
    import sympy

    return Shape(*sympy.symbols("n in out r", positive=True, integer=True))


def lora(s: Shape) -> list[Kernel]:
    """The layer as PEFT computes it, elementwise work fused as Inductor does."""
    n, i, o, r, e = s.n, s.features, s.out, s.rank, WIDTH[s.dtype]
    a, wide = WIDTH[s.adapter_dtype], s.adapter_dtype
    share, each = 1 / s.siblings, 1 / s.adapted
    product = _gemm("forward", "x·Wᵀ", s.dtype, n, i, o, e)
    back = _gemm("backward", "dO·W", s.dtype, n, o, i, e)
    # What siblings give back to x is summed up in one pass, each layer's own adapter with it.
    summed = n * i * e * (1 + share)
    kept = n * i * e * share
    if s.rank == 0:
        kernels = [_kept(product, n * o * e), _kept(back, kept)]
        if s.siblings > 1:
            kernels.append(Kernel("backward", "add", s.dtype, 0, summed, launches=share))
        return kernels
    kernels = [product]
    if e != a:
        of_x = n * i * a * each if s.train_a else 0
        bytes_of_x = n * i * (e + a) * each
        kernels.append(Kernel("forward", "cast x", wide, 0, bytes_of_x, kept=of_x, launches=each))
    kernels += [
        _kept(_gemm("forward", "A", wide, n, i, r, a), n * r * a * int(s.train_b)),
        _gemm("forward", "B", wide, n, r, o, a),
        Kernel("forward", "add", wide, 0, n * o * (2 * e + a), kept=n * o * e),
        back,
        Kernel("backward", "s·dO", wide, 0, n * o * (e + a)),
        _gemm("backward", "dO·B", wide, n, o, r, a),
        _gemm("backward", "dO_A·A", wide, n, r, i, a),
        Kernel("backward", "add", wide, 0, summed + n * i * a, kept=kept, launches=share),
    ]
    if s.train_b:
        kernels.append(_gemm("backward", "dB", wide, o, n, r, a))
    if s.train_a:
        kernels.append(_gemm("backward", "dA", wide, r, n, i, a))
    return [*kernels, *optimizer(s)]


def fp8_lora(s: Shape) -> list[Kernel]:
    """FP8 GEMMs with a separate LoRA path, one scale a tensor: amax, then cast, of each operand."""
    n, i, o, r = s.n, s.features, s.out, s.rank
    e, a = WIDTH[s.dtype], WIDTH[s.adapter_dtype]
    kernels = [
        *_cast("forward", "x", n * i, e),
        _gemm("forward", "x·Wᵀ", "float8", n, i, o, 1, e),
        *_cast("backward", "dO", n * o, e),
        _gemm("backward", "dO·W", "float8", n, o, i, 1, e),
    ]
    if s.rank == 0:
        return kernels
    kernels += [
        *_cast("forward", "A", r * i, a),
        *_cast("forward", "B", o * r, a),
        _gemm("forward", "A", "float8", n, i, r, 1, e),
        *_cast("forward", "O_A", n * r, e),
        _gemm("forward", "B", "float8", n, r, o, 1, e),
        Kernel("forward", "add", s.dtype, 0, 3 * n * o * e),
        _gemm("backward", "dO·B", "float8", n, o, r, 1, e),
        *_cast("backward", "dO_A", n * r, e),
        _gemm("backward", "dO_A·A", "float8", n, r, i, 1, e),
        Kernel("backward", "add", s.dtype, 0, 3 * n * i * e),
    ]
    if s.train_b:
        kernels.append(_gemm("backward", "dB", "float8", o, n, r, 1, a))
    if s.train_a:
        kernels.append(_gemm("backward", "dA", "float8", r, n, i, 1, a))
    return [*kernels, *optimizer(s)]


def merged(s: Shape) -> list[Kernel]:
    """The op on FP8 matrix units (`falqon_fx.ops.gpu`): casts of x and of dL/dO in one pass each,
    row by row, and one launch each way for all siblings.
    """
    n, i, o, r, e = s.n, s.features, s.out, s.low, WIDTH[s.dtype]
    g, share, each = WIDTH[s.operands], 1 / s.siblings, 1 / s.adapted
    columns = s.added
    kept = n * i * share if s.train_a and s.rank != 0 else 0
    eight = "int8" if s.integers else "float8"
    multiplied = eight if s.width == 1 else s.operands
    product = Kernel(
        "forward",
        "x·Wᵀ + s·O_A·Bᵀ",
        multiplied,
        2 * n * i * o,
        n * i * share + i * o * s.width + n * o * e + (n + o) * columns * g,
        kept=n * o * e,
        launches=share,
        added=2 * n * columns * o,
        added_dtype=s.operands,
    )
    back = [
        Kernel("backward", "cast dO", "float8", 0, n * o * (e + 1)),
        Kernel(
            "backward",
            "dO·W + D·A",
            multiplied,
            2 * n * i * o,
            n * o + i * o * s.width + n * i * e * share + (n * r + r * i) * g,
            kept=n * i * e * share,
            launches=share,
            added=2 * n * r * i,
            added_dtype=s.operands,
        ),
    ]
    cast = n * i * (e + 1) * share
    kernels = [
        Kernel("forward", "cast x", eight, 0, cast, kept=kept, launches=share),
        product,
        *(_decoded_grad_x(s) if s.integers else back),
        *_error_of_x(s),
        *(_adapter(s, eight, 1) if s.low != 0 else ()),
    ]
    if s.rank == 0:
        return kernels
    if s.train_a:
        widened = n * i * (1 + g) * each
        kernels.append(Kernel("backward", "widen x", s.operands, 0, widened, launches=each))
    return [*kernels, *optimizer(s)]


def _decoded_grad_x(s: Shape) -> list[Kernel]:
    """dL/dx of INT8 on a GPU: dL/dO times the scales of rows, and integers decoded."""
    n, i, o, r, e = s.n, s.features, s.out, s.low, WIDTH[s.dtype]
    wide, g, share = s.operands, WIDTH[s.operands], 1 / s.siblings
    moved = g * (n * (o + r) + (o + r) * i) + n * i * e * share
    product = Kernel("backward", "[dO | D]·[W; A]", wide, 2 * n * (o + r) * i, moved)
    return [
        Kernel("backward", "scale dO", wide, 0, n * o * (e + g)),
        Kernel("backward", "decode W", wide, 0, i * o * (1 + g)),
        replace(product, kept=n * i * e * share, launches=share),
    ]


def emulated(s: Shape) -> list[Kernel]:
    """The op as ATen (`falqon_fx.ops.lowering`): casts that keep g bytes an element, W and A
    decoded before each product; siblings share one dL/dx.
    """
    n, i, o, r, e = s.n, s.features, s.out, s.low, WIDTH[s.dtype]
    wide, g, share = s.operands, WIDTH[s.operands], 1 / s.siblings
    x, eight = (1, "int8") if s.integers else (g, wide)
    kept = n * i * x * share if s.train_a and s.rank != 0 else 0
    decode = (wide, 0, i * o * (s.width + g), i * o)
    out, grad_x = n * o * e, n * i * e * share
    product = [
        Kernel("forward", "decode W", *decode),
        _gemm("forward", "x·Wᵀ", wide, n, i, o, g),
    ]
    if s.integers:
        rescaled = Kernel("forward", "scale O", wide, 0, n * o * (4 + g))
        product = [_gemm("forward", "x·Wᵀ", eight, n, i, o, 1, 4), rescaled]
    back = Kernel(
        "backward",
        "[dO | D]·[W; A]",
        wide,
        2 * n * (o + r) * i,
        g * (n * (o + r) + (o + r) * i + n * i * share),
        launches=share,
    )
    kernels = [
        Kernel("forward", "cast x", wide, 0, n * i * (e + x) * share, n * i * share, kept, share),
        *product,
        Kernel("backward", "cast dO", wide, 0, n * o * (e + g), n * o),
        Kernel("backward", "decode W", *decode),
    ]
    if r != 0:
        kernels += [
            *(() if s.integers else (_decoded_a(s),)),
            *_adapter(s, eight, x),
            *_error_of_x(s),
            _adding("forward", "s·O_A·Bᵀ", wide, n, s.added, o, g),
        ]
        if e != g:
            kernels.append(Kernel("backward", "widen dO", wide, 0, n * o * (e + g)))
    if e == g:
        kernels[-1 if r != 0 else 2] = _kept(kernels[-1 if r != 0 else 2], out)
        kernels.append(_kept(back, grad_x))
    else:  # the results of the GEMMs, in the model's dtype
        kernels.append(Kernel("forward", "narrow O", wide, 0, n * o * (e + g), kept=out))
        kernels.append(back)
        narrowed = n * i * (e + g) * share
        kernels.append(Kernel("backward", "narrow dx", wide, 0, narrowed, 0, grad_x, share))
    if r == 0 and s.outliers != 0:
        kernels += [*_error_of_x(s), _adding("forward", "e·W_Sᵀ", wide, n, s.outliers, o, g)]
    return [*kernels, *(optimizer(s) if s.rank != 0 else ())]


def _decoded_a(s: Shape) -> Kernel:
    moved = s.low * s.features * (1 + WIDTH[s.operands])
    casts, each = s.low * s.features, 1 / s.adapted
    return Kernel("forward", "decode A", s.operands, 0, moved, casts, 0, each)


Variant = Callable[[Any], list[Kernel]]  # of a `Shape`, or of a kind of it
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


def _kept(kernel: Kernel, kept: Any) -> Kernel:
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


def _adapter(s: Shape, operands: str, x: int) -> list[Kernel]:
    """What both forms of the op do for an adapter, with A_c and B_c (bfloat16) as rows and columns
    of it; x is multiplied with A in the dtype ``operands`` of ``x`` bytes. D = dL/dO · s·B.
    """
    n, i, o, r, low = s.n, s.features, s.out, s.rank, s.low
    e, a, wide, g = WIDTH[s.dtype], WIDTH[s.adapter_dtype], s.operands, WIDTH[s.operands]
    each = 1 / s.adapted
    grad = e if operands == "float8" else g  # dL/dO, which a cast before may have widened
    kernels = [
        Kernel("forward", "cast A", wide, 0, (r * a + s.compensate * 2 + low) * i, low * i),
        Kernel("forward", "cast s·B", wide, 0, o * (r * a + (s.added - r) * 2 + s.added * g)),
        Kernel(
            "forward",
            "x·Aᵀ",
            operands,
            2 * n * i * low,
            n * i * x * each + low * i * x + n * low * g,
            kept=n * low * g * int(s.train_b) if s.rank != 0 else 0,
            launches=each,
        ),
        Kernel("backward", "D", wide, 2 * n * o * low, n * o * grad + (o + n) * low * g),
        Kernel("backward", "scale D", wide, 0, n * low * g * (2 + int(s.train_a))),
        Kernel("backward", "decode A", wide, 0, low * i * (1 + g), low * i, 0, each),
    ]
    if s.rank == 0:
        return kernels
    if s.train_b:
        moved = n * o * grad + n * r * g + o * r * a
        kernels.append(Kernel("backward", "dB", wide, 2 * n * o * r, moved))
    if s.train_a:
        moved = (n * i + n * r) * g + r * i * a
        kernels.append(Kernel("backward", "dA", wide, 2 * n * i * r, moved))
    return kernels


def _error_of_x(s: Shape) -> list[Kernel]:
    """The cast error of the channels of x that a calibration has chosen, for all siblings. Memory
    is read in pieces of 32 bytes.
    """
    if s.outliers == 0:
        return []
    n, c, g = s.n, s.outliers, WIDTH[s.operands]
    return [
        Kernel("forward", "error of x", s.operands, 0, n * c * (32 + g), n * c, 0, 1 / s.siblings)
    ]


def optimizer(s: Shape, adapters: Any = 1) -> list[Kernel]:
    """AdamW over A and B of so many ``adapters`` alike."""
    trained = adapters * s.rank * (s.features * int(s.train_a) + s.out * int(s.train_b))
    moved = _ADAM * WIDTH[s.adapter_dtype] * trained
    return [Kernel("update", "AdamW", "float32", 0, moved)] if s.train_a or s.train_b else []
