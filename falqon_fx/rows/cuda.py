"""`falqon_fx.rows.update.proxy_update_` on a GPU: by generated kernels, or by ATen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from falqon_fx.rows import update
from falqon_fx.rows.audit import observers
from falqon_fx.site.spec import parse_rows_spec

if TYPE_CHECKING:
    from falqon_fx.kernels.update.launch import Launch


def proxy_update_(columns: Sequence[Sequence[Any]], spec_text: str) -> None:
    """See `falqon_fx.rows.update.proxy_update_`: four launches for all sites whose tensors have the
    same dtypes, whatever their shapes. Sites that the kernels don't take are updated by ATen.
    """
    spec = parse_rows_spec(spec_text)
    # The kernels say nothing of what they write: whoever watches gets ATen's update; and on AMD's
    # GPUs none has been tried.
    if observers or spec.kernel == "dequantize" or torch.version.hip is not None:
        update.proxy_update_(columns, spec_text)
    else:
        launches = _launches_of(columns, spec_text)
        for launch in launches.kernels:
            launch.run()
        if launches.rest:
            rest = [[column[i] for i in launches.rest] for column in columns]
            update.proxy_update_(rest, spec_text)
    if spec.transpose == "store":
        from falqon_fx.kernels.transpose import kept as stored

        weight, _, _, counters, writes, *_ = columns
        stored.refresh(weight, writes, counters)


@dataclass(frozen=True)
class _Launches:
    """How the sites of a call are updated: by kernels, and by ATen those at the places ``rest``."""

    kernels: tuple[Launch, ...]
    rest: tuple[int, ...]


_known: dict[tuple[Any, ...], _Launches] = {}


def _launches_of(columns: Sequence[Sequence[Any]], spec_text: str) -> _Launches:
    """The launches for sites whose tensors lie where they do; remembered, since a step of a large
    model asks for hundreds of sites what has not changed.
    """
    weight, scale, applied, counters, writes, lora_b, lora_a, base, scaling = columns
    key: tuple[Any, ...] = (spec_text, *scaling)
    for column in (weight, scale, applied, counters, writes, lora_b, lora_a):
        key += tuple([t.data_ptr() for t in column])
    key += tuple([(w.shape, a.dtype) for w, a in zip(weight, applied)])
    key += tuple([(b.dtype, b.stride()) for b in lora_b])
    key += tuple([(a.dtype, a.stride()) for a in lora_a])
    key += tuple([None if w is None else (w.data_ptr(), w.dtype, w.stride()) for w in base])
    if key not in _known:
        if len(_known) >= 64:
            _known.clear()
        _known[key] = _plan_launches(columns, spec_text)
    return _known[key]


def _plan_launches(columns: Sequence[Sequence[Any]], spec_text: str) -> _Launches:
    # Triton is there where a GPU is, and need not be elsewhere.
    from falqon_fx.kernels.hardware import architecture, family
    from falqon_fx.kernels.update.examples import KERNEL
    from falqon_fx.kernels.update.launch import UpdateSite, dtypes, launch, refusal, spec_for

    spec = parse_rows_spec(spec_text)
    groups: dict[object, list[UpdateSite]] = defaultdict(list)
    rest: list[int] = []
    places: dict[object, list[int]] = defaultdict(list)
    for i in range(len(columns[0])):
        fields: list[Any] = [*(column[i] for column in columns), spec.rows(len(columns[2][i]))]
        site = UpdateSite(*fields)
        if refusal(site):
            rest.append(i)
        else:
            groups[dtypes(site)].append(site)
            places[dtypes(site)].append(i)
    drop, made = spec.pending == "drop", []
    where = family(architecture(columns[0][0].device))
    for key, sites in groups.items():
        of_all = spec_for(sites, spec.scale, spec.rounding, drop)
        if KERNEL.takes(of_all, "aligned", where):
            made.append(launch(sites, spec.seed, of_all))
        else:
            rest += places[key]
    return _Launches(tuple(made), tuple(sorted(rest)))
