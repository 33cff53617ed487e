"""What the ``falqon::`` ops compute on a CPU, where they stay opaque in compiled graphs.

The casts are compiled code (`falqon_fx.kernels.cpu.casts`), which is two to three times as fast as
what Inductor makes of them, and costs its compiler nothing; without it they are ATen operations,
bit for bit the same. The products are torch's own. For GPUs see `falqon_fx.ops.gpu`.

Shapes: x [n, in]; W [out, in] and Â [r, in] E4M3 (or bytes) or int8, their scales float32 [rows, 1]
or []; b [out, r]; dL/dO [n, out]. Sites are numbered i, adapters j; ``owner[j]`` is the site of
adapter j, and the adapters of a site stand side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from falqon_fx._compat import native_bf16
from falqon_fx.kernels.cpu import casts as cpu_casts
from falqon_fx.kernels.cpu import integers
from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.kernels.fixed import NONE_FIXED, Fixed
from falqon_fx.ops.arguments import Merged
from falqon_fx.ops.cast_errors import cast_errors, channels_apart, kept_errors, with_errors
from falqon_fx.site import nvfp4
from falqon_fx.site.casts import cast_with_scale, scale_of
from falqon_fx.site.numerics import (
    E4M3,
    INT8,
    as_code,
    as_scale,
    decode_fp8,
    round_to_fp8,
    round_to_scaled_fp8,
    without_autocast,
)
from falqon_fx.site.spec import SiteSpec, parse_spec


def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What decoded operands are multiplied in where the result is of ``dtype``: bfloat16 for
    bfloat16, else float32 (a raw FP8 sum overflows float16).

    Float32 too on a CPU that can't multiply bfloat16: there torch's GEMM is 20 times slower in it.
    FP8 values are exact in both.
    """
    if dtype == torch.bfloat16 and (device.type != "cpu" or native_bf16()):
        return torch.bfloat16
    return torch.float32


@without_autocast
def proxy_update(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    wide: bool,
    spec_text: str,
    fixed: Fixed = NONE_FIXED,
) -> list[Tensor]:
    """[Â_j, s_A,j, b_j] of each adapter j in turn: Â = q([A; A_c]) in the operands' format with one
    scale per row (or one for all of A), and b = [scaling · B | B_c | W_S] in bfloat16, or float32
    where ``wide``.
    """
    spec = parse_spec(spec_text)
    dtype = torch.float32 if wide else torch.bfloat16
    casts: list[Tensor] = []
    for j, factor in enumerate(scaling):
        own = fixed.of([j])
        rank = own.rank(len(lora_a[j]))
        b = stacked(lora_b[j].detach().to(torch.float32) * factor, own.error_b, 1, rank)
        parts = [part.to(dtype) for part in (b, *own.columns)]
        casts += [*cast_code(stacked(lora_a[j], own.error_a, 0, rank), spec), _stack(parts, dim=1)]
    return casts


def stacked(lora: Tensor, error: Sequence[Tensor], dim: int, rank: int) -> Tensor:
    """``rank`` rows of A, A_c and zeros, or columns of B, B_c and zeros."""
    dtypes = [lora.dtype, *(part.dtype for part in error)]
    wide = functools.reduce(torch.promote_types, dtypes)
    whole = _stack([part.detach().to(wide) for part in (lora, *error)], dim)
    lacking = rank - whole.shape[dim]
    return F.pad(whole, [0, lacking] if dim else [0, 0, 0, lacking]) if lacking else whole


@dataclass(frozen=True)
class Cast:
    """x [n, k] ≈ ``value`` · ``rest``: ``value`` as it is multiplied. Of FP8 a scale that is a
    power of two is contained in it, so that ``rest`` is 1; ``code`` in E4M3 where that was asked
    for. Of INT8 ``value`` and ``code`` are the integers.
    """

    value: Tensor
    rest: Tensor | float
    scale: Tensor
    code: Tensor | None = None


def cast_operand(
    x: Tensor,
    spec: SiteSpec,
    dtype: torch.dtype,
    *,
    keep: bool = False,
    apart: Tensor | None = None,
) -> Cast:
    """Cast x [n, k] to what W is, see `cast_fp8` and `cast_int8`."""
    if spec.operand == INT8:
        return cast_int8(x, spec, apart)
    return cast_fp8(x, spec.operand, spec, dtype, keep=keep)


