"""The row-wise proxy update (paper section 3): B's steps are written into the FP8 weight.

With the base weight at hand a row is cast from it, W[k] ← q(base[k] + s · B[k] · Â): one cast
however often it is written. Where `prepare` freed it, as in the public code, all that is known of a
row are its last FP8 bytes, W[k] ← q(dq(W[k]) + s · ΔB[k] · Â): every write adds a cast's error.

All sites of one shape are updated together as one batch of G. Nothing here reads a value back to
the host on an accelerator; on CPU, where looking is free, unchanged sites are skipped at once.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from falqon_fx.base import row_chunks, sample
from falqon_fx.errors import SiteError
from falqon_fx.kernels import cpu
from falqon_fx.numerics import (
    E4M3,
    amax_to_scale,
    decode_fp8,
    encode_fp8,
    philox_uint16,
    round_to_fp8,
    round_to_fp8_stochastic,
    without_autocast,
)
from falqon_fx.rows import audit, dropped
from falqon_fx.spec import RowsSpec, parse_rows_spec

# Columns of a site's `counters` (int64).
COUNTERS = cpu.COUNTERS
FINGERPRINT_B, FINGERPRINT_A, FINGERPRINT_W, STEP, SITE, NONFINITE, STALE = range(COUNTERS)
lock = threading.RLock()  # one thread at a time looks up states and writes them
_CHUNK = 1 << 17  # elements held in float32 at a time: temporaries stay in the cache


def fingerprint(batch: Tensor) -> Tensor:
    """64-bit hash of the bits of each tensor of a batch [G, m, n]; zeros hash to zero.

    Σ_ij word_ij · q_i · p_j mod 2**64 with fixed odd-looking p and q: it depends on the place of
    every element and sees every change of a single one. A word is 64 bits of a row; its upper half
    is added to the lower, since what differs in the last bits of a word, such as two signs, could
    cancel modulo 2**64.
    """
    # The second view gives a dimension of size 1 the stride that a view as int64 asks for.
    batch = batch.detach().contiguous().view(-1).view(batch.shape)
    if batch.storage_offset():
        batch = batch.clone()  # a view as int64 must be aligned
    bits = batch.view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[batch.element_size()]
    )
    if bits.shape[-1] * bits.element_size() % 8:
        words = bits.to(torch.int64)
    else:
        whole = bits.view(torch.int64)
        words = torch.add(whole, whole >> 32, alpha=5)
    # Sums over rows vectorise, those over a few columns don't.
    columns = words.mul_(_hash_weights(words.shape[1], words, 0x3F58476D1CE4E5B9)[:, None]).sum(1)
    return (columns * _hash_weights(words.shape[2], words, 0x1E3779B97F4A7C15)).sum(-1)


def _fingerprints(tensors: list[Tensor]) -> Tensor:
    """The `fingerprint` of each of G tensors of one shape, int64 [G]."""
    if tensors[0].device.type == "cpu" and (compiled := cpu.fingerprints(tensors)) is not None:
        return compiled
    return fingerprint(torch.stack(tensors))


def _hash_weights(count: int, like: Tensor, multiplier: int) -> Tensor:
    mixed = torch.arange(1, count + 1, device=like.device) * multiplier
    return (mixed ^ (mixed >> 29)) * multiplier | 1


def site_number(mixed: Tensor) -> Tensor:
    """The 32 bits by which random numbers tell a site from others, from a 64-bit hash of it."""
    return (mixed ^ (mixed >> 32)) & 0xFFFFFFFF


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


@without_autocast
def proxy_update_(
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    applied: Sequence[Tensor],
    counters: Sequence[Tensor],
    writes: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    base: Sequence[Tensor | None],
    scaling: Sequence[float],
    spec: str,
) -> None:
    """For the top rows k of each site whose B changed since its last write, applied[k] ← B[k] and

        W[k] ← q(base[k] + scaling · B[k] · dq(A)), or, where ``base`` is None,
        W[k] ← q(dq(W[k]) + scaling · ΔB[k] · dq(A)).

    A site whose A or base weight changed is made anew from its base weight, on a CPU; elsewhere it
    is marked stale.

    Raises:
        SiteError: a tensor of another shape, dtype or device than the site's; a site that would
            have to be made anew and can't be.
    """
    plan = parse_rows_spec(spec)
    columns: list[Sequence[Any]] = [weight, scale, applied, counters, writes]
    columns += [lora_b, lora_a, base, scaling]
    groups: dict[tuple[object, ...], list[_Site]] = defaultdict(list)
    for i in range(len(weight)):
        site = _Site(i, *(column[i] for column in columns))
        site.check(plan)
        groups[site.kind].append(site)
    for sites in groups.values():
        changed = _find_changed(sites, plan)
        if changed:
            _write_rows(changed, plan.rows(len(changed[0].applied)), plan)


@without_autocast
def flush_(
    weight: Tensor,
    scale: Tensor,
    applied: Tensor,
    counters: Tensor,
    writes: Tensor,
    lora_b: Tensor,
    base: Tensor | None,
    scaling: float,
    plan: RowsSpec,
) -> None:
    """Write every pending row of one site now, whether B changed or not."""
    site = _Site(0, weight, scale, applied, counters, writes, lora_b, lora_b, base, scaling)
    site.changed = torch.ones((), dtype=torch.bool, device=counters.device)
    counters[STEP] += 1
    counters[FINGERPRINT_B] = 0 if plan.pending == "drop" else fingerprint(lora_b[None])[0]
    left, nonfinite = len(applied), counters[NONFINITE].clone()
    most = max(1, _CHUNK // weight.shape[1])
    while left:
        counters[NONFINITE] = nonfinite  # each chunk looks at all rows and counts them
        _write_rows([site], min(left, most), plan)
        left -= min(left, most)


class _Site:
    """The tensors of one site, as the op got them."""

    __slots__ = (
        "applied",
        "base",
        "changed",
        "counters",
        "index",
        "lora_a",
        "lora_b",
        "scale",
        "scaling",
        "weight",
        "writes",
    )

    def __init__(
        self,
        index: int,
        weight: Tensor,
        scale: Tensor,
        applied: Tensor,
        counters: Tensor,
        writes: Tensor,
        lora_b: Tensor,
        lora_a: Tensor,
        base: Tensor | None,
        scaling: float,
    ) -> None:
        self.index = index
        self.weight, self.scale, self.applied = weight.view(torch.uint8), scale, applied
        self.counters, self.writes = counters, writes
        self.lora_b, self.lora_a, self.base, self.scaling = lora_b, lora_a, base, scaling
        self.changed: Tensor | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for sites that can be updated as one batch."""
        tensors = (self.weight, *self.tensors[1:], self.lora_a, self.base)
        each = (None if t is None else (t.shape, t.dtype) for t in tensors)
        return self.weight.device, *each

    @property
    def tensors(self) -> cpu.SiteTensors:
        """What `falqon_fx.kernels.cpu` needs, in its order."""
        state = (self.weight, self.scale, self.applied)
        return *state, self.lora_b, self.counters, self.writes, self.base

    def check(self, plan: RowsSpec) -> None:
        """Compiled code and kernels are about to be given addresses."""
        out, rank = self.lora_b.shape
        width = self.lora_a.shape[1]
        both = (torch.float32,) if plan.pending == "drop" else (torch.float32, torch.bfloat16)
        wanted = {
            "weight": ((out + rank, width), (torch.uint8,)),
            "scale": ((out + rank, 1) if plan.per_row else (), (torch.float32,)),
            "applied": ((out, rank), both),
            "counters": ((COUNTERS,), (torch.int64,)),
            "writes": ((out,), (torch.int32,)),
            "lora_a": ((rank, width), None),
            "base": ((out, width), None),
        }
        for name, (shape, dtypes) in wanted.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tensor.shape != shape or (dtypes is not None and tensor.dtype not in dtypes):
                found = f"{tensor.dtype} {list(tensor.shape)}"
                needed = f"{list(shape)}" if dtypes is None else f"{dtypes[0]} {list(shape)}"
                raise SiteError(
                    self.index,
                    f"its {name} is {found} where {needed} is needed (cast, or assigned from "
                    "another model)",
                    "Load it in its own dtype and shape; load_state_dict without assign=True does",
                )
            if tensor.device != self.lora_b.device:
                raise SiteError(
                    self.index,
                    f"its {name} is on {tensor.device}, its lora_B on {self.lora_b.device}",
                    "Move the whole model to one device",
                )


