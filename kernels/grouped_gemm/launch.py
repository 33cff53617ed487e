"""Host side of the FP8 GEMM over experts: the table of tiles, the output, the launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from falqon_fx.kernels.gemm.launch import programs
from falqon_fx.kernels.grouped_gemm.spec import GroupedGemmSpec
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import launch
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import POINTER
from falqon_fx.site.numerics import FP8_DTYPES

_FP8_TYPE = {"e4m3": "fp8e4nv", "e5m2": "fp8e5"}


@dataclass(frozen=True)
class Tiles:
    """Which expert's rows each tile has, for ``block_m`` rows a tile and offsets int32 [E].

    ``expert`` and ``first`` are int32 [T]: the expert of a tile, and its first row. T is what any
    routing of so many rows fits into; ``count`` int32 [1] is how many tiles this one has.
    """

    expert: Tensor
    first: Tensor
    count: Tensor
    offs: Tensor
    block_m: int


def tiles_of(offs: Tensor, rows: int, block_m: int) -> Tiles:
    """The table for ``rows`` rows that are sorted by expert. A device makes it, and nobody waits
    for it: as many calls whatever the routing and the number of experts.
    """
    experts = offs.shape[0]
    before = torch.cat([offs.new_zeros(1), offs[:-1]])
    each = torch.div(offs - before + (block_m - 1), block_m, rounding_mode="floor")
    ends = each.cumsum(0, dtype=torch.int32)
    tile = torch.arange(rows // block_m + experts, device=offs.device, dtype=torch.int32)
    expert = torch.bucketize(tile, ends, right=True, out_int32=True).clamp(max=experts - 1)
    at = expert.to(torch.int64)
    first = before[at] + (tile - (ends - each)[at]) * block_m
    return Tiles(expert, first.to(torch.int32), ends[-1:], offs, block_m)


def grouped_gemm(
    q: Tensor,
    q_scale: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    tiles: Tiles,
    spec: GroupedGemmSpec,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """Y [S, N] as `GroupedGemmSpec` says; what lies behind the last expert's rows is anything.

    ``q`` [n, K] is FP8 with ``q_scale`` float32 [n, 1], ``weight`` E4M3 [E, N, K] ("nk") or
    [E, K, N] ("kn"), or both are of another dtype and have no scales; ``scale`` float32 [E * N, 1]
    or None, ``rows`` int64 [S] or None. Sums are float32, and so is all that follows up to the
    store.

    Raises ValueError where the tensors are not what the spec is for.
    """
    experts, *sizes = weight.shape
    columns, k = sizes if spec.layout == "nk" else reversed(sizes)
    _check(q, q_scale, rows, weight, scale, tiles, spec)
    count = len(q) if rows is None else len(rows)
    y = torch.empty((count, columns), dtype=getattr(torch, spec.out_dtype), device=q.device)
    if count == 0:
        return y
    if spec.operands in ("bfloat16", "float32") and spec.is_fp8:  # to be decoded
        q, weight = q.view(torch.uint8), weight.view(torch.uint8)
    arguments: list[Any] = [q.contiguous(), q_scale] if spec.is_fp8 else [q.contiguous()]
    arguments += [rows] if spec.gather else []
    arguments += [weight] if spec.w_scale == "none" else [weight, scale]
    if spec.extra:
        arguments += _extra(left, right, (experts, count, columns), spec)
    arguments += [y, tiles.expert, tiles.first, tiles.offs, tiles.count, columns, k]
    most = len(tiles.expert) * cdiv(columns, spec.block_n)
    (y,) = launch(
        load(spec, runs_interpreted(q)).grouped_gemm,
        (min(most, programs(q.device)),),
        arguments,
        ["y_ptr"],
        num_warps=spec.num_warps,
        num_stages=spec.num_stages,
    )
    return y


def _extra(
    left: Tensor | None, right: Tensor | None, sizes: tuple[int, int, int], spec: GroupedGemmSpec
) -> list[Any]:
    """The arguments of left [S, r] and right [E, N, r] or [E, r, N]."""
    experts, count, columns = sizes
    dtype = getattr(torch, spec.a_dtype)
    if left is None or right is None or {left.dtype, right.dtype} != {dtype}:
        raise ValueError(f"grouped_gemm: {spec} takes left and right of {dtype}")
    rank = left.shape[1]
    of_one = (columns, rank) if spec.layout == "nk" else (rank, columns)
    if tuple(right.shape) != (experts, *of_one) or len(left) != count or rank > spec.extra:
        raise ValueError(f"grouped_gemm: left {tuple(left.shape)}, right {tuple(right.shape)}")
    return [left.contiguous(), right.contiguous(), rank]


def _check(
    q: Tensor,
    q_scale: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    tiles: Tiles,
    spec: GroupedGemmSpec,
) -> None:
    experts, *sizes = weight.shape
    columns, k = sizes if spec.layout == "nk" else reversed(sizes)
    of_x = FP8_DTYPES[spec.x] if spec.is_fp8 else getattr(torch, spec.x)
    if q.dtype != of_x or q.dim() != 2 or q.shape[1] != k:
        raise ValueError(f"grouped_gemm: q is {q.dtype} {tuple(q.shape)}, K is {k}")
    if weight.dtype != (FP8_DTYPES["e4m3"] if spec.is_fp8 else of_x) or not weight.is_contiguous():
        raise ValueError(f"grouped_gemm: a weight is {weight.dtype}, strides {weight.stride()}")
    scales = None if q_scale is None else q_scale.numel()
    if scales != (len(q) if spec.is_fp8 else None) or (rows is None) is spec.gather:
        raise ValueError(f"grouped_gemm: {scales} scales of {len(q)} rows, {spec} takes others")
    if (None if scale is None else scale.numel()) != (
        experts * columns if spec.w_scale == "row" else None
    ):
        raise ValueError(f"grouped_gemm: the scales of W do not fit w_scale={spec.w_scale!r}")
    if tiles.block_m != spec.block_m or len(tiles.offs) != experts:
        raise ValueError("grouped_gemm: the table is of other tiles")
    if spec.even_k and k % spec.block_k:
        raise ValueError(f"grouped_gemm: K = {k} is no multiple of {spec.block_k}")
    if spec.operands != "float32" and runs_interpreted(q):
        raise ValueError("grouped_gemm: the interpreter needs operands='float32'")


def signatures(spec: GroupedGemmSpec) -> dict[str, dict[str, str]]:
    """Argument types of the kernel, for `aot.compile_ahead`: aligned, sizes divisible by 16."""
    x, w = "*u8:16", "*u8:16"
    if spec.operands == "fp8":
        x, w = f"*{_FP8_TYPE[spec.x]}:16", "*fp8e4nv:16"
    elif not spec.is_fp8:
        x = w = POINTER[spec.x]
    types = {"x_ptr": x} | ({"x_scale_ptr": "*fp32:16"} if spec.is_fp8 else {})
    if spec.gather:
        types["rows_ptr"] = "*i64:16"
    types["w_ptr"] = w
    if spec.w_scale == "row":
        types["w_scale_ptr"] = "*fp32:16"
    if spec.extra:
        types |= {"left_ptr": POINTER[spec.a_dtype], "right_ptr": POINTER[spec.a_dtype]}
        types["rank"] = "i32:16"
    types["y_ptr"] = POINTER[spec.out_dtype]
    types |= dict.fromkeys(("expert_ptr", "first_ptr", "offs_ptr"), "*i32:16")
    types["tiles_ptr"] = "*i32"  # the last of a column
    return {"grouped_gemm": types | {"columns": "i32:16", "k": "i32:16"}}
