"""What stands beside q(x) and q(dL/dO) with adapter_dtype="fp8", and the casts of such adapters, by
generated kernels; by ATen on a CPU, and where one scale is that of a whole tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from falqon_fx.config import Granularity, Scale
from falqon_fx.kernels.adapter_fp8.examples import KERNEL as ADAPTER_FP8
from falqon_fx.kernels.adapter_fp8.launch import adapter_fp8
from falqon_fx.kernels.adapter_fp8.spec import AdapterFp8Spec
from falqon_fx.kernels.fixed import Fixed, FixedDtype
from falqon_fx.kernels.hardware import cast_mode
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.products.contest import Contest, against_aten, where_runs
from falqon_fx.kernels.products.problem import dtype_name, fp8_format
from falqon_fx.kernels.spec import (
    MAX_SIBLINGS,
    MAX_TAIL,
    CastMode,
    Fp8Format,
    InputDtype,
    aligned,
    columns_of,
    sizes_of,
)
from falqon_fx.kernels.tails import launch as tails_launch
from falqon_fx.kernels.tails.launch import Tail
from falqon_fx.kernels.tails.spec import RARE, TailsSpec, is_usual
from falqon_fx.site.numerics import FP8_MAX, ROUNDS_TO_MAX, filled
from falqon_fx.site.spec import parse_spec

Direction = Literal["forward", "backward"]


def adapter_casts(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    plain: functools.partial[list[Tensor]],
    spec_text: str,
    fixed_a: Sequence[Tensor] = (),
    fixed_b: Sequence[Tensor] = (),
    columns: Sequence[Tensor] = (),
) -> Contest:
    """[Â_j, its scale, b_j, α_j] of each adapter j in turn: see
    `falqon_fx.kernels.adapter_fp8.launch.adapter_fp8`. ``plain`` makes them by ATen.
    """
    site, first = parse_spec(spec_text), lora_a[0]
    fixed, adapters = Fixed(fixed_a, fixed_b, columns), len(lora_a)

    def generated(made: AdapterFp8Spec) -> list[Tensor]:
        return adapter_fp8(lora_a, lora_b, scaling, base_scale, made, fixed_a, fixed_b, columns)

    def made() -> tuple[AdapterFp8Spec, ...]:
        kinds = {t.dtype for t in (*lora_a, *lora_b)}
        of_fixed, widest = {t.dtype for t in fixed.tensors}, max(fixed.in_fp8(lora_a))
        alike = len(kinds) == 1 and len(of_fixed) <= 1
        if site.granularity != "row" or not alike or widest > MAX_TAIL:
            return ()
        where, rank = where_runs(first), columns_of(widest)
        given = dtype_name(first.dtype), site.scale, cast_mode(where)
        spec = _cast_spec(*given, adapters, rank, dtype_name(*of_fixed) if of_fixed else "none")
        ranks = [*map(len, lora_a), *fixed.ranks(adapters), *fixed.counts(adapters)]
        others = [*(a.shape[1] for a in lora_a), *map(len, lora_b)]
        return (spec,) if ADAPTER_FP8.takes(spec, sizes_of(ranks, others), where) else ()

    shapes = [tuple(t.shape) for t in (*lora_a, *lora_b, *fixed.tensors)]
    what = f"casts of adapters to FP8 {shapes}"
    return against_aten(what, first, made, generated, plain, site.kernel)


def all_tails(
    direction: Direction,
    adapters_of: Callable[[Tensor], Sequence[Tail]],
    wide: Tensor,
    unit: Tensor,
    stores: bool,
    a_dtype: torch.dtype,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """O_A or D of all adapters, side by side, and ``wide``, with their columns where they are
    stored. ``adapters_of`` a version of it are those that read it.

    A launch takes three adapters, but where formats or scales are rare 64 columns of one. There,
    and where one is beyond 64, ranks are filled up to multiples of 16: kernels for others would
    spill.
    """
    scales: Granularity = "row" if unit.dim() == 2 else "tensor"
    usual = is_usual(direction, fp8_format(wide.dtype), scales, dtype_name(a_dtype))
    made: list[Tensor] = []
    ranks = [a.w.shape[0 if direction == "forward" else 1] for a in adapters_of(wide)]
    narrow = usual and max(ranks, default=0) <= RARE
    widths = [rank if narrow else aligned(rank) for rank in ranks]
    places = _places(widths, MAX_TAIL if usual else RARE)
    most = MAX_SIBLINGS if usual else 1
    for first in range(0, len(places), most):
        given = zip(adapters_of(wide), widths, strict=True)
        adapters = [_filled(direction, a, width) for a, width in given]
        here = places[first : first + most]
        part = [_columns_of(direction, adapters[j], *columns) for j, *columns in here]
        beside = wide if stores else None
        y, *wider = tails(direction, part, unit, beside, a_dtype, kernel).run()
        made.append(y)
        wide = wider[0] if wider else wide
    if not made:
        made = [wide.new_empty((len(wide), 0), dtype=a_dtype)]
    whole = made[0] if len(made) == 1 else torch.cat(made, dim=1)
    if widths != ranks:
        parts = zip(whole.split(widths, dim=1), ranks, strict=True)
        whole = torch.cat([part.narrow(1, 0, rank) for part, rank in parts], dim=1)
    return whole, wide


def _places(widths: Sequence[int], most: int) -> list[tuple[int, int, int]]:
    """The number of each adapter with the first and the number of its columns, at most so many."""
    return [
        (j, start, min(most, width - start))
        for j, width in enumerate(widths)
        for start in range(0, width, most)
    ]


def _filled(direction: Direction, a: Tail, width: int) -> Tail:
    """An adapter of so many columns, those behind its own zeros."""
    axis = 0 if direction == "forward" else 1
    lacking = width - a.w.shape[axis]
    if not lacking:
        return a
    pad = partial(torch.nn.functional.pad, value=1.0)
    a_scale = a.a_scale
    if a_scale is not None and a_scale.dim() == 2:
        a_scale = pad(a_scale, [0, 0, 0, lacking])
    return replace(a, w=filled(a.w, axis), alpha=pad(a.alpha, [0, lacking]), a_scale=a_scale)


def _columns_of(direction: Direction, a: Tail, start: int, count: int) -> Tail:
    """Some columns of an adapter's part."""
    axis = 0 if direction == "forward" else 1
    if count == a.w.shape[axis]:
        return a
    a_scale = a.a_scale
    if a_scale is not None and a_scale.dim() == 2:
        a_scale = a_scale.narrow(0, start, count)
    w, alpha = a.w.narrow(axis, start, count), a.alpha.narrow(0, start, count)
    return replace(a, w=w, alpha=alpha, a_scale=a_scale, place=a.place + start)