def _find_changed(sites: list[_Site], plan: RowsSpec) -> list[_Site]:
    """Compare fingerprints with the stored ones, store the new ones, return the sites to write."""
    stored = torch.stack([site.counters for site in sites])  # [G, COUNTERS]
    now_b = _fingerprints([site.lora_b for site in sites])
    now_a = _fingerprints([site.lora_a for site in sites])
    changed = now_b != stored[:, FINGERPRINT_B]
    stale = now_a != stored[:, FINGERPRINT_A]
    if sites[0].base is not None:
        samples = [sample(site.base) for site in sites if site.base is not None]
        stale = stale | (_fingerprints(samples) != stored[:, FINGERPRINT_W])
    if stored.device.type == "cpu":
        if stale.any():
            _rebuild([site for site, flag in zip(sites, stale.tolist(), strict=True) if flag], plan)
        if plan.pending == "drop":  # the graph zeroes B right after this op; zeros hash to zero
            for site in sites:
                site.counters[FINGERPRINT_B] = 0
        flags = (changed & ~stale).tolist()
        sites = [site for site, flag in zip(sites, flags, strict=True) if flag]
        if not sites:
            return []
        now_b, stored = now_b[changed & ~stale], stored[changed & ~stale]
        changed = changed[changed & ~stale]
    else:
        # Seen by the backend at the next call; until then nothing is written.
        stored[:, STALE] |= stale.to(torch.int64)
        changed = changed & ~stale
    stored[:, FINGERPRINT_B] = 0 if plan.pending == "drop" else now_b
    stored[:, STEP] += changed.to(torch.int64)
    for site, row, flag in zip(sites, stored.unbind(), changed.unbind(), strict=True):
        site.counters.copy_(row)
        site.changed = flag
    return sites


