"""A stack of experts' step as a list of kernels, before the rewrite and after: what
`falqon_fx.cost.variants` is for a linear layer.

Each of the n rows of x is multiplied with the weights of `StackShape.top` experts, S = n · top rows
in all, in the order of the experts; every expert is taken to have rows. e, a and g are bytes as
there:

    lora       PEFT, traced and compiled: W + s·B·A of all experts in each pass, and dL/dW' in the
               model's dtype, of which dL/dA and dL/dB are made
    split      grouped products of W, A and B, each by itself in the model's dtype
    merged     FP8 products by the library's grouped kernel where it has one, else by the generated
               one with the adapter in its epilogue; dL/dx, O_A, D, dL/dA and dL/dB by generated
               ones, which gather rows of x as they read them
    emulated   the same arithmetic on a CPU, by compiled code or as ATen: W and A are decoded

Nothing grows with E but what belongs to weights: their bytes, their decoding, and the sums B·A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from falqon_fx.cost.variants import WIDTH, Kernel, Shape, Variant, optimizer


@dataclass(frozen=True)
class StackShape(Shape):
    """A stack [experts, out, in] and its step.

    Attributes:
        top: rows that are multiplied for each row of x.
        gathered: whether x's rows are read by an index, as those of the first stack of a layer are;
            dL/dx is then a sum over all that read a row.
        library: whether the card's library multiplies a stack in FP8 (sm_90 and sm_100).
        by_columns: whether the card multiplies FP8 that it reads by columns, as dL/dx W (sm_100);
            elsewhere the generated kernel decodes it, and multiplies in the dtype ``operands``.
    """

    experts: Any = 1
    top: Any = 1
    gathered: bool = True
    library: bool = True
    by_columns: bool = False

    @property
    def rows(self) -> Any:
        """S."""
        return self.n * self.top

    @property
    def weights(self) -> Any:
        """Elements of W."""
        return self.experts * self.features * self.out

    @property
    def of_a(self) -> Any:
        """Elements of A."""
        return self.experts * self.rank * self.features

    @property
    def of_b(self) -> Any:
        """Elements of B."""
        return self.experts * self.rank * self.out


def symbolic_stack() -> StackShape:
    """The stack whose n, in, out, r, E and top are sympy symbols."""
    import sympy

    names = "n in out r E k"
    n, features, out, rank, experts, top = sympy.symbols(names, positive=True, integer=True)
    return StackShape(n, features, out, rank, experts=experts, top=top)


def lora(s: StackShape) -> list[Kernel]:
    """PEFT's sum W + s·B·A, as `trace_param_wrappers` lets Inductor compile it."""
    e, i, o, r, rows = WIDTH[s.dtype], s.features, s.out, s.rank, s.rows
    result, grad = rows * o * e, s.n * i * e
    kernels = [*_gathering(s, e), _of_rows(s, "forward", "x·W'ᵀ", i, o, e, kept=result)]
    back = [
        _of_rows(s, "backward", "dO·W'", o, i, e, kept=0 if s.gathered else grad),
        *_summing(s, e),
    ]
    if s.rank == 0:
        return [*kernels, *back]
    a, trained = WIDTH[s.adapter_dtype], s.train_a or s.train_b
    low = s.of_a + s.of_b
    summed = Kernel(
        "forward",
        "W + s·B·A",
        s.dtype,
        2 * s.weights * r,
        e * (2 * s.weights + low),
        kept=e * s.weights,
    )
    narrowed = Kernel("forward", "A, B by expert", s.dtype, 0, low * (a + e))
    kernels = [narrowed, summed, *kernels]
    if trained:
        moved = e * (rows * (i + o) + s.weights)
        back.append(Kernel("backward", "dW'", s.dtype, 2 * rows * i * o, moved))
    for name, count, trains in (("dB", s.of_b, s.train_b), ("dA", s.of_a, s.train_a)):
        if trains:
            other = low - count
            product = e * (s.weights + other + count)
            back.append(Kernel("backward", name, s.dtype, 2 * s.weights * r, product))
            back.append(Kernel("backward", f"{name} as it lies", s.dtype, 0, count * (a + e)))
    return [*kernels, *back, *optimizer(s, s.experts)]