def cast_int8(x: Tensor, spec: SiteSpec, apart: Tensor | None = None) -> Cast:
    """Cast x [n, k] to INT8 with one scale per row or one for all of it, with zeros in the channels
    ``apart``, bool [k].
    """
    if spec.per_row and x.device.type == "cpu":
        cast = integers.cast_rows(x, spec.scale == "pow2", apart)
        if cast is not None:
            code, scale = cast
            return Cast(code, scale, scale, code)
    if apart is not None:
        x = x.masked_fill(apart, 0.0)
    scale = scale_of(x, INT8, spec)
    code = cast_with_scale(x.to(torch.float32), scale, INT8)
    return Cast(code, scale, scale, code)


def cast_fp8(
    x: Tensor,
    fp8: torch.dtype,
    spec: SiteSpec,
    dtype: torch.dtype,
    *,
    columns: Tensor | None = None,
    keep: bool = False,
    to: Tensor | None = None,
) -> Cast:
    """Cast x [n, k], times ``columns`` [1, k] where given, with one scale per row or one for all of
    it. The values come in ``dtype``, in ``to`` [n, k] where that is given.
    """
    pow2, keeps = spec.scale == "pow2", not keep or fp8 == E4M3  # compiled code writes no E5M2
    if pow2 and keeps and spec.per_row and x.device.type == "cpu":
        value = x.new_empty(x.shape, dtype=dtype) if to is None else to
        code = x.new_empty(x.shape, dtype=torch.uint8) if keep else None
        scale = cpu_casts.cast_rows(x, fp8, columns, value, code)
        if scale is not None:
            return Cast(value, 1.0, scale, None if code is None else code.view(E4M3))
    scaled = x if columns is None else x.to(torch.float32) * columns
    scale, wide = scale_of(scaled, fp8, spec), scaled.to(torch.float32)
    codes = round_to_fp8(wide * scale.reciprocal(), fp8)
    value = round_to_scaled_fp8(wide, scale, fp8) if pow2 else codes
    value = value.to(dtype) if to is None else to.copy_(value)
    rest = 1.0 if pow2 else scale
    # x may be a view of any strides; what is kept is not.
    code = codes.to(fp8, memory_format=torch.contiguous_format) if keep else None
    return Cast(value, rest, scale, code)


def cast_code(x: Tensor, spec: SiteSpec) -> tuple[Tensor, Tensor]:
    """The cast of x [n, k] to what W is and its scale, without the values."""
    if spec.operand == E4M3 and spec.scale == "pow2" and spec.per_row and x.device.type == "cpu":
        code = x.new_empty(x.shape, dtype=torch.uint8)
        scale = cpu_casts.cast_rows(x, E4M3, None, None, code)
        if scale is not None:
            return code.view(E4M3), scale
    cast = cast_operand(x, spec, torch.float32, keep=True)
    assert cast.code is not None
    return cast.code, cast.scale


def as_read(weight: Tensor) -> Tensor:
    """FP8 as `decode_fp8` reads it fastest where nothing is compiled."""
    return as_code(weight) if weight.device.type == "cpu" else weight


def decode(
    code: Tensor, scale: Tensor | float, dtype: torch.dtype, to: Tensor | None = None
) -> Tensor:
    """`decode_fp8` or `falqon_fx.site.nvfp4.decode`, into ``to`` where that is given."""
    if nvfp4.is_packed(code):
        return nvfp4.decode(code, scale, dtype, to)
    if code.dtype == INT8 and not isinstance(scale, Tensor) and scale == 1.0:
        return code.to(dtype) if to is None else to.copy_(code)
    compiled = cpu.decode(code, scale, dtype, to)
    if compiled is not None:
        return compiled
    value = decode_fp8(code, scale, dtype)
    return value if to is None else to.copy_(value)


