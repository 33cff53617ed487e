"""The write-back as ATen operations: the reference, and what runs without compiled code."""

from __future__ import annotations

import torch
from torch import Tensor

from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.rows.batch import Batched
from falqon_fx.site.numerics import (
    E4M3,
    amax_to_scale,
    decode_fp8,
    encode_fp8,
    philox_uint16,
    round_to_fp8,
    round_to_fp8_stochastic,
)
from falqon_fx.site.record import NONFINITE, SITE, STEP, TOO_LARGE
from falqon_fx.site.spec import RowsSpec


def select_rows(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` rows with the largest ``score`` [G, out] (ties to the lowest row), [G, count],
    and which of them are worth writing: finite and not zero.
    """
    score = torch.where(score < float("inf"), score, -1.0)  # NaN and Inf compare false
    place = torch.arange(score.shape[-1], device=score.device)
    # A float's bits order like the float when it is not negative; the row breaks ties.
    key = (score.clamp(min=0).view(torch.int32).to(torch.int64) << 32) | (0xFFFFFFFF - place)
    rows = key.topk(count, dim=-1).indices
    return rows, score.gather(-1, rows) > 0


def write_by_aten(
    sites: list[Batched], count: int, spec: RowsSpec, limit: float | None
) -> cpu.ChosenRows:
    """Gather → add → new row scale → cast → scatter. A row with a magnitude beyond ``limit`` times
    its scale stays as it is.
    """
    out = sites[0].applied.shape[0]
    applied = torch.stack([site.applied for site in sites]).to(torch.float32)  # [G, out, r]
    target = torch.stack([site.lora_b for site in sites]).to(torch.float32)
    if spec.pending == "drop":
        target = applied + target
    score = (target - applied).abs_().sum(dim=-1)  # [G, out]
    rows, worth = select_rows(score, count)  # [G, k]
    changed = torch.stack([_flag(site) for site in sites])
    worth = worth & changed[:, None]
    nonfinite = (~(score < float("inf"))).sum(dim=-1) * changed  # [G]

    index = rows[..., None].expand(-1, -1, applied.shape[-1])
    old_applied = applied.gather(1, index)
    new_applied = target.gather(1, index).to(sites[0].applied.dtype)
    new_applied = torch.where(worth[..., None], new_applied, old_applied.to(new_applied.dtype))
    held = new_applied.to(torch.float32)  # what W' will really contain
    scaling = torch.tensor(
        [site.scaling for site in sites], dtype=torch.float32, device=held.device
    )[:, None, None]

    per_row = sites[0].scale.dim() == 2
    each = [*zip(sites, rows.unbind(), strict=True)]
    old_code = torch.stack([site.weight.index_select(0, row) for site, row in each])
    a_code = torch.stack([site.weight[out:] for site in sites])
    scale = torch.stack([site.scale for site in sites]).reshape(len(sites), -1, 1)
    a_scale, old_scale = scale, scale
    if per_row:
        a_scale, old_scale = scale[:, out:], scale.gather(1, rows[..., None])
    lora_a = decode_fp8(a_code, a_scale, torch.float32)  # [G, r, in]
    old = decode_fp8(old_code, old_scale, torch.float32)
    asked = torch.bmm((held - old_applied) * scaling, lora_a)
    base = [site.base.index_select(0, row) for site, row in each if site.base is not None]
    if base:
        value = torch.stack(base).to(torch.float32) + torch.bmm(held * scaling, lora_a)
    else:
        value = old + asked  # [G, k, in]

    amax = value.abs().amax(dim=-1, keepdim=True)
    fits = (amax < float("inf"))[..., 0]  # NaN compares false
    if limit is not None:
        fits &= (amax <= limit * old_scale)[..., 0]
    too_large = (worth & ~fits).sum(dim=-1)  # [G]
    worth = worth & fits
    new_applied = torch.where(worth[..., None], new_applied, old_applied.to(new_applied.dtype))
    new_scale = old_scale
    if per_row:
        new_scale = torch.where(worth[..., None], amax_to_scale(amax, E4M3, spec.scale), old_scale)
    code = encode_fp8(_round(value * new_scale.reciprocal(), rows, sites, spec), E4M3)
    code = torch.where(worth[..., None], code, old_code)

    # On CPU, where looking is free, the counters are left alone when there is nothing to count.
    counted = torch.stack([nonfinite, too_large], dim=-1)
    counts = counted.device.type != "cpu" or bool(counted.any())
    written = worth.to(sites[0].writes.dtype)
    scattered = (rows, code, new_scale, new_applied, written, counted)
    for site, row, *new in zip(sites, *(column.unbind() for column in scattered), strict=True):
        site.weight.index_copy_(0, row, new[0])
        if per_row:
            site.scale.index_copy_(0, row, new[1])
        site.applied.index_copy_(0, row, new[2])
        site.writes.index_add_(0, row, new[3])
        if counts:
            site.counters[NONFINITE] += new[4][0]
            site.counters[TOO_LARGE] += new[4][1]
    remains = (target.gather(1, index) - new_applied.to(torch.float32)).abs().sum(dim=-1)
    return cpu.ChosenRows(rows, worth, old, asked, value, score, remains)


def _flag(site: Batched) -> Tensor:
    assert site.changed is not None
    return site.changed


def _round(scaled: Tensor, rows: Tensor, sites: list[Batched], spec: RowsSpec) -> Tensor:
    if spec.rounding == "nearest":
        return round_to_fp8(scaled, E4M3)
    counters = torch.stack([site.counters for site in sites])[:, None]  # [G, 1, COUNTERS]
    random = philox_uint16(
        rows, scaled.shape[-1], counters[..., STEP], counters[..., SITE], spec.seed
    )
    return round_to_fp8_stochastic(scaled, random, E4M3)
