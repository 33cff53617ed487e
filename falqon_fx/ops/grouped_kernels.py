"""The products of experts by a generated kernel, which reads FP8 as it lies: nothing is decoded
into memory, and x is gathered as it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from falqon_fx.kernels.hardware import family, fp8_architecture, multiplies_fp8
from falqon_fx.ops.grouped import Routing, Stack
from falqon_fx.ops.products import sizes_known
from falqon_fx.site.numerics import E4M3, E5M2, as_operand, dtype_name
from falqon_fx.site.spec import SiteSpec


@dataclass(frozen=True)
class Low:
    """What is added to a product, left_e · right_e [S, r] · [r, N], of each expert's rows; right is
    [E, N, r] in forward and [E, r, N] in backward.
    """

    left: Tensor
    right: Tensor


def generated(
    x: Tensor,
    spec: SiteSpec,
    rank: int,
    sizes: Sequence[int],
    result: torch.dtype = torch.bfloat16,
) -> bool:
    """Whether the kernel computes the products of rows of x: on a GPU with FP8, where all sizes are
    known, unless ``kernel`` asks for others, for what kernels have been compiled ahead.
    """
    wanted = spec.kernel in ("auto", "max-autotune", "triton")
    if not (wanted and multiplies_fp8(fp8_architecture(x.device)) and sizes_known((x,))):
        return False
    from falqon_fx.kernels.grouped_gemm.tiles import is_compiled

    dtypes = {dtype_name(x.dtype), dtype_name(result)}
    usual = len(dtypes) == 1 and spec.grad_dtype == E5M2
    return usual and is_compiled(rank, sizes, dtypes.pop())


def grad_out_a(grad: Tensor, b: Tensor, way: Routing) -> Tensor:
    """D_e = dL/dO_e · b_e [S, r] of sorted rows, for b [E, m, r] of the same dtype."""
    from falqon_fx.kernels.grouped_gemm.launch import grouped_gemm, tiles_of
    from falqon_fx.kernels.grouped_gemm.tiles import grouped_spec

    _, k, rank = b.shape
    dtype: Any = dtype_name(grad.dtype)
    given: Any = {"x": dtype, "dtype": dtype, "a_dtype": dtype, "columns": rank}
    spec = grouped_spec(family(fp8_architecture(grad.device)), k, backward=True, **given)
    tiles = tiles_of(way.offs, grad.shape[0], spec.block_m)
    return grouped_gemm(grad, None, None, b.contiguous(), None, tiles, spec)


def adapter_gradient(
    low: Tensor,
    wide: Tensor,
    way: Routing,
    factor: float,
    out_dtype: torch.dtype,
    *,
    of_a: bool,
) -> Tensor:
    """dL/dA [E * r, in] of D and x̂, whose rows are gathered, or dL/dB [out, r * E] of O_A and the
    sorted rows of dL/dO.
    """
    from falqon_fx.kernels.grouped_outer.launch import grouped_outer
    from falqon_fx.kernels.grouped_outer.spec import GroupedOuterSpec

    rows = way.rows if of_a else None
    given: Any = {
        "low_dtype": dtype_name(low.dtype),
        "wide_dtype": "e4m3" if of_a else dtype_name(wide.dtype),
        "out_dtype": dtype_name(out_dtype),
        "gather": rows is not None,
        "store": "slowest" if of_a else "fastest",
        "interpreted": low.device.type == "cpu",
    }
    spec = GroupedOuterSpec.for_rank(low.shape[1], **given)
    return grouped_outer(low, wide, rows, way.offs, factor, spec)


def product(
    q: Tensor,
    q_scale: Tensor,
    way: Routing,
    stack: Stack,
    scale: Tensor | None,
    out_dtype: torch.dtype,
    low: Low | None,
    *,
    backward: bool = False,
    skinny: bool = False,
) -> Tensor:
    """O_e = x_e · dq(W_e)ᵀ + left_e · right_eᵀ [S, m] of sorted rows, or with ``backward``
    dL/dx_e = g_e · W_e + left_e · right_e, whose rows of ``q`` are sorted already. ``skinny``
    where W has few rows: O_A.
    """
    from falqon_fx.kernels.grouped_gemm.launch import grouped_gemm, tiles_of
    from falqon_fx.kernels.grouped_gemm.tiles import grouped_spec

    rows = None if backward else way.rows
    count = (q if rows is None else rows).shape[0]
    k = stack.code.shape[1 if backward else 2]
    given: Any = {
        "x": "e4m3" if q.dtype == E4M3 else "e5m2",
        "dtype": dtype_name(out_dtype),
        "a_dtype": dtype_name(torch.bfloat16 if low is None else low.left.dtype),
        "rank": 0 if low is None else low.left.shape[1],
        "gather": rows is not None,
        "columns": stack.code.shape[1] if skinny else None,
    }
    spec = grouped_spec(family(fp8_architecture(q.device)), k, backward=backward, **given)
    tiles = tiles_of(way.offs, count, spec.block_m)
    more = (None, None) if low is None else (low.left, low.right)
    weight = as_operand(stack.code)
    return grouped_gemm(q, q_scale, rows, weight, scale, tiles, spec, *more)