@without_autocast
def merged_linear(given: Merged) -> list[Tensor]:
    """[O_i | O_A | x̂] of the sites i that read x: O_i = q(x) · W_iᵀ + Σ_j O_A,j · b_jᵀ + bias_i,
    [..., out_i] in ``out_dtype``, over the adapters j of site i (without the sum where there is no
    b); then the O_A,j = q(x_j) · Â_jᵀ of all adapters side by side, [n, Σ r_j]; then, where
    ``keep_x``, what dL/dA needs: the codes of each x_j and their scale.
    """
    spec = parse_spec(given.spec_text)
    dtype, exact = gemm_dtype(given.out_dtype, given.x.device), spec.scales_inside
    apart = channels_apart(given)
    read = cast_inputs(given, spec, dtype, apart)
    out_a = given.x.new_empty((read.x.value.shape[0], 0), dtype=dtype)
    errors = cast_errors(given, read.x.scale, dtype, apart)
    if given.a:
        out_a = with_errors(adapter_outputs(given, read, spec, dtype), given, errors)
    parts = out_a.split(given.ranks, dim=1) if given.a else ()
    ys = []
    for i, (w, s) in enumerate(zip(given.weight, given.scale)):
        y = multiplied(read.x.value, right_operand(w, s if exact else 1.0, dtype))
        if not exact:
            y = rescale(y, read.x.rest, s, dtype)
        for j in given.adapters_of(i) if given.b else []:
            left = [parts[j], *([errors[j]] if j in errors else [])]
            y = torch.addmm(y, _stack(left, dim=1), given.b[j].to(dtype).t())
        ys.append(finished(y, given, i))
    return [*ys, out_a, *read.kept(given.keep_x), *(errors[j] for j in kept_errors(given))]


@dataclass(frozen=True)
class Read:
    """The casts of what a group of sites reads: x, and in ``own`` what each adapter reads where any
    reads something else (dropout).
    """

    x: Cast
    own: list[Cast]

    def kept(self, keep: bool) -> list[Tensor]:
        """Codes and scale of what the adapters read, for dL/dA."""
        found: list[Tensor] = []
        for of in (self.own or [self.x]) if keep else []:
            assert of.code is not None
            found += [of.code, of.scale]
        return found


def cast_inputs(
    given: Merged, spec: SiteSpec, dtype: torch.dtype, apart: Tensor | None = None
) -> Read:
    """x and ``adapter_x`` cast to the operands' format, as values in ``dtype``; of x without the
    channels ``apart``.
    """

    def cast(x: Tensor, keep: bool, apart: Tensor | None = None) -> Cast:
        return cast_operand(x.reshape(-1, x.shape[-1]), spec, dtype, keep=keep, apart=apart)

    of_x = cast(given.x, given.keep_x and not given.adapter_x, apart)
    return Read(of_x, [cast(x_j, given.keep_x) for x_j in given.adapter_x])


def finished(y: Tensor, given: Merged, site: int) -> Tensor:
    """y [n, out] with the site's bias, as the op returns it."""
    if given.bias:
        y = y + given.bias[site].to(y.dtype)
    # Not `view`: what comes from below autograd as a view may not be written in place later.
    shape = (*given.x.shape[:-1], y.shape[1])
    return torch.ops.aten._unsafe_view(y.to(given.out_dtype), shape)  # type: ignore[no-any-return]


def adapter_outputs(given: Merged, read: Read, spec: SiteSpec, dtype: torch.dtype) -> Tensor:
    """The O_A of all adapters side by side; as one product where all read the same x."""
    exact = spec.scales_inside
    each = read.own or [read.x] * len(given.a)
    scales = [s if exact else 1.0 for s in given.a_scale]
    values = [right_operand(code, s, dtype) for code, s in zip(given.a, scales)]
    if read.own:
        products = [multiplied(cast.value, value) for cast, value in zip(each, values)]
    else:
        product = multiplied(read.x.value, _stack(values))
        products = [product] if exact else [*product.split([len(v) for v in values], dim=1)]
    if not exact:
        products = [rescale(p, c.rest, s, dtype) for p, c, s in zip(products, each, given.a_scale)]
    return _stack(products, dim=1)


