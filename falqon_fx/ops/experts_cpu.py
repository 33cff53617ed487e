"""The products of experts on a CPU that multiplies bfloat16, by compiled code
(`falqon_fx.kernels.cpu.experts`): weights are decoded as they are multiplied, rows of x gathered as
they are read, what the adapter adds is added in the same sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from falqon_fx.kernels.cpu import casts as cpu_casts
from falqon_fx.kernels.cpu import experts as compiled
from falqon_fx.kernels.cpu.experts import Rows, Weights
from falqon_fx.ops.grouped import Routing
from falqon_fx.ops.grouped_kernels import Low
from falqon_fx.site.spec import SiteSpec


def takes(x: Tensor, dtype: torch.dtype, spec: SiteSpec) -> bool:
    """Whether compiled code multiplies rows of x: values in bfloat16 that contain their scales, in
    memory of this CPU, which what is traced has not.
    """
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"
    fitting = dtype == torch.bfloat16 and spec.scale == "pow2"
    return plain and fitting and compiled.library() is not None


def rows_of(way: Routing, count: int) -> Rows:
    """The rows of a product of ``count``, and those of x that they read."""
    rows = None if way.rows is None else way.rows.contiguous()
    return Rows(rows, way.offs.contiguous(), count)


def product(
    x: Tensor, way: Routing, count: int, code: Tensor, scale: Tensor, low: Low | None = None
) -> Tensor:
    """x_e · dq(W_e)ᵀ + left_e · right_eᵀ [S, m] in bfloat16, of the codes [E * m, k] of all
    experts; ``low``'s right is [E, m, r].
    """
    stack = code.view(len(way.offs), -1, code.shape[1])
    more = () if low is None else (low.left.contiguous(), low.right.contiguous())
    return compiled.forward(x.contiguous(), Weights(stack, scale, *more), rows_of(way, count))


def grad_out_a(grad: Tensor, b: Tensor, way: Routing) -> Tensor:
    """D_e = dL/dO_e · b_e [S, r] of sorted rows, for b [E, m, r]."""
    turned = b.transpose(1, 2).contiguous()
    own = Rows(None, way.offs.contiguous(), len(grad))
    return compiled.forward(grad.contiguous(), Weights(turned), own)


def grad_x(
    grad: Tensor,
    n: int,
    way: Routing,
    code: Tensor,
    scale: Tensor,
    low: Low | None,
    spec: SiteSpec,
    x_dtype: torch.dtype,
) -> Tensor | None:
    """dL/dx [n, k] = Σ q(dL/dO_e ⊙ s_W,e) · W_e + left_e · dq(right_e) of sorted rows of dL/dO,
    over those that read a row of x; ``low``'s right are the codes [E * r, k]. None where dL/dO
    can't be cast by compiled code.
    """
    experts, features = len(way.offs), code.shape[1]
    rows = rows_of(way, len(grad))
    value = grad.new_empty(grad.shape, dtype=torch.bfloat16)
    columns = scale.view(experts, -1)
    if cpu_casts.cast_rows(grad, spec.grad_dtype, columns, value, ends=rows.ends) is None:
        return None
    more = ()
    if low is not None:
        right = low.right.view(experts, -1, features)
        more = (None, low.left.contiguous(), right.contiguous())  # type: ignore[assignment]
    stack = Weights(code.view(experts, -1, features), *more)
    sums = None
    if rows.rows is not None:
        sums = torch.zeros((n, features), dtype=torch.float32, device="cpu")
    return compiled.backward(value, stack, rows, sums).to(x_dtype)


def grad_b(grad: Tensor, out_a: Tensor, way: Routing, scaling: float, dtype: torch.dtype) -> Tensor:
    """dL/dB [out, r * E] = s · (dL/dO_e)ᵀ · O_A,e of sorted rows."""
    own = Rows(None, way.offs.contiguous(), len(grad))
    wide = grad.to(torch.bfloat16).contiguous()
    return _outer(out_a, wide, own, scaling, dtype, fastest=True)


def grad_a(d: Tensor, code: Tensor, way: Routing, dtype: torch.dtype) -> Tensor:
    """dL/dA [E * r, in] = D_eᵀ · x̂_e, for the codes of x̂ [n, in]."""
    return _outer(d, code.contiguous(), rows_of(way, len(d)), 1.0, dtype, fastest=False)


def _outer(
    low: Tensor, wide: Tensor, rows: Rows, factor: float, dtype: torch.dtype, *, fastest: bool
) -> Tensor:
    made = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    return compiled.outer(low.contiguous(), wide, rows, factor, made, fastest=fastest).to(dtype)
