"""``falqon::merged_linear_grad_x``: dL/dx of layers that share x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from falqon_fx.ops import gpu, lowering
from falqon_fx.site.nvfp4 import shape_of


@torch.library.custom_op("falqon::merged_linear_grad_x", mutates_args=())
def merged_linear_grad_x(
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    d: Sequence[Tensor],
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    turned: Sequence[Tensor],
    x_dtype: torch.dtype,
    spec_text: str,
) -> Tensor:
    """dL/dx [n, in] = Σ_i q(dL/dO_i) · dq(W_i) + Σ_j D_j · dq(Â_j), dL/dO_i [n, out_i] cast to FP8
    where W is. ``turned`` has W_iᵀ where they are kept, with zeros behind them, or nothing.

    See `falqon_fx.ops.lowering.merged_linear_grad_x`.
    """
    codes, codes_a = [lowering.as_read(w) for w in weight], [lowering.as_read(w) for w in a]
    return lower_grad_x(grad, codes, scale, d, codes_a, a_scale, turned, x_dtype, spec_text)


@merged_linear_grad_x.register_fake
def _(grad: Sequence[Tensor], weight: Sequence[Tensor], *rest: Any) -> Tensor:
    *_, x_dtype, _ = rest
    _, features = shape_of(weight[0])
    return grad[0].new_empty((grad[0].shape[0], features), dtype=x_dtype)


def lower_grad_x(grad: Sequence[Tensor], *rest: Any) -> Tensor:
    """`falqon_fx.ops.lowering.merged_linear_grad_x`, or its like for GPUs."""
    if grad[0].device.type == "cuda":
        return gpu.merged_linear_grad_x(grad, *rest)
    weight, scale, d, a, a_scale, _, x_dtype, spec_text = rest  # a CPU decodes W as it is
    given = weight, scale, d, a, a_scale
    return lowering.merged_linear_grad_x(grad, *given, x_dtype, spec_text)
