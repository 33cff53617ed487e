"""``torch.ops.falqon.merged_linear_grad_fp8``: dL/dx and D with adapters in FP8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from falqon_fx.ops import fp8_adapter, fp8_gpu
from falqon_fx.ops.arguments import MergedGrad
from falqon_fx.ops.lowering import gemm_dtype


@torch.library.custom_op("falqon::merged_linear_grad_fp8", mutates_args=())
def merged_linear_grad(
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    b: Sequence[Tensor],
    alpha: Sequence[Tensor],
    counted: Sequence[Tensor],
    owner: Sequence[int],
    through_x: bool,
    needs_x: bool,
    turned: Sequence[Tensor],
    x_dtype: torch.dtype,
    spec_text: str,
) -> list[Tensor]:
    """[dL/dx, D]: dL/dx [n, in] in ``x_dtype`` ([0, in] unless ``needs_x``), with what comes
    through the adapters where they read x (``through_x``); D_j = dL/dO · s · B_j [n, r_j] side by
    side.

    g has one scale a token for all sites together, or one for all of it. ``counted`` says where
    clamped elements are counted: on a CPU B of each adapter, on a GPU the count of each site.
    ``turned`` may have [W_1ᵀ | ... | room for Â_1ᵀ ...], for a GPU: the room is written, of which a
    graph is told as it is lowered.
    """
    columns = grad, weight, scale, a, a_scale, b, alpha, counted
    numbers = owner, through_x, needs_x
    return lower_grad(MergedGrad(*columns, *numbers, turned, x_dtype, spec_text))


def lower_grad(given: MergedGrad) -> list[Tensor]:
    """The same as it is computed on the device at hand."""
    if given.grad[0].device.type == "cuda":
        return fp8_gpu.merged_linear_grad(given)
    return fp8_adapter.merged_linear_grad(given)


@merged_linear_grad.register_fake
def _(*args: Any) -> list[Tensor]:
    given = MergedGrad(*args)
    first, n = given.grad[0], given.grad[0].shape[0]
    ranks = sum(factor.shape[1] for factor in given.b)
    size = (n if given.needs_x else 0, given.weight[0].shape[1])
    of_x = first.new_empty(size, dtype=given.x_dtype)
    return [of_x, first.new_empty((n, ranks), dtype=gemm_dtype(first.dtype, first.device))]


OP = torch.ops.falqon.merged_linear_grad_fp8.default
