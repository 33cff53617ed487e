"""Host side of the gradients of experts' adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from falqon_fx.kernels.grouped_outer.spec import GroupedOuterSpec
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import launch
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import POINTER
from falqon_fx.site.numerics import E4M3


def grouped_outer(
    low: Tensor,
    wide: Tensor,
    rows: Tensor | None,
    offs: Tensor,
    factor: float,
    spec: GroupedOuterSpec,
) -> Tensor:
    """Y as `GroupedOuterSpec` says: [E * r, N] ("slowest") or [N, r * E] ("fastest"), for ``low``
    [S, r] and ``wide`` [S, N], or [n, N] and ``rows`` int64 [S], with offsets int32 [E]. Zeros
    where an expert has no row. Sums are float32, in one order.

    Raises ValueError where the tensors are not what the spec is for.
    """
    experts, (count, rank), columns = offs.shape[0], low.shape, wide.shape[1]
    fp8 = spec.wide_dtype == "e4m3"
    if low.dtype != getattr(torch, spec.low_dtype) or not 0 < rank <= spec.rank:
        raise ValueError(f"grouped_outer: low is {low.dtype} {tuple(low.shape)} for {spec}")
    if wide.dtype != (E4M3 if fp8 else getattr(torch, spec.wide_dtype)):
        raise ValueError(f"grouped_outer: wide is {wide.dtype}, {spec} takes another")
    if (rows is None) is spec.gather or (wide if rows is None else rows).shape[0] != count:
        raise ValueError(f"grouped_outer: {count} rows of low, wide {tuple(wide.shape)}")
    interpreted = runs_interpreted(low)
    if interpreted and spec.operands == "native":
        raise ValueError("grouped_outer: the interpreter needs operands='float32'")
    slowest = spec.store == "slowest"
    shape = (experts * rank, columns) if slowest else (columns, rank * experts)
    dtype = getattr(torch, spec.out_dtype)
    if count == 0:
        return torch.zeros(shape, dtype=dtype, device=low.device)
    wide = wide.view(torch.uint8) if fp8 else wide
    arguments: list[Any] = [low.contiguous(), wide.contiguous()]
    arguments += [rows] if spec.gather else []
    y = torch.empty(shape, dtype=dtype, device=low.device)
    (y,) = launch(
        load(spec, interpreted).grouped_outer,
        (experts, cdiv(columns, spec.block_n)),
        [*arguments, offs, y, factor, experts, rank, columns],
        ["y_ptr"],
        num_warps=spec.num_warps,
        num_stages=spec.num_stages,
    )
    return y


def signatures(spec: GroupedOuterSpec) -> dict[str, dict[str, str]]:
    """Argument types of the kernel, for `aot.compile_ahead`: aligned, sizes divisible by 16."""
    fp8 = spec.wide_dtype == "e4m3"
    types = {"low_ptr": POINTER[spec.low_dtype]}
    types["wide_ptr"] = "*u8:16" if fp8 else POINTER[spec.wide_dtype]
    if spec.gather:
        types["rows_ptr"] = "*i64:16"
    types |= {"offs_ptr": "*i32:16", "y_ptr": POINTER[spec.out_dtype], "factor": "fp32"}
    return {"grouped_outer": types | {"experts": "i32", "rank": "i32:16", "columns": "i32:16"}}
