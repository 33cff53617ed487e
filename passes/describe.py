"""What a report says of a planned site: where it stands, what goes in, what it keeps in memory."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from falqon_fx import _compat
from falqon_fx._compat import hint, value_of
from falqon_fx.passes.match.dataflow import Match
from falqon_fx.passes.rows import RowsSlot
from falqon_fx.passes.slots import BaseSlot
from falqon_fx.passes.terms import Experts, Prepared
from falqon_fx.report.data import Memory, Site, Source
from falqon_fx.report.kernels import choose, choose_for_experts
from falqon_fx.site.forms import code_of, scale_shape
from falqon_fx.site.numerics import dtype_name
from falqon_fx.site.spec import SiteSpec


def describe(
    found: Match, slot: BaseSlot | RowsSlot, path: str, spec: SiteSpec, architecture: int
) -> Site:
    """The report of one site; its group is numbered once all sites are known."""
    x, result = value_of(found.x), value_of(found.anchor)
    tokens = math.prod(x.shape[:-1])
    adapters = found.adapters
    experts = found.base.experts if isinstance(found.base, Experts) else 0
    prepared = isinstance(found.base, Prepared)
    dtype = result.dtype if isinstance(found.base, Prepared) else found.base.weight.value.dtype
    if isinstance(found.base, Experts):
        prepared = found.base.prepared is not None
    site = Site(
        path=path,
        out_features=slot.out // max(experts, 1),
        in_features=slot.features,
        rank=sum(a.lora_b.value.shape[1] for a in adapters) // max(experts, 1),
        scaling=adapters[0].scaling if adapters else 0.0,
        dropout=max((a.dropout for a in adapters), default=0.0),
        out_dtype=dtype_name(result.dtype),
        spec=str(spec),
        source=source_of(found.anchor),
        x_shape=tuple(str(size) for size in x.shape),
        tokens=str(tokens),
        tokens_hint=hint(tokens),
        x_dtype=dtype_name(x.dtype),
        base_dtype=dtype_name(dtype),
        adapter_dtype=dtype_name(adapters[0].lora_b.value.dtype) if adapters else "",
        adapters=len(adapters),
        experts=experts,
        gathered=_gathered(found),
        compensate=_width(found, "error_b"),
        outliers=_width(found, "columns"),
        prepared=prepared,
        train_a=any(a.lora_a.value.requires_grad for a in adapters),
        train_b=any(a.lora_b.value.requires_grad for a in adapters),
        device=x.device.type,
        architecture=architecture,
        memory=_memory(found, slot, spec, dtype),
        nodes=tuple(sorted(node.name for node in found.nodes)),
    )
    kernel, reason = choose_for_experts(site) if experts else choose(site)
    return replace(site, kernel=kernel, kernel_reason=reason)


def _gathered(found: Match) -> int:
    """How many rows of x are read by an index, in this call."""
    rows = found.base.rows if isinstance(found.base, Experts) else None
    return 0 if rows is None else hint(value_of(rows).numel())


def _width(found: Match, name: str) -> int:
    """The columns of a term of a calibration, [out, columns]; 0 without it."""
    node = getattr(found.base, name, None)
    return 0 if node is None else int(value_of(found.scope.outer(node)).shape[1])


_LIBRARY = re.compile(r"-packages/(torch|peft)/")
_OWN = {Path(__file__).parent, Path(_compat.__file__).parent}


def source_of(node: fx.Node) -> Source | None:
    """The line of the user's code that made a node: its innermost frame outside torch and PEFT."""
    return innermost(frames_of(node))


def innermost(frames: list[tuple[str, int, str, str]]) -> Source | None:
    """The innermost frame outside torch, PEFT and this library."""
    outside = [frame for frame in frames if not _is_library(frame[0])]
    return Source(*outside[-1]) if outside else None


def _is_library(file: str) -> bool:
    return _LIBRARY.search(file) is not None or not _OWN.isdisjoint(Path(file).parents)


def _memory(
    found: Match, slot: BaseSlot | RowsSlot, spec: SiteSpec, base_dtype: torch.dtype
) -> Memory:
    out, features = hint(slot.out), hint(slot.features)
    shape, _ = code_of(out, features, spec)
    state = math.prod(shape) + 4 * math.prod(scale_shape(out, spec))
    if isinstance(slot, RowsSlot):  # A, B's applied part, counts of writes
        state += hint(slot.rank) * (features + 4 * spec.per_row + 2 * out) + 4 * out
    ranks, channels = _width(found, "error_b"), _width(found, "columns")
    state += 2 * ranks * (out + features) + channels * (2 * out + 4)  # bfloat16, int32
    adapters = [t for a in found.adapters for t in (a.lora_a.value, a.lora_b.value)]
    return Memory(
        base=out * features * base_dtype.itemsize, state=state, adapter=sum(map(_nbytes, adapters))
    )


def _nbytes(value: Any) -> int:
    return hint(value.numel()) * int(value.element_size())


def frames_of(node: fx.Node) -> list[tuple[str, int, str, str]]:
    """The (file, line, function, code) of a node's stack trace, outermost first."""
    text = node.meta.get("stack_trace") or node.stack_trace or ""
    found = re.findall(r'File "([^"]+)", line (\d+), in (.*)\n\s*(.*)', text)
    return [(file, int(line), function, code.strip()) for file, line, function, code in found]