def right_operand(code: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """What a `Cast` is multiplied with: values in ``dtype``, of INT8 the integers."""
    return code if code.dtype == INT8 else decode(code, scale, dtype)


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """left · rightᵀ; of integers int32, without rounding, or float32 where the CPU has no exact
    sums of them: those of up to 1,040 products are exact in that, too.
    """
    # The library is wrong about one product: both strides of the right operand are 1 then.
    if left.dtype == INT8 and left.shape[1] > 1 and integers.exact():
        sums: Tensor = torch.ops.aten._int_mm(left, right.t())
        return sums
    if left.dtype == INT8:
        left, right = left.to(torch.float32), right.to(torch.float32)
    return left @ right.t()


def _stack(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim)


def rescale(y: Tensor, rest: Tensor | float, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a GEMM's result by the scales that its operands lack, in float32."""
    turned = scale.t() if scale.dim() == 2 else scale
    if y.dtype == torch.int32 and isinstance(rest, Tensor):
        compiled = integers.rescale(y, rest, turned, dtype)
        if compiled is not None:
            return compiled
    return (y.to(torch.float32) * rest * turned).to(dtype)


@without_autocast
def merged_linear_grad_x(
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    d: Sequence[Tensor],
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    x_dtype: torch.dtype,
    spec_text: str,
) -> Tensor:
    """dL/dx = Σ_i q(dL/dO_i · diag(s_W,i)) · W_i + Σ_j D_j · dq(Â_j), [n, in] in ``x_dtype``, with
    D_j = dL/dO · b_j [n, r_j] of the adapters that read x. Where W is INT8, q rounds to the dtype
    of the products alone.

    The row scales of W belong to the dimension that is summed over, so they go into dL/dO before
    its cast. D has r columns, too few to gain from FP8. Where all scales are powers of two, all of
    it is one GEMM, which adds up in float32: [q(dL/dO_1) | ... | D_1 | ...] · [W_1; ...; Â_1; ...].
    """
    spec = parse_spec(spec_text)
    dtype = gemm_dtype(grad[0].dtype, grad[0].device)
    exact = spec.scales_inside or spec.base == "int8"
    outs = [w.shape[0] for w in weight] if exact else []
    widths = [*outs, *(d_j.shape[1] for d_j in d)]
    n, (_, features) = grad[0].shape[0], nvfp4.shape_of(weight[0])
    left = grad[0].new_empty((n, sum(widths)), dtype=dtype)
    right = grad[0].new_empty((sum(widths), features), dtype=dtype)
    columns, rows = left.split(widths, dim=1), right.split(widths)
    products: list[Tensor] = []
    for i, (g, w, s) in enumerate(zip(grad, weight, scale)):
        of_rows = s.t().contiguous() if spec.base_per_row else None
        if spec.base == "int8":
            if not integers.scale_columns(g, s.t() if s.dim() else s, columns[i]):
                columns[i].copy_(g.to(torch.float32) * s.reshape(1, -1))
            decode(w, 1.0, dtype, rows[i])
        elif exact:
            cast_fp8(g, spec.grad_dtype, spec, dtype, columns=of_rows, to=columns[i])
            decode(w, 1.0 if spec.base_per_row else s, dtype, rows[i])
        else:
            cast = cast_fp8(g, spec.grad_dtype, spec, dtype, columns=of_rows)
            product = (cast.value @ decode(w, 1.0, dtype)).to(torch.float32) * cast.rest
            products.append(product if spec.base_per_row else product * s)
    for j, (d_j, code, s) in enumerate(zip(d, a, a_scale)):
        columns[len(outs) + j].copy_(rescale(d_j.to(dtype), 1.0, s, dtype))
        decode(code, 1.0, dtype, rows[len(outs) + j])
    if widths:
        products.append(left @ right)
    total = products[0]
    for product in products[1:]:
        total = total.to(torch.float32) + product.to(torch.float32)
    return total.to(x_dtype)


@without_autocast
def grad_a(d: Tensor, code: Tensor, scale: Tensor, a_dtype: torch.dtype) -> Tensor:
    """dL/dA [r, in] = Dᵀ · x̂ for D [n, r] and x̂ = code · scale, an input as `merged_linear` kept
    it: E4M3 or int8 [n, in], float32 [n, 1] or []. Straight through the casts of A and of x.
    """
    scaled = (d.to(torch.float32) * scale).to(d.dtype)
    return (scaled.t() @ decode(code, 1.0, d.dtype)).to(a_dtype)


@without_autocast
def grad_b(grad: Tensor, out_a: Tensor, scaling: float, b_dtype: torch.dtype) -> Tensor:
    """dL/dB [out, r] = scaling · (dL/dO)ᵀ · O_A."""
    product = grad.to(out_a.dtype).t() @ out_a
    return (product.to(torch.float32) * scaling).to(b_dtype)


def dequantize(code: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """dq(W) [out, in] in ``dtype``; ``scale`` is float32, or its bits (int32)."""
    if dtype not in (torch.float32, torch.bfloat16) and not nvfp4.is_packed(code):
        return decode_fp8(code, as_scale(scale), dtype)
    return decode(code, as_scale(scale), dtype)