def _rebuild(sites: list[_Site], plan: RowsSpec) -> None:
    for site in sites:
        if site.base is None:
            raise SiteError(
                site.index,
                "its lora_A is not the one that prepare() merged before it freed the base weight "
                "(changed or cast since, or another adapter is active)",
                "Call falqon_fx.restore(model), load or activate the adapter, then prepare()",
            )
        if plan.pending == "drop" and dropped.lies_in_w(site.applied, site.lora_b):
            raise SiteError(site.index, dropped.CHANGED, dropped.REMEDY)
        for name, tensor in (("lora_A", site.lora_a), ("lora_B", site.lora_b)):
            if not tensor.isfinite().all():
                raise SiteError(site.index, f"its {name} holds NaN or Inf", "Repair it")
    for site in sites:
        assert site.base is not None
        write_merged_(
            site.weight,
            site.scale,
            site.applied,
            site.counters,
            site.writes,
            site.base,
            site.lora_a,
            site.lora_b,
            site.scaling,
            plan,
        )


def _write_rows(sites: list[_Site], count: int, plan: RowsSpec) -> None:
    """Write ``count`` rows of each of some sites that changed."""
    compiled = cpu.takes([site.tensors for site in sites])
    step = len(sites)
    if audit.audience or not compiled:  # their rows in float32 are to stay in a CPU's cache
        step = max(1, _CHUNK // max(count * sites[0].weight.shape[1], sites[0].lora_b.numel()))
    for first in range(0, len(sites), step):
        batch = sites[first : first + step]
        if compiled:
            tensors, scaling = [site.tensors for site in batch], [site.scaling for site in batch]
            chosen = cpu.write_rows(tensors, scaling, count, plan, watched=bool(audit.audience))
        else:
            chosen = _write_rows_by_aten(batch, count, plan)
        if audit.audience and chosen is not None:
            audit.audience.tell(_written(batch, chosen))


def _written(sites: list[_Site], chosen: cpu.Chosen) -> audit.Written:
    index = chosen.rows[..., None]
    scale = torch.stack([site.scale for site in sites]).reshape(len(sites), -1, 1)
    return audit.Written(
        [site.applied for site in sites],
        torch.stack([site.counters[STEP] for site in sites]),
        chosen.rows,
        chosen.worth,
        chosen.asked,
        chosen.old,
        chosen.value,
        torch.stack([s.weight.index_select(0, rows) for s, rows in zip(sites, chosen.rows)]),
        scale.gather(1, index) if sites[0].scale.dim() == 2 else scale,
        chosen.score,
        chosen.remains,
    )


def _write_rows_by_aten(sites: list[_Site], count: int, plan: RowsSpec) -> cpu.Chosen:
    """Gather → add → new row scale → cast → scatter."""
    out = sites[0].applied.shape[0]
    applied = torch.stack([site.applied for site in sites]).to(torch.float32)  # [G, out, r]
    target = torch.stack([site.lora_b for site in sites]).to(torch.float32)
    if plan.pending == "drop":
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

    new_scale = old_scale
    if per_row:
        amax = value.abs().amax(dim=-1, keepdim=True)
        new_scale = torch.where(worth[..., None], amax_to_scale(amax, E4M3, plan.scale), old_scale)
    code = encode_fp8(_round(value * new_scale.reciprocal(), rows, sites, plan), E4M3)
    code = torch.where(worth[..., None], code, old_code)

    # On CPU, where looking is free, the counters are left alone when there is nothing to count.
    counts = nonfinite.device.type != "cpu" or bool(nonfinite.any())
    written = worth.to(sites[0].writes.dtype)
    scattered = (rows, code, new_scale, new_applied, written, nonfinite)
    for site, row, *new in zip(sites, *(column.unbind() for column in scattered), strict=True):
        site.weight.index_copy_(0, row, new[0])
        if per_row:
            site.scale.index_copy_(0, row, new[1])
        site.applied.index_copy_(0, row, new[2])
        site.writes.index_add_(0, row, new[3])
        if counts:
            site.counters[NONFINITE] += new[4]
    remains = (target.gather(1, index) - held).abs().sum(dim=-1)
    return cpu.Chosen(rows, worth, old, asked, value, score, remains)


def _flag(site: _Site) -> Tensor:
    assert site.changed is not None
    return site.changed


def _round(scaled: Tensor, rows: Tensor, sites: list[_Site], plan: RowsSpec) -> Tensor:
    if plan.rounding == "nearest":
        return round_to_fp8(scaled, E4M3)
    counters = torch.stack([site.counters for site in sites])[:, None]  # [G, 1, COUNTERS]
    random = philox_uint16(
        rows, scaled.shape[-1], counters[..., STEP], counters[..., SITE], plan.seed
    )
    return round_to_fp8_stochastic(scaled, random, E4M3)


def write_merged_(
    weight: Tensor,
    scale: Tensor,
    applied: Tensor,
    counters: Tensor,
    writes: Tensor,
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    plan: RowsSpec,
) -> None:
    """Fill a site's state from scratch: W' = [q(W + scaling · B · Â); q(A)], applied = B."""
    out, code = applied.shape[0], weight.view(torch.uint8)
    applied.copy_(lora_b)
    wide_a, base = lora_a.detach().to(torch.float32), base.detach()
    step = applied.to(torch.float32) * scaling
    merging = bool(step.any())  # with B = 0, W' holds W itself

    def merged(rows: slice, a: Tensor) -> Tensor:
        wide = base[rows].to(torch.float32)
        return wide + step[rows] @ a if merging else wide

    chunks = list(row_chunks(base))
    if plan.per_row:
        a_amax = wide_a.abs().amax(1, keepdim=True)
    else:
        a_amax = torch.stack([merged(rows, wide_a).abs().amax() for rows in chunks]).amax()
        a_amax = torch.maximum(a_amax, wide_a.abs().amax())
    a_scale = w_scale = amax_to_scale(a_amax, E4M3, plan.scale)
    a_value = round_to_fp8(wide_a * a_scale.reciprocal(), E4M3)
    for rows in chunks:
        value = merged(rows, a_value * a_scale)  # W gets the A that is really used
        if plan.per_row:
            w_scale = amax_to_scale(value.abs().amax(1, keepdim=True), E4M3, plan.scale)
            scale[rows] = w_scale
        code[rows] = encode_fp8(round_to_fp8(value * w_scale.reciprocal(), E4M3), E4M3)
    code[out:] = encode_fp8(a_value, E4M3)
    if plan.per_row:
        scale[out:] = a_scale
    else:
        scale.copy_(a_scale)
    writes.zero_()
    counters[FINGERPRINT_B] = fingerprint(lora_b[None])[0]
    counters[FINGERPRINT_A] = fingerprint(lora_a[None])[0]
    counters[FINGERPRINT_W] = fingerprint(sample(base)[None])[0]
    counters[STALE] = 0