def split(s: StackShape) -> list[Kernel]:
    """W, A and B multiplied one by one, as Unsloth and others train mixtures."""
    e, i, o, r, rows = WIDTH[s.dtype], s.features, s.out, s.rank, s.rows
    result, grad = rows * o * e, s.n * i * e
    kernels = [*_gathering(s, e), _of_rows(s, "forward", "x·Wᵀ", i, o, e)]
    back = [_of_rows(s, "backward", "dO·W", o, i, e)]
    if s.rank == 0:
        kernels[-1] = replace(kernels[-1], kept=result)
        back[-1] = replace(back[-1], kept=0 if s.gathered else grad)
        return [*kernels, *back, *_summing(s, e)]
    a = WIDTH[s.adapter_dtype]
    low = s.of_a + s.of_b
    kernels += [
        Kernel("forward", "A, B by expert", s.dtype, 0, low * (a + e)),
        _of_rows(s, "forward", "x·Aᵀ", i, r, e, kept=rows * r * e),
        _of_rows(s, "forward", "O_A·Bᵀ", r, o, e),
        Kernel("forward", "add", s.dtype, 0, 3 * result, kept=result),
    ]
    back += [
        Kernel("backward", "s·dO", s.dtype, 0, 2 * result),
        _of_rows(s, "backward", "D", o, r, e),
        _of_rows(s, "backward", "D·A", r, i, e),
        Kernel("backward", "add", s.dtype, 0, 3 * rows * i * e, kept=0 if s.gathered else grad),
    ]
    return [*kernels, *back, *_gradients(s, e, e, e), *_summing(s, e), *optimizer(s, s.experts)]


def merged(s: StackShape) -> list[Kernel]:
    """The op on FP8 matrix units (`falqon_fx.ops.experts_lowering`)."""
    n, i, o, r, rows, e = s.n, s.features, s.out, s.rank, s.rows, WIDTH[s.dtype]
    wide, g = s.operands, WIDTH[s.operands]
    result = rows * o * e
    x_kept = n * i if s.train_a and r != 0 else 0
    kernels = [Kernel("forward", "cast x", "float8", 0, n * i * (e + 1), kept=x_kept)]
    if r != 0:
        read = (n if s.gathered else rows) * i
        low = Kernel(
            "forward",
            "x·Aᵀ",
            "float8",
            2 * rows * i * r,
            read + s.of_a + rows * r * g,
            kept=rows * r * g * int(s.train_b),
        )
        kernels += [*_adapter_casts(s), low]
    if s.library:
        kernels += _gathering(s, 1)
        moved = rows * i + s.weights + result
        product = Kernel("forward", "x·Wᵀ", "float8", 2 * rows * i * o, moved)
        if r == 0:
            kernels.append(replace(product, kept=result))
        else:
            added = Kernel("forward", "add", wide, 0, 3 * result, kept=result)
            kernels += [product, _of_rows(s, "forward", "O_A·Bᵀ", r, o, g), added]
    else:
        moved = (n if s.gathered else rows) * i + s.weights + result
        own = Kernel("forward", "x·Wᵀ + s·O_A·Bᵀ", "float8", 2 * rows * i * o, moved, kept=result)
        if r != 0:
            more = g * (rows * r + s.of_b)
            own = replace(own, bytes=moved + more, added=2 * rows * r * o, added_dtype=wide)
        kernels.append(own)
    # What a row of x gets is added up in float32.
    into = 4 if s.gathered else e
    back = Kernel(
        "backward",
        "dO·W + D·A",
        "float8" if s.by_columns else wide,
        2 * rows * i * o,
        rows * o + s.weights + rows * i * into,
        kept=0 if s.gathered else n * i * e,
    )
    if r != 0:
        more = g * (rows * r + s.of_a)
        back = replace(back, bytes=back.bytes + more, added=2 * rows * r * i, added_dtype=wide)
        scaled = rows * r * g * (2 + 2 * int(s.train_a))
        kernels += [
            _of_rows(s, "backward", "D", o, r, g),
            Kernel("backward", "scale D", wide, 0, scaled),
            Kernel("backward", "decode A", wide, 0, s.of_a * (1 + g), s.of_a),
        ]
    kernels += [Kernel("backward", "cast dO", "float8", 0, rows * o * (e + 1)), back]
    kernels += _summing(s, 4)
    if r == 0:
        return kernels
    return [*kernels, *_gradients(s, e, 1, g), *optimizer(s, s.experts)]


