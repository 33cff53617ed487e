"""What a report says of a planned site: where it stands, what goes in, what it keeps in memory."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from falqon_fx import report as falqon_fx_report
from falqon_fx._compat import frames_of, hint
from falqon_fx.merged import allocate
from falqon_fx.passes.dataflow import Match
from falqon_fx.passes.kernels import choose
from falqon_fx.passes.normalize import value_of
from falqon_fx.passes.terms import BaseLinear
from falqon_fx.report import Memory, Site, Source
from falqon_fx.spec import SiteSpec

if TYPE_CHECKING:
    from falqon_fx.passes.plan import Slot


def describe(found: Match, slot: Slot, spec: SiteSpec, architecture: int) -> Site:
    """The report of one site; its group is numbered once all sites are known."""
    x, result = value_of(found.x), value_of(found.anchor)
    tokens = math.prod(x.shape[:-1])
    site = Site(
        path=slot.path,
        out_features=slot.out,
        in_features=slot.features,
        rank=slot.rank,
        scaling=found.scaling,
        dropout=found.dropout,
        out_dtype=_name(result.dtype),
        spec=str(spec),
        source=source_of(found.anchor),
        x_shape=tuple(str(size) for size in x.shape),
        tokens=str(tokens),
        tokens_hint=hint(tokens),
        x_dtype=_name(x.dtype),
        base_dtype=_name(_base_dtype(found, x)),
        adapter_dtype=_name(found.lora_b.value.dtype),
        prepared=isinstance(found.base, BaseLinear),
        train_a=found.lora_a.value.requires_grad,
        rows=spec.rows(hint(slot.out)),
        architecture=architecture,
        memory=_memory(found, slot, spec, _base_dtype(found, x)),
        nodes=tuple(sorted(node.name for node in found.nodes)),
    )
    kernel, reason = choose(site, x.device)
    return replace(site, kernel=kernel, kernel_reason=reason)


_LIBRARY = re.compile(r"-packages/(torch|peft)/")
_OWN = (Path(__file__).parent, Path(falqon_fx_report.__file__).parent)


def source_of(node: fx.Node) -> Source | None:
    """The line of the user's code that made a node: its innermost frame outside torch and PEFT."""
    return innermost(frames_of(node))


def innermost(frames: list[tuple[str, int, str, str]]) -> Source | None:
    """The innermost frame outside torch, PEFT and this library."""
    outside = [frame for frame in frames if not _is_library(frame[0])]
    return Source(*outside[-1]) if outside else None


def _is_library(file: str) -> bool:
    return _LIBRARY.search(file) is not None or Path(file).parent in _OWN


def _base_dtype(found: Match, x: Tensor) -> torch.dtype:
    if not isinstance(found.base, BaseLinear):
        return found.base.weight.value.dtype
    applied = value_of(found.scope.outer(found.base.state[2]))
    dtype: torch.dtype = applied.dtype  # float32 exactly beside a float32 base
    return dtype


def _memory(found: Match, slot: Slot, spec: SiteSpec, base_dtype: torch.dtype) -> Memory:
    out, features, rank = hint(slot.out), hint(slot.features), hint(slot.rank)
    meta = torch.device("meta")
    state = allocate(out, features, rank, base_dtype, slot.scaling, spec, meta)
    return Memory(
        base=out * features * base_dtype.itemsize,
        state=sum(tensor.nbytes for tensor in state.tensors),
        adapter=_nbytes(found.lora_a.value) + _nbytes(found.lora_b.value),
    )


def _nbytes(value: Any) -> int:
    return hint(value.numel()) * int(value.element_size())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
