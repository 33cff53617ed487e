"""The opaque products that the ``falqon::`` ops are lowered to on a GPU (see `falqon_fx.cuda`).

They are defined without the wrapping of `torch.library.custom_op`: several run in each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from falqon_fx.lowering import empty_output, gemm_dtype, scale_of
from falqon_fx.numerics import FP8_MAX
from falqon_fx.spec import parse_spec

if TYPE_CHECKING:
    from falqon_fx.kernels.dispatch import Options


def cast_fp8(x: Tensor, dtype: torch.dtype, spec: str) -> tuple[Tensor, Tensor]:
    """float32 ``x`` [n, k] ≈ q · scale: FP8 q [n, k], scale float32 [n, 1] or []."""
    scale = scale_of(x, dtype, parse_spec(spec))
    return cast_with_scale(x, scale, dtype), scale


def cast_with_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``x`` [n, k] / scale, in FP8, saturating."""
    largest = FP8_MAX[dtype]
    # A transposed x would stay so; the products read row by row.
    return (x * scale.reciprocal()).clamp(-largest, largest).to(dtype).contiguous()


def cast_alone(x: Tensor, dtype: torch.dtype, spec: str) -> tuple[Tensor, Tensor]:
    """`cast_fp8` as a kernel by itself, of ``x`` in its own dtype."""
    from falqon_fx.kernels import dispatch

    q, scale = dispatch.cast_fp8(x, dtype, spec).run()
    return q, scale


def _cast_fp8_fake(x: Tensor, dtype: torch.dtype, spec: str) -> tuple[Tensor, Tensor]:
    scale = (x.shape[0], 1) if parse_spec(spec).per_row else ()
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(scale, dtype=torch.float32)


def merged_product(
    q: Tensor,
    q_scale: Tensor,
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    outs: Sequence[int],
    pending: Sequence[Tensor],
    bias: Sequence[Tensor],
    out_dtype: torch.dtype,
    spec: str,
) -> list[Tensor]:
    """O_i [n, out_i] of the sites i that share x, then their O_A [n, Σ r_i] side by side:
    O_i = dq(q) · dq(W_i)ᵀ + O_A,i · pending_iᵀ + bias_i, O_A,i = dq(q) · dq(A_i)ᵀ.

    W'_i [out_i + r_i, in] is E4M3, its scale float32 [out_i + r_i, 1] or []. ``pending`` and
    ``bias`` have one entry a site, or none. With ``pending`` O_A comes first, since all of it is
    needed for each tile of O. One op, so that Inductor writes q once.

    Where the spec says output="strided", O_i is a view of [O_i | O_A,i], [n, out_i + r_i].
    """
    from falqon_fx.kernels import dispatch
    from falqon_fx.kernels.gemm import Piece

    if parse_spec(spec).output == "strided":
        merged = [Piece(w, s) for w, s in zip(weight, scale)]
        dtypes, options = (out_dtype, gemm_dtype(out_dtype)), _options(spec)
        strided = dispatch.forward_strided(
            q, q_scale, merged, outs, pending, bias, *dtypes, options
        )
        return strided.run()
    y, a = [], []
    for i, (w, s, out) in enumerate(zip(weight, scale, outs)):
        w_scale, a_scale = (s[:out], s[out:]) if s.dim() == 2 else (s, s)
        y.append(Piece(w[:out], w_scale, bias[i] if bias else None))
        a.append(Piece(w[out:], a_scale))
    dtype, options = gemm_dtype(out_dtype), _options(spec)
    if not pending:
        return dispatch.forward(q, q_scale, [*y, *a], len(a), out_dtype, dtype, options).run()
    (out_a,) = dispatch.forward(q, q_scale, a, len(a), out_dtype, dtype, options).run()
    parts = out_a.split([p.weight.shape[0] for p in a], dim=1)
    y = [replace(p, left=part, right=b) for p, part, b in zip(y, parts, pending)]
    return [*dispatch.forward(q, q_scale, y, 0, out_dtype, dtype, options).run(), out_a]


def _merged_product_fake(
    q: Tensor,
    q_scale: Tensor,
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    outs: Sequence[int],
    pending: Sequence[Tensor],
    bias: Sequence[Tensor],
    out_dtype: torch.dtype,
    spec: str,
) -> list[Tensor]:
    n, ranks = q.shape[0], [w.shape[0] - out for w, out in zip(weight, outs)]
    results = [empty_output(q, (n,), *of, out_dtype, spec) for of in zip(outs, ranks)]
    return [*results, q.new_empty((n, sum(ranks)), dtype=gemm_dtype(out_dtype))]