def emulated(s: StackShape) -> list[Kernel]:
    """The op on a CPU: where that multiplies bfloat16 by compiled code, which decodes weights and
    gathers rows of x as it multiplies them (`falqon_fx.kernels.cpu.experts`), else as ATen.
    """
    n, i, r, rows, e = s.n, s.features, s.rank, s.rows, WIDTH[s.dtype]
    wide, g = s.operands, WIDTH[s.operands]
    x_kept = n * i if s.train_a and r != 0 else 0
    cast = Kernel("forward", "cast x", wide, 0, n * i * (e + g) + x_kept, n * i, x_kept)
    kernels = [cast, *(_compiled(s) if wide == "bfloat16" else _as_aten(s))]
    if r == 0:
        return kernels
    scaled = rows * r * g * (2 + 2 * int(s.train_a))
    kernels.append(Kernel("backward", "scale D", wide, 0, scaled))
    return [*kernels, *optimizer(s, s.experts)]


def _compiled(s: StackShape) -> list[Kernel]:
    """Weights are one byte each, as they lie; their decoding is counted apart."""
    n, i, o, r, rows, e = s.n, s.features, s.out, s.rank, s.rows, WIDTH[s.dtype]
    wide, g = s.operands, WIDTH[s.operands]
    read, result, grad = (n if s.gathered else rows) * i * g, rows * o * g, n * i * e
    # Sums over rows of x are float32, and lie in the cache while a few columns of them are made.
    to_x, narrow = (2 * n * i * 4, n * i * (4 + e)) if s.gathered else (n * i * g, 0)
    ahead = 2 * rows * (i + r) * o, read + s.weights + rows * r * g + s.of_b * g + result
    back = 2 * rows * (o + r) * i, result + s.weights + rows * r * g + s.of_a + to_x
    kernels = [
        Kernel("forward", "decode W", wide, 0, 0, s.weights),
        Kernel("forward", "x·Wᵀ + s·O_A·Bᵀ", wide, *ahead, kept=rows * o * e),
        Kernel("backward", "cast dO", wide, 0, rows * o * (e + g), rows * o),
        Kernel("backward", "decode W", wide, 0, 0, s.weights),
        Kernel("backward", "dO·W + D·A", wide, *back, kept=grad),
    ]
    if s.gathered:
        kernels.append(Kernel("backward", "narrow dL/dx", wide, 0, narrow))
    if r == 0:
        return kernels
    low = 2 * rows * i * r, read + s.of_a + rows * r * g
    kernels += [
        *_adapter_casts(s),
        Kernel("forward", "x·Aᵀ", wide, *low, s.of_a, kept=rows * r * g * int(s.train_b)),
        Kernel("backward", "s·B by expert", wide, 0, s.of_b * 4 * g),
        _of_rows(s, "backward", "D", o, r, g),
        Kernel("backward", "decode A", wide, 0, 0, s.of_a),
    ]
    if s.train_a:
        kernels.append(Kernel("backward", "decode x", wide, 0, 0, rows * i))
    return [*kernels, *_gradients(s, g, 1, g)]


