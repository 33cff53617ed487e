"""``falqon::outliers``: the cast error of x in a few channels, brought to the output of a layer
that has no adapter to do so (see `merged_linear`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from falqon_fx.ops.cast_errors import cast_error
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.site.casts import scale_of
from falqon_fx.site.numerics import without_autocast
from falqon_fx.site.spec import parse_spec


@torch.library.custom_op("falqon::outliers", mutates_args=())
def outliers(
    x: Tensor, channels: Tensor, columns: Tensor, out_dtype: torch.dtype, spec_text: str
) -> Tensor:
    """(x - dq(q(x)))_S · W_Sᵀ [..., out] in ``out_dtype``, for x [..., in] as `merged_linear` casts
    it: ``channels`` S int32 [c], ``columns`` W_S [out, c].

    No gradient passes: straight through the cast of x, its error has none.
    """
    return lower_outliers(x, channels, columns, out_dtype, spec_text)


@outliers.register_fake
def _(
    x: Tensor, channels: Tensor, columns: Tensor, out_dtype: torch.dtype, spec_text: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns.shape[0]), dtype=out_dtype)


@without_autocast
def lower_outliers(
    x: Tensor, channels: Tensor, columns: Tensor, out_dtype: torch.dtype, spec_text: str
) -> Tensor:
    """`outliers` by ATen, which Inductor sees on a GPU."""
    spec, dtype = parse_spec(spec_text), gemm_dtype(out_dtype, x.device)
    scale = scale_of(x.reshape(-1, x.shape[-1]).to(torch.float32), spec.operand, spec)
    y = cast_error(x, scale, channels, spec).to(dtype) @ columns.to(dtype).t()
    # Not `reshape`: below autograd that makes a view, which may not be written in place later.
    shape = (*x.shape[:-1], columns.shape[0])
    return torch.ops.aten._unsafe_view(y.to(out_dtype), shape)  # type: ignore[no-any-return]


def _constant(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _no_gradients(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
    return None, None, None, None, None


outliers.register_autograd(_no_gradients, setup_context=_constant)
OP = torch.ops.falqon.outliers.default
