"""Host side of the columns of adapters in FP8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import launch
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import POINTER, aligned
from falqon_fx.kernels.tails.spec import TailsSpec
from falqon_fx.site.numerics import FP8_DTYPES

_FP8_TYPE = {"e4m3": "*fp8e4nv:16", "e5m2": "*fp8e5:16"}


@dataclass(frozen=True)
class Tail:
    """One adapter: the first k columns of ``x``, with rows of any stride, are q(x_j) or g_j in FP8,
    and ``x_scale`` is that of q(x_j). ``w`` is Â [r, k] with ``a_scale``, or b [k, r]. Columns of t
    or D' begin at ``place``; what is clamped is added to ``count``, int32 [1].
    """

    x: Tensor
    w: Tensor
    alpha: Tensor
    x_scale: Tensor | None = None
    a_scale: Tensor | None = None
    place: int = 0
    count: Tensor | None = None

    def rank(self, spec: TailsSpec) -> int:
        return self.w.shape[0 if spec.direction == "forward" else 1]

    def k(self, direction: str) -> int:
        return self.w.shape[1 if direction == "forward" else 0]


def tails(
    adapters: Sequence[Tail], unit: Tensor, beside: Tensor | None, spec: TailsSpec
) -> list[Tensor]:
    """[O_A] or [D], [n, Σ r_j], and ``beside`` [n, ...] with t or D' in their columns, which are
    filled up to a multiple of 16 by zeros. ``unit`` float32 [n, 1] or [].

    Raises ValueError where the tensors are not what the spec is for.
    """
    _check(adapters, unit, beside, spec)
    ranks, n, first = [a.rank(spec) for a in adapters], len(adapters[0].x), adapters[0].x
    y = torch.empty((n, sum(ranks)), dtype=getattr(torch, spec.a_dtype), device=first.device)
    if n == 0:
        return [y, *([] if beside is None else [beside])]
    interpreted = runs_interpreted(first)

    def bytes_of(tensor: Tensor) -> Tensor:
        return tensor.view(torch.uint8) if interpreted else tensor

    arguments: list[Any] = []
    for j, (a, rank) in enumerate(zip(adapters, ranks, strict=True)):
        arguments += [bytes_of(a.x), a.x.stride(0), a.k(spec.direction)]
        arguments += [bytes_of(a.w), a.w.stride(0)]
        arguments += [a.x_scale] if spec.direction == "forward" else []
        arguments += [a.a_scale] if spec.direction == "forward" or spec.stores else []
        arguments += [a.alpha, rank, sum(ranks[:j])]
        arguments += [a.place, a.count] if spec.stores else []
    arguments += [unit, y, y.stride(0)]
    if beside is not None:
        arguments += [bytes_of(beside), beside.stride(0)]
    y, *made = launch(
        getattr(load(spec, interpreted), f"{spec.direction}_tails"),
        (cdiv(n, spec.block_m), spec.adapters),
        [*arguments, n],
        ["y_ptr", *(["tail_ptr"] if spec.stores else [])],
        num_warps=spec.num_warps,
        num_stages=spec.num_stages,
    )
    return [y, *(tensor.view(first.dtype) for tensor in made)]


def signatures(spec: TailsSpec) -> dict[str, dict[str, str]]:
    """Argument types of the kernel, for `aot.compile_ahead`: aligned, sizes divisible by 16."""
    types: dict[str, str] = {}
    forward = spec.direction == "forward"
    for j in range(spec.adapters):
        types |= {f"x{j}_ptr": _FP8_TYPE[spec.x], f"x{j}_stride": "i32:16", f"k{j}": "i32:16"}
        types |= {f"w{j}_ptr": _FP8_TYPE["e4m3"], f"w{j}_stride": "i32:16"}
        types |= {f"x{j}_scale_ptr": "*fp32:16"} if forward else {}
        types |= {f"a{j}_scale_ptr": "*fp32:16"} if forward or spec.stores else {}
        types |= {f"alpha{j}_ptr": "*fp32:16", f"rank{j}": "i32:16", f"before{j}": "i32:16"}
        types |= {f"place{j}": "i32:16", f"count{j}_ptr": "*i32:16"} if spec.stores else {}
    types |= {"unit_ptr": "*fp32:16", "y_ptr": POINTER[spec.a_dtype], "y_stride": "i32:16"}
    types |= {"tail_ptr": _FP8_TYPE[spec.x], "tail_stride": "i32:16"} if spec.stores else {}
    return {f"{spec.direction}_tails": types | {"n": "i32"}}


def _check(adapters: Sequence[Tail], unit: Tensor, beside: Tensor | None, spec: TailsSpec) -> None:
    forward, rows = spec.direction == "forward", len(adapters[0].x)
    scales = rows if spec.scales == "row" else 1
    if len(adapters) != spec.adapters or (beside is not None) != spec.stores:
        raise ValueError(f"tails: {len(adapters)} adapters, {spec} takes others")
    if unit.numel() != scales or runs_interpreted(unit) != (spec.operands == "float32"):
        raise ValueError(f"tails: a unit {tuple(unit.shape)} on {unit.device}, {spec} takes others")
    for a in adapters:
        k, rank = a.k(spec.direction), a.rank(spec)
        fits = len(a.x) == rows and a.x.shape[1] >= k and a.x.stride(1) == 1
        if a.x.dtype != FP8_DTYPES[spec.x] or not fits:
            raise ValueError(f"tails: x is {a.x.dtype} {tuple(a.x.shape)}, K is {k}")
        if (
            a.w.dtype != FP8_DTYPES["e4m3"]
            or a.w.stride(1) != 1
            or not 0 < rank <= spec.rank
            or len(a.alpha) != rank
        ):
            raise ValueError(f"tails: w is {a.w.dtype} {tuple(a.w.shape)}, {spec} takes others")
        if forward and (a.x_scale is None or a.x_scale.numel() != scales):
            raise ValueError(f"tails: a scale of x does not fit {spec}")
        if (forward or spec.stores) and a.a_scale is None:
            raise ValueError(f"tails: the scale of A is missing for {spec}")
        if beside is not None:
            last = a.place + aligned(rank)
            fits = len(beside) == rows and last <= beside.shape[1] and a.count is not None
            if not fits or beside.dtype != a.x.dtype or beside.stride(1) != 1:
                raise ValueError(f"tails: columns up to {last} of {tuple(beside.shape)}")