def _as_aten(s: StackShape) -> list[Kernel]:
    """Values of g bytes; weights and x̂ are decoded before each product."""
    n, i, o, r, rows, e = s.n, s.features, s.out, s.rank, s.rows, WIDTH[s.dtype]
    wide, g = s.operands, WIDTH[s.operands]
    result, grad = rows * o * e, n * i * e
    decode = (wide, 0, s.weights * (1 + g), s.weights)
    kernels = [
        *_gathering(s, g),
        Kernel("forward", "decode W", *decode),
        _of_rows(s, "forward", "x·Wᵀ", i, o, g),
    ]
    if r != 0:
        kernels += [
            *_adapter_casts(s),
            Kernel("forward", "decode A", wide, 0, s.of_a * (1 + g), s.of_a),
            _of_rows(s, "forward", "x·Aᵀ", i, r, g, kept=rows * r * g * int(s.train_b)),
            _of_rows(s, "forward", "s·O_A·Bᵀ", r, o, g),
            Kernel("forward", "add", wide, 0, 3 * rows * o * g),
        ]
    if e == g:
        kernels[-1] = replace(kernels[-1], kept=result)
    else:
        kernels.append(Kernel("forward", "narrow O", wide, 0, rows * o * (e + g), kept=result))
    kernels += [
        Kernel("backward", "cast dO", wide, 0, rows * o * (e + g), rows * o),
        Kernel("backward", "decode W", *decode),
        _of_rows(s, "backward", "dO·W", o, i, g),
    ]
    if r != 0:
        kernels += [
            Kernel("backward", "s·B by expert", wide, 0, s.of_b * 2 * g),
            _of_rows(s, "backward", "D", o, r, g),
            Kernel("backward", "decode A", wide, 0, s.of_a * (1 + g), s.of_a),
            _of_rows(s, "backward", "D·A", r, i, g),
            Kernel("backward", "add", wide, 0, rows * i * (8 + g)),
        ]
    kernels += _summing(s, 4)
    if not s.gathered:
        kernels.append(Kernel("backward", "narrow dL/dx", wide, 0, n * i * (4 + e), kept=grad))
    if r == 0:
        return kernels
    if s.train_a:
        kernels.append(Kernel("backward", "decode x", wide, 0, n * i * (1 + g), n * i))
        kernels += [replace(k, phase="backward") for k in _gathering(s, g)]
    return [*kernels, *_gradients(s, g, g, g)]


STACKS: dict[str, Variant] = {
    "lora": lora,
    "split": split,
    "merged": merged,
    "emulated": emulated,
}


def _of_rows(
    s: StackShape, phase: str, name: str, k: Any, m: Any, width: int, kept: Any = 0
) -> Kernel:
    """The rows of each expert times its [k, m] of a stack."""
    moved = width * (s.rows * (k + m) + s.experts * k * m)
    dtype = s.operands if width == WIDTH[s.operands] else s.dtype
    return Kernel(phase, name, dtype, 2 * s.rows * k * m, moved, kept=kept)


def _gathering(s: StackShape, width: int) -> list[Kernel]:
    """x's rows, in the order of the experts."""
    if not s.gathered:
        return []
    moved = (s.n + s.rows) * s.features * width
    return [Kernel("forward", "gather x", s.dtype, 0, moved)]


def _summing(s: StackShape, width: int) -> list[Kernel]:
    """dL/dx [n, in] of the rows that read each row of x, from values of ``width`` bytes."""
    if not s.gathered:
        return []
    i, e = s.features, WIDTH[s.dtype]
    # Zeros, then each row added in turn; then to the model's dtype.
    added = (s.n + 3 * s.rows) * i * width
    narrowed = s.n * i * (width + e) if width != e else 0
    grad = s.n * i * e
    return [Kernel("backward", "sum of dL/dx", s.dtype, 0, added + narrowed, kept=grad, launches=2)]


def _adapter_casts(s: StackShape) -> list[Kernel]:
    """A to FP8, s·B to the products' dtype, and B as [E, out, r]: experts are its fastest."""
    a, g = WIDTH[s.adapter_dtype], WIDTH[s.operands]
    return [
        Kernel("forward", "cast A", s.operands, 0, s.of_a * (a + 1), s.of_a),
        Kernel("forward", "cast s·B", s.operands, 0, s.of_b * (a + g)),
        Kernel("forward", "s·B by expert", s.operands, 0, s.of_b * 2 * g),
    ]


def _gradients(s: StackShape, grad: int, x: int, low: int) -> list[Kernel]:
    """dL/dB and dL/dA of each expert's rows, of operands of so many bytes."""
    a, rows, r = WIDTH[s.adapter_dtype], s.rows, s.rank
    kernels = []
    if s.train_b:
        moved = rows * s.out * grad + rows * r * low + s.of_b * a
        kernels.append(Kernel("backward", "dB", s.operands, 2 * rows * s.out * r, moved))
    if s.train_a:
        read = s.n if s.gathered and x == 1 else rows  # a generated kernel gathers as it reads
        moved = read * s.features * x + rows * r * low + s.of_a * a
        kernels.append(Kernel("backward", "dA", s.operands, 2 * rows * s.features * r, moved))
    return kernels