def tails(
    direction: Direction,
    adapters: Sequence[Tail],
    unit: Tensor,
    beside: Tensor | None,
    a_dtype: torch.dtype,
    kernel: str,
) -> Contest:
    """[O_A] or [D] side by side, and ``beside`` with t or D' in its columns: see
    `falqon_fx.kernels.tails.launch.tails`. What is clamped is counted where it is made; while
    candidates are timed, that is more often than it is used.
    """
    x = adapters[0].x

    def generated(spec: TailsSpec) -> list[Tensor]:
        return tails_launch.tails(adapters, unit, beside, spec)

    def plain() -> list[Tensor]:
        return _plain(direction, adapters, unit, beside, a_dtype)

    def made() -> tuple[TailsSpec, ...]:
        ranks = tuple(a.w.shape[0 if direction == "forward" else 1] for a in adapters)
        return _specs(
            direction,
            ranks,
            fp8_format(x.dtype),
            "row" if unit.dim() == 2 else "tensor",
            dtype_name(a_dtype),
            beside is not None,
            runs_interpreted(x),
        )

    what = f"{direction} columns in FP8 {[tuple(a.w.shape) for a in adapters]}"
    contest = against_aten(what, x, made, generated, plain, kernel)
    if not x.is_cuda:
        return contest
    # What ATen writes in place is nothing for a graph.
    own = {name: run for name, run in contest.candidates.items() if name != "dequantize"}
    if len(x) == 0:  # nothing is launched, nor chosen
        own["dequantize"] = next(iter(own.values()))
    return replace(contest, candidates=own, wanted="auto")


def _plain(
    direction: Direction,
    adapters: Sequence[Tail],
    unit: Tensor,
    beside: Tensor | None,
    a_dtype: torch.dtype,
) -> list[Tensor]:
    operand = torch.bfloat16 if a_dtype == torch.bfloat16 else torch.float32
    parts: list[Tensor] = []
    for a in adapters:
        x, w = a.x.narrow(1, 0, a.k(direction)).to(operand), a.w.to(operand)
        a_scale = None if a.a_scale is None else a.a_scale.reshape(1, -1)
        if direction == "forward":
            assert a.x_scale is not None
            assert a_scale is not None
            product = (x @ w.t()).to(torch.float32) * a.x_scale * a_scale
            own = unit * a.alpha
            scaled: Tensor | None = product.to(a_dtype).to(torch.float32) / own
        else:
            product = (x @ w).to(a_dtype).to(torch.float32)
            parts.append((product * (unit / a.alpha)).to(a_dtype))
            scaled = None if beside is None or a_scale is None else product * (a_scale / a.alpha)
        if scaled is None or beside is None:
            continue
        assert a.count is not None
        most = FP8_MAX[a.x.dtype]
        a.count.add_((scaled.abs() > ROUNDS_TO_MAX[a.x.dtype]).sum().to(torch.int32))
        code = scaled.clamp(-most, most).to(a.x.dtype)
        if direction == "forward":
            parts.append((code.to(torch.float32) * own).to(a_dtype))
        rank = code.shape[1]
        columns = beside.narrow(1, a.place, aligned(rank))
        columns.view(torch.uint8).zero_()
        columns.narrow(1, 0, rank).copy_(code)
    return [torch.cat(parts, dim=1), *([] if beside is None else [beside])]


@functools.lru_cache(maxsize=4096)
def _cast_spec(
    given: InputDtype, scale: Scale, cast: CastMode, adapters: int, rank: int, fixed: FixedDtype
) -> AdapterFp8Spec:
    return AdapterFp8Spec.for_rank(rank, given, scale, cast, adapters, fixed)


@functools.lru_cache(maxsize=4096)
def _specs(
    direction: Direction,
    ranks: tuple[int, ...],
    x: Fp8Format,
    scales: Granularity,
    a_dtype: InputDtype,
    stores: bool,
    interpreted: bool,
) -> tuple[TailsSpec, ...]:
    made = TailsSpec.for_ranks(
        ranks,
        direction=direction,
        x=x,
        scales=scales,
        a_dtype=a_dtype,
        stores=stores,
        interpreted=interpreted,
    )
    return (made,)
