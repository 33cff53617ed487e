"""One site alone: rebuilt with random data and checked against exact arithmetic.

Each result of the op is compared with the same operands (x̂ and ĝ cast per token, W and Â as they
are cast, b = s·B as it is rounded, O_A as the op returned it), multiplied and added up in float64,
where products of two FP8 values are exact:

    O     = x̂·Wᵀ + Σ_j O_A,j·b_jᵀ        O_A,j = x̂_j·Â_jᵀ
    dL/dx = ĝ·W + Σ_j D_j·Â_j            D_j   = dL/dO·b_j
    dL/dA = D_jᵀ·x̂_j                     dL/dB = s·(dL/dO)ᵀ·O_A,j

What is left is the op's own rounding. A sum of K products in float32, in any order, is off by at
most K·2⁻²⁴ of Σ|a||b|, the sum of the magnitudes of its terms. Each rounding of an intermediate
result to the dtype of the products or of the result costs u of that at most (2⁻⁸ bfloat16, 2⁻¹¹
float16, 2⁻²⁴ float32); no result has more than six in a row, O two more for each of J adapters:

    |y - y₆₄| ≤ (K·2⁻²⁴ + m·u) / (1 - K·2⁻²⁴ - m·u) · Σ|a||b|,     m = 6 + 2J

K is in + rank for O, in for O_A, tokens for dL/dB; D is a sum of ``out`` terms, on top of which
come out + rank for dL/dx and tokens for dL/dA. Tensor cores may add 32 products at a time with 13
bits behind the largest: on a GPU K·2⁻²⁴ becomes (K/32 + 32)·2⁻¹³.

Magnitudes are random, and so are signs, but each dimension has its own: no sum cancels, so that
Σ|a||b| is the result itself and the bound a relative one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError, one_line
from falqon_fx.ops import adapter_casts, lowering
from falqon_fx.ops import merged_linear as ops
from falqon_fx.report.data import Site
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import INT8, dtype_name
from falqon_fx.site.spec import parse_spec


@dataclass(frozen=True)
class Checked:
    """Largest error by its bound, by result; a value above 1 is a wrong kernel.

    Attributes:
        device: what it ran on: "cpu", or the name of the GPU.
        kernel: what runs the site, as its report says.
        note: what this check says nothing about.
    """

    ratios: dict[str, float]
    device: str = "cpu"
    kernel: str = ""
    note: str = ""

    @property
    def right(self) -> bool:
        """NaN counts as wrong."""
        return all(ratio <= 1.0 for ratio in self.ratios.values())

    def __str__(self) -> str:
        parts = [f"{name}: {ratio:.3f} of its bound" for name, ratio in self.ratios.items()]
        where = f"on {self.device}" + (f" ({self.note})" if self.note else "")
        return f"{'right' if self.right else 'WRONG'}; {', '.join(parts)}; {where}"


def check(
    out: int,
    features: int,
    rank: int,
    tokens: int,
    scaling: float,
    dtype: str,
    adapter_dtype: str,
    spec: str,
    *,
    adapters: int = 1,
    train_a: bool = True,
    dropout: float = 0.0,
    x_dtype: str = "",
    base_dtype: str = "",
    kernel: str = "",
    device: str = "cpu",
    seed: int = 0,
) -> Checked:
    """Run one site of the given shape on random data, forward and backward.

    ``rank`` is the sum over the ``adapters``. ``dtype`` is that of the output; x and the base
    weight have it too where nothing else is given. With a ``dropout`` the adapters read an x of
    their own. ``kernel``, what runs the site, goes into the record. ``device="cuda"`` falls back to
    the CPU where there is no GPU; the note of the result says so.

    Raises:
        FalqonError: a site with adapter_dtype="fp8", whose casts of intermediate results this
            doesn't repeat; sizes or dtypes that no site has; one too large for this machine.
    """
    _check_sizes(out, features, rank, tokens, adapters, dropout)
    if parse_spec(spec).adapter == "fp8":
        raise FalqonError(
            "repro",
            'a site with adapter_dtype="fp8" can\'t be rebuilt yet',
            'Rebuild it with adapter_dtype="bfloat16"',
        )
    note = ""
    if device != "cpu" and not torch.cuda.is_available():
        note = f"there is no GPU here, so {one_line(kernel or 'its kernel')} was not run"
        device = "cpu"
    where = torch.device(device)
    inputs = _inputs(
        (out, features, tokens),
        [rank // adapters + (j < rank % adapters) for j in range(adapters)],
        _dtype(dtype),
        _dtype(x_dtype or dtype),
        _dtype(base_dtype or dtype),
        _dtype(adapter_dtype or dtype),
        dropout,
        where,
        seed,
    )
    ratios = _Check(inputs, scaling, train_a, spec).ratios()
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else device
    return Checked(ratios, name, kernel, note)


def _check_sizes(
    out: int, features: int, rank: int, tokens: int, adapters: int, dropout: float
) -> None:
    """What a report asks for comes from a file."""
    possible = min(out, features, tokens) > 0 and 0 <= adapters <= rank and 0 <= dropout < 1
    if not possible:
        problem = f"there is no site of {out} x {features}, {adapters} adapters of rank {rank}, "
        problem += f"dropout {dropout} and {tokens} tokens"
        raise FalqonError("repro", problem, "Write the report anew, or give other --tokens")
    elements = out * features + (tokens + rank) * (out + features)
    # W, x and the rest in their dtypes, and each as two matrices of float64.
    needed, there = 24 * elements, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        problem = f"this site takes {needed / 2**30:.3g} GiB, the machine has {there / 2**30:.3g}"
        raise FalqonError("repro", problem, "Give fewer --tokens, or a smaller site")


def _dtype(name: str) -> torch.dtype:
    dtypes = {dtype_name(dtype): dtype for dtype in _UNIT}
    if name not in dtypes:
        problem = f"a site of dtype {name!r} can't be rebuilt"
        raise FalqonError("repro", problem, f"It can be of {', '.join(dtypes)}")
    return dtypes[name]


@dataclass(frozen=True)
class _Inputs:
    """x [n, in], dL/dO [n, out], W [out, in], each adapter's A [r, in], B [out, r], and what they
    read where that is not x.
    """

    x: Tensor
    grad: Tensor
    weight: Tensor
    a: list[Tensor]
    b: list[Tensor]
    own_x: list[Tensor]


def _inputs(
    sizes: tuple[int, int, int],
    ranks: list[int],
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    base_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: float,
    device: torch.device,
    seed: int,
) -> _Inputs:
    generator = torch.Generator().manual_seed(seed)
    out, features, tokens = sizes

    def signs(count: int) -> Tensor:
        return torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0

    def random(rows: Tensor, columns: Tensor) -> Tensor:
        size = torch.randn(len(rows), len(columns), generator=generator).abs()
        return (rows[:, None] * columns * size).to(device)

    def dropped(x: Tensor) -> Tensor:
        stays = torch.rand(x.shape, generator=generator) >= dropout
        return (x * stays.to(device) / (1 - dropout)).to(x_dtype)

    of_token, of_in, of_out, *of_rank = map(signs, (tokens, features, out, *ranks))
    x = random(of_token, of_in).to(x_dtype)
    return _Inputs(
        x,
        random(of_token, of_out).to(dtype),
        (random(of_out, of_in) / features**0.5).to(base_dtype),
        [(random(of_r, of_in) / features**0.5).to(adapter_dtype) for of_r in of_rank],
        [(random(of_out, of_r) * 0.1).to(adapter_dtype) for of_r in of_rank],
        [dropped(x) for _ in ranks] if dropout else [],
    )


@dataclass(frozen=True)
class _Exact:
    """A product in float64, and Σ|a||b| of it."""

    value: Tensor
    gauge: Tensor

    @classmethod
    def of(cls, value: Tensor) -> _Exact:
        return cls(value.double(), value.double().abs())

    def __matmul__(self, other: _Exact) -> _Exact:
        return _Exact(self.value @ other.value, self.gauge @ other.gauge)

    def __add__(self, other: _Exact) -> _Exact:
        return _Exact(self.value + other.value, self.gauge + other.gauge)

    def t(self) -> _Exact:
        return _Exact(self.value.t(), self.gauge.t())


class _Check:
    """The op on some inputs, and what it should have returned."""

    def __init__(self, inputs: _Inputs, scaling: float, train_a: bool, spec_text: str) -> None:
        self.inputs, self.scaling, self.train_a = inputs, scaling, train_a
        self.spec_text, self.spec = spec_text, parse_spec(spec_text)
        self.products = lowering.gemm_dtype(inputs.grad.dtype, inputs.x.device)
        self.base = cast_base(inputs.weight, self.spec)

    def ratios(self) -> dict[str, float]:
        """The largest error of each result as a share of its bound."""
        given = self.inputs
        x, own_x, b = _leaf(given.x), [*map(_leaf, given.own_x)], [*map(_leaf, given.b)]
        a = [_leaf(t) if self.train_a else t for t in given.a]
        scaling = [self.scaling] * len(a)
        wide, nothing = self.products == torch.float32, list[Tensor]()
        casts = (
            adapter_casts.proxy_update(a, b, scaling, *4 * [nothing], wide, self.spec_text)
            if a
            else []
        )
        alpha: list[Tensor] = []
        clamped: list[Tensor] = []
        columns = (casts[0::3], casts[1::3], casts[2::3], alpha, clamped, a, b, own_x)
        y, out_a, *_ = ops.merged_linear(
            x,
            [self.base.weight],
            [self.base.scale],
            [],
            *columns,
            [0] * len(a),
            scaling,
            self.train_a,
            *([], [], []),  # copies of W, channels
            given.grad.dtype,
            self.spec_text,
        )
        y.backward(given.grad)

        out, features = given.weight.shape
        rank, tokens = sum(map(len, a)), len(given.x)
        weight = _Exact.of(self.base.dequantize().double())
        x_cast = self._cast(given.x, self.spec.operand)
        read = [self._cast(t, self.spec.operand) for t in given.own_x] or [x_cast] * len(a)
        values = [_Exact.of(c.double() * s.double()) for c, s in zip(casts[0::3], casts[1::3])]
        factors, grad = [*map(_Exact.of, casts[2::3])], _Exact.of(given.grad)
        parts = [_Exact.of(part) for part in out_a.split([*map(len, a)], 1)] if a else []
        d = [grad @ factor for factor in factors]
        back = [d_j @ value for d_j, value in zip(d, values)]

        of_y = sum((p @ f.t() for p, f in zip(parts, factors)), x_cast @ weight.t())
        of_x = sum([] if own_x else back, self._through_weight(weight))
        found = {"O": self._ratio(y, of_y, features + rank)}
        for j in range(len(a)):
            part = parts[j].value.to(self.products)
            each = {"O_A": self._ratio(part, read[j] @ values[j].t(), features)}
            if own_x:
                each["dL/dx_A"] = self._ratio(own_x[j].grad, back[j], out + rank)
            if self.train_a:
                each["dL/dA"] = self._ratio(a[j].grad, d[j].t() @ read[j], out + tokens)
            of_b = _Exact.of(self.scaling * grad.value).t() @ parts[j]
            each["dL/dB"] = self._ratio(b[j].grad, of_b, tokens)
            found |= {name: max(found.get(name, 0.0), ratio) for name, ratio in each.items()}
        return {**found, "dL/dx": self._ratio(x.grad, of_x, 2 * out + rank)}

    def _cast(self, x: Tensor, dtype: torch.dtype) -> _Exact:
        """x as the op casts it."""
        if dtype == INT8:
            cast = lowering.cast_int8(x, self.spec)
        else:
            cast = lowering.cast_fp8(x, dtype, self.spec, torch.float32)
        return _Exact.of(cast.value.double() * torch.as_tensor(cast.rest).double())

    def _through_weight(self, weight: _Exact) -> _Exact:
        """ĝ·W: the scales of W's rows go into dL/dO before its cast."""
        grad = self.inputs.grad
        if self.spec.base == "int8":  # dL/dO times the scales is rounded, which the bound counts
            return _Exact.of(grad) @ weight
        if not self.spec.base_per_row:
            return self._cast(grad, self.spec.grad_dtype) @ weight
        scaled = grad.to(torch.float32) * self.base.scale.t()
        return self._cast(scaled, self.spec.grad_dtype) @ _Exact.of(self.base.weight)

    def _ratio(self, value: Tensor | None, exact: _Exact, terms: int) -> float:
        assert value is not None
        summed = (terms / 32 + 32) * 2.0**-13 if value.is_cuda else terms * 2.0**-24
        u = max(_UNIT[self.products], _UNIT[value.dtype])
        off = summed + (6 + 2 * len(self.inputs.a)) * u
        tiny = torch.finfo(value.dtype).smallest_normal * u  # half the spacing below it
        error = (value.detach().double() - exact.value).abs()
        return float((error / (off / (1 - off) * exact.gauge + tiny)).max())


