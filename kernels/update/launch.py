"""Host side of the proxy update: a table of all sites, then four launches."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from falqon_fx.config import Rounding, Scale
from falqon_fx.kernels.hardware import cast_mode, fp8_architecture
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import InputDtype, columns_of
from falqon_fx.kernels.update.spec import AppliedDtype, BaseDtype, UpdateSpec

_FOUND = 5  # columns of `found`, see the template
# Programs that share a site's fingerprint or its scores, and those that share its rows at most; on
# a GPU and under the interpreter, which runs one after the other.
_PARTS, _WRITERS = {"cuda": 8, "cpu": 2}, {"cuda": 64, "cpu": 2}
SMALL_WARPS = 4  # of all kernels but `write`
_POINTERS = ("weight", "scale", "applied", "counters", "writes", "lora_b", "lora_a", "base")


@dataclass(frozen=True)
class UpdateSite:
    """The tensors of one site (see `falqon_fx.rows.update`); ``count`` is how many rows it may
    write.

    ``weight`` [out + r, in] E4M3 or its bytes; ``base`` may have any strides, the others have none.
    """

    weight: Tensor
    scale: Tensor
    applied: Tensor
    counters: Tensor
    writes: Tensor
    lora_b: Tensor
    lora_a: Tensor
    base: Tensor | None
    scaling: float
    count: int


def update_(sites: Sequence[UpdateSite], seed: int, spec: UpdateSpec) -> None:
    """W[k] ← q(base[k] + scaling · B[k] · dq(A)), or q(dq(W[k]) + scaling · ΔB[k] · dq(A)) without
    a base weight, and applied[k] ← B[k], for the ``count`` rows k of each site whose Σ|ΔB[k]| is
    largest, ties to the lowest row; nothing where B has not changed.

    Four launches whatever the number of sites, and no value read back. Rows whose Σ|ΔB| is NaN or
    Inf are counted in ``counters`` and never written. Where A or the base weight changed, the site
    is marked stale and left as it is. All as on CPU, `falqon_fx.rows.update.proxy_update_`; Philox
    included.

    Raises ValueError where the sites are not what the spec is for.
    """
    if sites:
        launch(sites, seed, spec).run()


@dataclass(frozen=True)
class Launch:
    """An update of the same sites again and again: `update_` without what it checks and computes
    of their sizes and addresses. It holds none of their tensors.
    """

    spec: UpdateSpec
    table: Tensor
    rows: int  # that may be written, of all sites
    scores: int  # one for each row of all sites
    writers: int

    def run(self) -> None:
        """Four kernels."""
        table, g, device = self.table, len(self.table), self.table.device
        found = torch.zeros((g, _FOUND), dtype=torch.int64, device=device)
        score = torch.empty(self.scores, dtype=torch.int32, device=device)
        rows = torch.empty(self.rows, dtype=torch.int32, device=device)
        kernels, parts = load(self.spec, runs_interpreted(table)), _PARTS[device.type]
        with torch.cuda.device_of(table):
            kernels.fingerprint[(g, parts)](table, found, num_warps=SMALL_WARPS)
            kernels.score[(g, parts)](table, found, score, num_warps=SMALL_WARPS)
            kernels.select[(g,)](table, found, score, rows, num_warps=SMALL_WARPS)
            kernels.write[(g, self.writers)](table, found, rows, num_warps=self.spec.num_warps)


def launch(sites: Sequence[UpdateSite], seed: int, spec: UpdateSpec) -> Launch:
    """What updates ``sites`` as long as their tensors stay where they are.

    Raises ValueError where the sites are not what the spec is for.
    """
    for site in sites:
        _check(site, spec)
    device = sites[0].weight.device
    most = max(site.count for site in sites)
    return Launch(
        spec,
        _table([_row(site) for site in sites], seed, device),
        sum(site.count for site in sites),
        sum(len(site.applied) for site in sites),
        min(_WRITERS[device.type], -(-most // spec.rows)),
    )


def signatures(spec: UpdateSpec) -> dict[str, dict[str, str]]:
    """Argument types of each kernel, for `aot.compile_ahead`."""
    table = {"table_ptr": "*i64:16", "found_ptr": "*i64:16"}
    score, rows = {"score_ptr": "*i32:16"}, {"rows_ptr": "*i32:16"}
    return {
        "fingerprint": table,
        "score": table | score,
        "select": table | score | rows,
        "write": table | rows,
    }


def _row(site: UpdateSite) -> tuple[int, ...]:
    """A site's line of the table, but for the offsets and the seed."""
    tensors = [getattr(site, name) for name in _POINTERS]
    out, rank = site.applied.shape
    of_base: tuple[int, ...] = (0,) * 6
    if site.base is not None:
        sizes, strides = site.base.shape, site.base.stride()
        apart = (max(1, sizes[0] // 16), max(1, sizes[1] // 64))  # as falqon_fx.site.looks.sample
        taken = (min(16, -(-sizes[0] // apart[0])), min(64, -(-sizes[1] // apart[1])))
        of_base = (*strides, apart[0] * strides[0], apart[1] * strides[1], *taken)
    scaling = struct.unpack("<i", struct.pack("<f", site.scaling))[0]
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    return (*addresses, out, rank, site.weight.shape[1], *of_base, scaling, site.count)


def _table(sites: Sequence[tuple[int, ...]], seed: int, device: torch.device) -> Tensor:
    """The table on the device."""
    lines: list[Iterable[int]] = []
    score_offset = rows_offset = 0
    for *line, count in sites:
        offsets = (score_offset, rows_offset, count, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
        lines.append((*line, *offsets))
        score_offset += line[len(_POINTERS)]
        rows_offset += count
    return torch.tensor(lines, dtype=torch.int64).to(device)


def dtypes(site: UpdateSite) -> tuple[str, str, str, str]:
    """What sites of one launch have in common: dtypes of B, A, `applied` and the base weight."""
    tensors = (site.lora_b, site.lora_a, site.applied, site.base)
    b, a, applied, base = ("none" if t is None else str(t.dtype)[6:] for t in tensors)
    return b, a, applied, base


def refusal(site: UpdateSite) -> str:
    """Why the kernels don't take a site, or ""."""
    out, rank = site.applied.shape
    if not {*dtypes(site)} <= {"float32", "bfloat16", "float16", "none"}:
        return f"a dtype among {', '.join(dtypes(site))}"
    known = (site.scale.dtype, site.counters.dtype, site.writes.dtype)
    if known != (torch.float32, torch.int64, torch.int32):
        return f"scale, counters and writes of {', '.join(map(str, known))}"
    for name in _POINTERS[:-1]:
        tensor: Tensor = getattr(site, name)
        if not tensor.is_contiguous():
            return f"{name} has strides {tensor.stride()}"
        if name in ("lora_b", "lora_a") and tensor.data_ptr() % 8:
            return f"{name} does not start at a multiple of 8 bytes"
    if rank > 1024:
        return f"rank {rank}, more than 1024"
    return ""


def spec_for(
    sites: Sequence[UpdateSite], scale: Scale, rounding: Rounding, drop: bool
) -> UpdateSpec:
    """The spec for sites that have `dtypes` in common.

    A program holds one row, or pieces of four where many are written or rows are wide.
    """
    first = sites[0].weight
    b, a, applied, base = dtypes(sites[0])
    widest = max(site.weight.shape[1] for site in sites)
    many = max(site.count for site in sites) > 64
    pieces = many or widest > 4096
    width = min(max(8, 1 << (widest - 1).bit_length()), 1024 if pieces else 4096)
    rank = max(site.applied.shape[1] for site in sites)
    return UpdateSpec(
        b_dtype=cast(InputDtype, b),
        a_dtype=cast(InputDtype, a),
        applied_dtype=cast(AppliedDtype, applied),
        base_dtype=cast(BaseDtype, base),
        granularity="row" if sites[0].scale.dim() == 2 else "tensor",
        scale=scale,
        rounding=rounding,
        drop=drop,
        cast=cast_mode(0 if runs_interpreted(first) else fp8_architecture(first.device)),
        rank=columns_of(rank),
        aligned=all(s.weight.shape[1] % 16 == 0 and s.weight.data_ptr() % 16 == 0 for s in sites),
        base_aligned=all(_has_aligned_rows(site.base) for site in sites),
        rows=4 if pieces else 1,
        width=width,
        loop=widest > width,
        num_warps=8 if width > 2048 else 4,
    )


def _has_aligned_rows(base: Tensor | None) -> bool:
    """Whether the columns stand side by side, and each row begins at a multiple of 16 bytes."""
    if base is None or base.stride(1) != 1:
        return False
    return base.data_ptr() % 16 == 0 and base.stride(0) % 16 == 0


def _check(site: UpdateSite, spec: UpdateSpec) -> None:
    out, rank = site.applied.shape
    width = site.weight.shape[1]
    wanted = (spec.b_dtype, spec.a_dtype, spec.applied_dtype, spec.base_dtype)
    if dtypes(site) != wanted:
        raise ValueError(f"update: dtypes {', '.join(dtypes(site))}; {spec} takes others")
    if why := refusal(site):
        raise ValueError(f"update: {why}")
    if site.scale.dim() != (2 if spec.granularity == "row" else 0):
        raise ValueError(f"update: scale {tuple(site.scale.shape)} does not fit {spec}")
    if rank > spec.rank:
        raise ValueError(f"update: rank {rank} does not fit {spec}")
    if width > spec.width and not spec.loop:
        raise ValueError(f"update: rows of {width} do not fit {spec}; loop=True takes them")
    if spec.aligned and (width % 16 or site.weight.data_ptr() % 16):
        raise ValueError(f"update: rows of {width} are not multiples of 16 bytes")
    if spec.base_aligned and not _has_aligned_rows(site.base):
        raise ValueError("update: the base weight has no rows at multiples of 16 bytes")
    if not 1 <= site.count <= out:
        raise ValueError(f"update: {site.count} rows of {out}")
    if spec.cast == "hardware" and runs_interpreted(site.weight):
        raise ValueError("update: the interpreter needs cast='integer'")
