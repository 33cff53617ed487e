"""The row-wise proxy update (FALQON, arXiv 2510.24061): B's steps are written into the FP8 weight.

With the base weight at hand a row is cast from it, W[k] ← q(base[k] + s · B[k] · Â): one cast
however often it is written. Where `prepare` freed it, as in the public code, all that is known of a
row are its last FP8 bytes, W[k] ← q(dq(W[k]) + s · ΔB[k] · Â): every write adds a cast's error.
That error is in proportion to the row as written, so a B that is large for one step would leave W
destroyed when it is back: such a row is not written (`LIMIT`, `CLAMPED`). With the base
weight at hand it is, since the next write starts from that again.

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

from falqon_fx.errors import SiteError
from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.rows import audit, dropped
from falqon_fx.rows.batch import Batched
from falqon_fx.rows.by_aten import write_by_aten
from falqon_fx.rows.fingerprint import fingerprint, fingerprints
from falqon_fx.site.base import row_chunks
from falqon_fx.site.looks import sample
from falqon_fx.site.numerics import (
    E4M3,
    amax_to_scale,
    encode_fp8,
    round_to_fp8,
    without_autocast,
)
from falqon_fx.site.record import (
    FINGERPRINT_A,
    FINGERPRINT_B,
    FINGERPRINT_W,
    STALE,
    STEP,
    TOO_LARGE,
)
from falqon_fx.site.spec import RowsSpec, parse_rows_spec

lock = threading.RLock()  # one thread at a time looks up states and writes them
NOT_FINITE = (
    "its base weight and scaling · B · A add up to NaN or Inf",
    "Repair lora_A, lora_B or the scaling",
)
# The largest magnitude of a row that is written without its base weight, by the row's scale before
# the write: the cast's error, 1/17 of it at most, stays behind in W. (Rows whose scale grew up to
# four times and back were found to be off by up to 15%; those clamped to half their size by 100%.)
LIMIT = 4 * 448.0  # a scale of its own grows at most four times
# A scale for all rows stays: up to here values round to 448, beyond they are clamped. With "drop"
# they are, as in the public code, since the step of a row that is not written is lost.
CLAMPED = 464.0
_CHUNK = 1 << 17  # elements held in float32 at a time: temporaries stay in the cache


@without_autocast
def proxy_update_(columns: Sequence[Sequence[Any]], spec_text: str) -> None:
    """Write the top rows k of each site whose B changed since its last write: applied[k] ← B[k],

        W[k] ← q(base[k] + scaling · B[k] · dq(A)), or, where ``base`` is None,
        W[k] ← q(dq(W[k]) + scaling · ΔB[k] · dq(A)).

    ``columns`` are the fields of `Batched`, of all sites each.

    A row that would become NaN, Inf or, without ``base``, too large for the scale that it has, is
    counted instead, and stays pending. A site whose A or base weight changed is made anew from its
    base weight, on a CPU; elsewhere it is marked stale.

    Raises:
        SiteError: a tensor of another shape, dtype or device than the site's; a site that would
            have to be made anew and can't be.
    """
    spec = parse_rows_spec(spec_text)
    groups: dict[tuple[object, ...], list[Batched]] = defaultdict(list)
    for i, fields in enumerate(zip(*columns, strict=True)):
        site = Batched(i, *fields)
        site.check(spec)
        groups[site.kind].append(site)
    for sites in groups.values():
        changed = _find_changed(sites, spec)
        if changed:
            count = spec.rows(len(changed[0].applied))
            _write_rows(changed, count, spec, limit_of(spec, changed[0].base))


@without_autocast
def flush_(site: Batched, spec: RowsSpec) -> None:
    """Write every pending row of one site now, whether B changed or not, and however large."""
    counters, rows = site.counters, len(site.applied)
    site.changed = torch.ones((), dtype=torch.bool, device=counters.device)
    counters[STEP] += 1
    counters[FINGERPRINT_B] = 0 if spec.pending == "drop" else fingerprint(site.lora_b[None])[0]
    left, before = rows, counters.clone()
    most, refused = max(1, _CHUNK // site.weight.shape[1]), 0
    while left > 0:
        counters.copy_(before)  # each chunk looks at all rows and counts them
        # What was refused is still pending, and is chosen again beside as many others.
        _write_rows([site], min(rows, most + refused), spec, None)
        refused = int(counters[TOO_LARGE] - before[TOO_LARGE])
        left -= most


def _find_changed(sites: list[Batched], spec: RowsSpec) -> list[Batched]:
    """Compare fingerprints with the stored ones, store the new ones, return the sites to write."""
    stored = torch.stack([site.counters for site in sites])  # [G, COUNTERS]
    now_b = fingerprints([site.lora_b for site in sites])
    now_a = fingerprints([site.lora_a for site in sites])
    changed = now_b != stored[:, FINGERPRINT_B]
    stale = now_a != stored[:, FINGERPRINT_A]
    if sites[0].base is not None:
        samples = [sample(site.base) for site in sites if site.base is not None]
        stale = stale | (fingerprints(samples) != stored[:, FINGERPRINT_W])
    if stored.device.type == "cpu":
        if stale.any():
            _rebuild([site for site, flag in zip(sites, stale.tolist(), strict=True) if flag], spec)
        if spec.pending == "drop":  # the graph zeroes B right after this op; zeros hash to zero
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
    stored[:, FINGERPRINT_B] = 0 if spec.pending == "drop" else now_b
    stored[:, STEP] += changed.to(torch.int64)
    for site, row, flag in zip(sites, stored.unbind(), changed.unbind(), strict=True):
        site.counters.copy_(row)
        site.changed = flag
    return sites


def limit_of(spec: RowsSpec, base: Tensor | None) -> float | None:
    """The largest magnitude of a row that a step of the optimizer may write, by the row's scale.
    None where the base weight is at hand: the next write starts from it, whatever this one loses.
    """
    if base is not None:
        return None
    return LIMIT if spec.per_row or spec.pending == "drop" else CLAMPED


def _rebuild(sites: list[Batched], spec: RowsSpec) -> None:
    for site in sites:
        if site.base is None:
            raise SiteError(
                site.index,
                "its lora_A is not the one that prepare() merged before it freed the base weight "
                "(changed or cast since, or another adapter is active)",
                "Call falqon_fx.restore(model), load or activate the adapter, then prepare()",
            )
        if spec.pending == "drop" and dropped.lies_in_w(site.applied, site.lora_b):
            raise SiteError(site.index, dropped.CHANGED, dropped.REMEDY)
        for name, tensor in (("lora_A", site.lora_a), ("lora_B", site.lora_b)):
            if not tensor.isfinite().all():
                raise SiteError(site.index, f"its {name} holds NaN or Inf", "Repair it")
    for site in sites:
        if not write_merged_(site, spec):
            raise SiteError(site.index, *NOT_FINITE)


def _write_rows(sites: list[Batched], count: int, spec: RowsSpec, limit: float | None) -> None:
    """Write ``count`` rows of each of some sites that changed, of them those within ``limit``."""
    compiled = cpu.takes([site.tensors for site in sites])
    step = len(sites)
    if audit.observers or not compiled:  # their rows in float32 are to stay in a CPU's cache
        step = max(1, _CHUNK // max(count * sites[0].weight.shape[1], sites[0].lora_b.numel()))
    for first in range(0, len(sites), step):
        batch = sites[first : first + step]
        if compiled:
            tensors, scaling = [site.tensors for site in batch], [site.scaling for site in batch]
            chosen = cpu.write_rows(
                tensors,
                scaling,
                count,
                seed=spec.seed,
                pow2=spec.scale == "pow2",
                stochastic=spec.rounding == "stochastic",
                drop=spec.pending == "drop",
                limit=limit,
                watched=bool(audit.observers),
            )
        else:
            chosen = write_by_aten(batch, count, spec, limit)
        if audit.observers and chosen is not None:
            audit.observers.notify(_written(batch, chosen))


def _written(sites: list[Batched], chosen: cpu.ChosenRows) -> audit.WriteBackBatch:
    index = chosen.rows[..., None]
    scale = torch.stack([site.scale for site in sites]).reshape(len(sites), -1, 1)
    return audit.WriteBackBatch(
        **vars(chosen),
        applied=[site.applied for site in sites],
        step=torch.stack([site.counters[STEP] for site in sites]),
        code=torch.stack([s.weight.index_select(0, rows) for s, rows in zip(sites, chosen.rows)]),
        scale=scale.gather(1, index) if sites[0].scale.dim() == 2 else scale,
    )


def write_merged_(site: Batched, spec: RowsSpec) -> bool:
    """Fill a site's state from scratch: W' = [q(W + scaling · B · Â); q(A)], applied = B. False
    where W' holds NaN or Inf; then it is still to be made anew.
    """
    assert site.base is not None
    applied, code, scale, counters = site.applied, site.weight, site.scale, site.counters
    out, base, wide_a = len(applied), site.base.detach(), site.lora_a.detach().to(torch.float32)
    applied.copy_(site.lora_b)
    step = applied.to(torch.float32) * site.scaling
    merging = bool(step.any())  # with B = 0, W' holds W itself

    def merged(rows: slice, a: Tensor) -> Tensor:
        wide = base[rows].to(torch.float32)
        return wide + step[rows] @ a if merging else wide

    chunks = list(row_chunks(base))
    if spec.per_row:
        a_amax = wide_a.abs().amax(1, keepdim=True)
    else:
        a_amax = torch.stack([merged(rows, wide_a).abs().amax() for rows in chunks]).amax()
        a_amax = torch.maximum(a_amax, wide_a.abs().amax())
    a_scale = w_scale = amax_to_scale(a_amax, E4M3, spec.scale)
    a_value = round_to_fp8(wide_a * a_scale.reciprocal(), E4M3)
    for rows in chunks:
        value = merged(rows, a_value * a_scale)  # W gets the A that is really used
        if spec.per_row:
            w_scale = amax_to_scale(value.abs().amax(1, keepdim=True), E4M3, spec.scale)
            scale[rows] = w_scale
        code[rows] = encode_fp8(round_to_fp8(value * w_scale.reciprocal(), E4M3), E4M3)
    code[out:] = encode_fp8(a_value, E4M3)
    if spec.per_row:
        scale[out:] = a_scale
    else:
        scale.copy_(a_scale)
    site.writes.zero_()
    if not scale.isfinite().all():
        return False
    counters[FINGERPRINT_B] = fingerprint(site.lora_b[None])[0]
    counters[FINGERPRINT_A] = fingerprint(site.lora_a[None])[0]
    counters[FINGERPRINT_W] = fingerprint(sample(base)[None])[0]
    counters[STALE] = 0
    return True