_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def arguments(site: Site, tokens: int | None = None) -> dict[str, object]:
    """The arguments of `check` that rebuild a site. One of update="rows" is rebuilt with its
    adapter apart from W, as it is before the first write.

    Raises:
        FalqonError: a stack of experts.
    """
    if site.experts:
        raise FalqonError(
            site.path,
            "it is a stack of experts, which is not rebuilt alone",
            "Name a linear layer; experts are checked by tests/test_merged_experts.py",
        )
    return {
        "out": site.out_features,
        "features": site.in_features,
        "rank": site.rank,
        "tokens": min(site.tokens_hint or 64, 4096) if tokens is None else tokens,
        "scaling": site.scaling,
        "dtype": site.out_dtype,
        "adapter_dtype": site.adapter_dtype,
        "spec": site.spec,
        "adapters": site.adapters,
        "train_a": site.train_a,
        "dropout": site.dropout,
        "x_dtype": site.x_dtype,
        "base_dtype": site.base_dtype,
        "kernel": site.kernel,
        "device": "cuda" if site.architecture or site.device == "cuda" else "cpu",
    }


def script(site: Site) -> str:
    """A program that rebuilds a site and exits with 0 where it is right, else with 3.

    What the report says of the site stands in it as literals alone: each on a line of its own that
    no value can end.
    """
    lines = [f"    {name}={value!r}," for name, value in arguments(site).items()]
    return "\n".join(
        [
            '"""One site alone, on random data. Exits with 3 where it is wrong."""',
            "",
            "import sys",
            "",
            "from falqon_fx.report.repro import check",
            "",
            f"SITE = {site.path!r}",
            "result = check(",
            *lines,
            ")",
            "print(result)",
            "sys.exit(0 if result.right else 3)",
            "",
        ]
    )