def grad_x_product(
    q: Sequence[Tensor],
    q_scale: Sequence[Tensor],
    weight: Sequence[Tensor],
    outs: Sequence[int],
    left: Sequence[Tensor],
    x_dtype: torch.dtype,
    spec: str,
) -> Tensor:
    """dL/dx [n, in] = Σ_i (q_i · W_i[:out_i]) ⊙ s_q,i + left · [A_i]; ``left`` [n, Σ r_i] has one
    entry or none. The scales of W are in q_i, or in s_q,i, those of A in ``left``.
    """
    from falqon_fx.kernels import dispatch
    from falqon_fx.kernels.gemm import Product

    products = [Product(a, s, w[:out]) for a, s, w, out in zip(q, q_scale, weight, outs)]
    options = _options(spec)
    if not left:
        (result,) = dispatch.grad_x(products, None, None, x_dtype, options).run()
        return result
    lora_a = torch.cat([w[out:].to(left[0].dtype) for w, out in zip(weight, outs)])
    right = lora_a.t().contiguous()
    (result,) = dispatch.grad_x(products, left[0], right, x_dtype, options).run()
    return result


def _grad_x_product_fake(
    q: Sequence[Tensor],
    q_scale: Sequence[Tensor],
    weight: Sequence[Tensor],
    outs: Sequence[int],
    left: Sequence[Tensor],
    x_dtype: torch.dtype,
    spec: str,
) -> Tensor:
    return q[0].new_empty((q[0].shape[0], weight[0].shape[1]), dtype=x_dtype)


def grad_b_product(
    grad: Tensor, out_a: Tensor, scaling: float, b_dtype: torch.dtype, spec: str
) -> Tensor:
    """dL/dB [out, r] = scaling · gradᵀ · out_a."""
    from falqon_fx.kernels import dispatch

    (result,) = dispatch.grad_b(grad, out_a, scaling, b_dtype, parse_spec(spec).kernel).run()
    return result


def cast_grad_b_product(
    grad: Tensor,
    scale: Tensor,
    out_a: Tensor,
    scaling: float,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    spec: str,
) -> tuple[Tensor, Tensor]:
    """(q [n, out], dL/dB [out, r]): grad ≈ q · scale in the FP8 ``dtype``, and `grad_b_product`."""
    from falqon_fx.kernels import dispatch

    kernel = parse_spec(spec).kernel
    q, result = dispatch.cast_grad_b(grad, scale, out_a, scaling, b_dtype, dtype, kernel).run()
    return q, result


def _cast_grad_b_product_fake(
    grad: Tensor,
    scale: Tensor,
    out_a: Tensor,
    scaling: float,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    spec: str,
) -> tuple[Tensor, Tensor]:
    q = grad.new_empty(grad.shape, dtype=dtype)
    return q, grad.new_empty((grad.shape[1], out_a.shape[1]), dtype=b_dtype)


def plain_grad_b(
    grad: Tensor, out_a: Tensor, scaling: float, b_dtype: torch.dtype, spec: str = ""
) -> Tensor:
    """The same by ATen, which Inductor sees through."""
    product = grad.to(out_a.dtype).t() @ out_a
    return (product.to(torch.float32) * scaling).to(b_dtype)


def _grad_b_product_fake(
    grad: Tensor, out_a: Tensor, scaling: float, b_dtype: torch.dtype, spec: str
) -> Tensor:
    return grad.new_empty((grad.shape[1], out_a.shape[1]), dtype=b_dtype)


def _options(spec: str) -> Options:
    from falqon_fx.kernels import dispatch

    plan = parse_spec(spec)
    return dispatch.Options(plan.kernel, plan.accumulation, plan.transpose)  # type: ignore[arg-type]


for _name, _schema, _run, _fake in (
    (
        "falqon::cast_fp8",
        "(Tensor x, ScalarType dtype, str spec) -> (Tensor, Tensor)",
        cast_alone,
        _cast_fp8_fake,
    ),
    (
        "falqon::merged_product",
        "(Tensor q, Tensor q_scale, Tensor[] weight, Tensor[] scale, int[] outs, "
        "Tensor[] pending, Tensor[] bias, ScalarType out_dtype, str spec) -> Tensor[]",
        merged_product,
        _merged_product_fake,
    ),
    (
        "falqon::grad_x_product",
        "(Tensor[] q, Tensor[] q_scale, Tensor[] weight, int[] outs, Tensor[] left, "
        "ScalarType x_dtype, str spec) -> Tensor",
        grad_x_product,
        _grad_x_product_fake,
    ),
    (
        "falqon::grad_b_product",
        "(Tensor grad, Tensor out_a, float scaling, ScalarType b_dtype, str spec) -> Tensor",
        grad_b_product,
        _grad_b_product_fake,
    ),
    (
        "falqon::cast_grad_b_product",
        "(Tensor grad, Tensor scale, Tensor out_a, float scaling, ScalarType b_dtype, "
        "ScalarType dtype, str spec) -> (Tensor, Tensor)",
        cast_grad_b_product,
        _cast_grad_b_product_fake,
    ),
):
    torch.library.define(_name, _schema)
    torch.library.impl(_name, "default", _run)
    torch.library.register_fake(_name, _fake)
