"""Decide what becomes of each match: which base, which adapters, which spec, or why not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import fx

from falqon_fx._compat import hint, is_ddp_piece, is_dtensor, module_path, source_path, value_of
from falqon_fx.config import FalqonConfig
from falqon_fx.cost.model import losing
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.passes.adapter_dtype import spec_of_graph, why_not_by_default
from falqon_fx.passes.checks import check, params_of, weights_of, why_not_experts
from falqon_fx.passes.describe import describe, source_of
from falqon_fx.passes.match.dataflow import LEAVE, AdapterMatch, Match, RejectedMatch
from falqon_fx.passes.match.experts import match_frozen_experts
from falqon_fx.passes.match.frozen import (
    embeddings,
    match_frozen,
    site_of,
    slow_attention,
    why_left,
    wide_product,
)
from falqon_fx.passes.modes import transformed
from falqon_fx.passes.rows import RowsSlot, check_rows, rows_slot
from falqon_fx.passes.scope import Scope
from falqon_fx.passes.shards import CUT_OTHERWISE
from falqon_fx.passes.siblings import group_siblings
from falqon_fx.passes.slots import AdapterSlot, BaseSlot, Joined, Turned
from falqon_fx.passes.terms import BaseLinear, Experts, Param, in_fp8
from falqon_fx.passes.writes import written_parameters
from falqon_fx.report.data import Rejected, Site, Source
from falqon_fx.report.kernels import architecture_of
from falqon_fx.site import nvfp4
from falqon_fx.site.nvfp4 import shape_of
from falqon_fx.site.paths import common_path, stack_path
from falqon_fx.site.spec import SiteSpec

T = TypeVar("T")


@dataclass(frozen=True)
class SitePlan:
    """A match that will be rewritten. With update="rows" its base is a `RowsSlot`, which has its
    adapter in it. ``spec`` is that of the plan but for adapters that don't fit into FP8.
    """

    match: Match
    base: BaseSlot | RowsSlot
    adapters: tuple[AdapterSlot, ...]
    report: Site
    spec: SiteSpec


@dataclass(frozen=True)
class Plan:
    """What to do with a graph."""

    root: Scope
    config: FalqonConfig
    spec: SiteSpec
    groups: tuple[tuple[SitePlan, ...], ...]  # each becomes one op: siblings share their x
    rejected: tuple[Rejected, ...]
    left: tuple[Rejected, ...]  # frozen linear layers that stay as they are
    wide: tuple[fx.Node, ...]  # those of them, and attention, that are multiplied in float32
    turned: Turned = field(default_factory=Turned)
    joined: Joined = field(default_factory=Joined)

    @property
    def sites(self) -> tuple[SitePlan, ...]:
        """All sites, group by group."""
        return tuple(site for group in self.groups for site in group)

    @property
    def bases(self) -> tuple[BaseSlot, ...]:
        return _each(s.base for s in self.sites if isinstance(s.base, BaseSlot))

    @property
    def adapters(self) -> tuple[AdapterSlot, ...]:
        return _each(adapter for site in self.sites for adapter in site.adapters)

    @property
    def rows(self) -> tuple[RowsSlot, ...]:
        return _each(s.base for s in self.sites if isinstance(s.base, RowsSlot))


def _each(slots: Iterable[T]) -> tuple[T, ...]:
    """Each object once, in order."""
    return tuple({id(slot): slot for slot in slots}.values())


def plan(
    root: Scope,
    matches: list[Match],
    rejected: list[RejectedMatch],
    config: FalqonConfig,
    names: Mapping[str, str] | None = None,
    clamped: Callable[[Scope, Param], int] = lambda scope, lora_b: 0,
) -> Plan:
    """Choose sites, and give equal W, and equal (A, B, scaling), one slot. ``names`` are the paths
    in the model by those in the graph, where they are known. ``clamped`` says how much of an
    adapter, found by its B, adapter_dtype="fp8" has clamped before: such a site gets "bfloat16".

    Raises:
        FalqonError: a site that can't be trained rightly as asked (device, topk, sharding).
    """
    spec = spec_of_graph(matches, config)
    chooser = _Chooser(root, spec, config, names or {}, clamped)
    for found in matches:
        chooser.take(found)
    for found in (*match_frozen(root, matches), *match_frozen_experts(root, matches)):
        # Of a prepared layer nothing is left but its FP8 form.
        if config.frozen == "fp8" or _is_prepared(found):
            chooser.take_frozen(found)
    cut_by_ddp = is_ddp_piece(root.gm)
    refused = [
        Rejected(
            _path((r.lora_a, r.lora_b), r.scope),
            *(_CUT if r.torn and cut_by_ddp else (r.reason, r.remedy)),
            _source(r.lora_b),
        )
        for r in rejected
    ]
    return Plan(
        root,
        config,
        chooser.spec,
        _groups(chooser.sites, config),
        (*refused, *chooser.rejected),
        tuple(chooser.left),
        (*chooser.wide, *slow_attention(root)),
    )


_CUT = (
    "DDP's optimizer compiles the model in pieces, one a bucket of gradients, and cuts through it",
    "Its adapter runs beside the base layer, as it was. torch._dynamo.config.optimize_ddp = False "
    "before compiling makes no pieces",
)


class _Chooser:
    """Collects what becomes of each match."""

    def __init__(
        self,
        root: Scope,
        spec: SiteSpec,
        config: FalqonConfig,
        names: Mapping[str, str],
        clamped: Callable[[Scope, Param], int],
    ) -> None:
        self.root, self.spec, self.config = root, spec, config
        self.names, self.clamped = names, clamped
        self.sites: list[SitePlan] = []
        self.rejected: list[Rejected] = []
        self.left: list[Rejected] = []
        self.wide: list[fx.Node] = []
        self._written = written_parameters(root)
        self._tied = embeddings(root)
        self._bases: dict[object, BaseSlot] = {}
        self._adapters: dict[object, AdapterSlot] = {}
        self._rows: dict[object, RowsSlot] = {}

    def take(self, found: Match) -> None:
        """A linear layer with adapters."""
        path = _path_of(found)
        why = self._refusal(found, path)
        if why is not None:
            self.rejected.append(why)
            return
        check(found, path, self.config)
        if self.config.update == "rows" and not isinstance(found.base, Experts):
            why_rows = check_rows(found, path, self.config)
            if why_rows is not None:
                self.rejected.append(Rejected(path, *why_rows, source_of(found.anchor)))
                return
            self._add(found, self._rows_of(found, path), (), path, self.spec)
        else:
            base, spec = self._base(found, path), self._spec_of(found)
            adapters = tuple(self._adapter(found, a, base, path, spec) for a in found.added)
            self._add(found, base, adapters, path, spec)

    def take_frozen(self, found: Match) -> None:
        """A frozen linear layer alone."""
        tied = any(id(param.value) in self._tied for param in weights_of(found))
        path = _path_of(found, weights_of(found))
        path = (module_path(found.anchor) if tied else "") or path  # not the embedding's
        if not self._selects(path):
            return
        out, features = _size(found)
        stacked = isinstance(found.base, Experts)
        each = found.base.experts if isinstance(found.base, Experts) else 1
        why = why_left(path, hint(out) // each, hint(features), tied)
        refused = self._refusal(found, path)
        if why is not None and not _is_prepared(found):
            wide = None if stacked else wide_product(found)
            how = "It runs as it was" if wide is None else "It is multiplied in float32"
            remedy = f"{how}; an adapter on it would make it a site"
            self.left.append(Rejected(path, why, remedy, source_of(found.anchor)))
            self.wide += [] if wide is None else [wide]
        elif refused is not None:
            self.left.append(refused)
        else:
            check(found, path, self.config)
            base = self._base(found, path)
            fixed = tuple(self._adapter(found, a, base, path, self.spec) for a in found.added)
            self._add(found, base, fixed, path, self.spec)

    def _add(
        self,
        found: Match,
        base: BaseSlot | RowsSlot,
        adapters: tuple[AdapterSlot, ...],
        path: str,
        spec: SiteSpec,
    ) -> None:
        device = value_of(found.x).device
        site = describe(found, base, path, spec, architecture_of(device, self.config))
        why = losing(site, self.config, device)
        if why is not None:
            (self.rejected if found.adapters else self.left).append(why)
            return
        self.sites.append(SitePlan(found, base, adapters, site, spec))

    def _spec_of(self, found: Match) -> SiteSpec:
        """The spec of a site with adapters: in bfloat16 where FP8 has clamped some of one."""
        of_b = (self.clamped(found.scope, adapter.lora_b) for adapter in found.adapters)
        asked = self.config.adapter_dtype == "fp8" or not why_not_by_default(found)
        fits = self.spec.adapter == "bfloat16" or (asked and not any(of_b))
        return self.spec if fits else replace(self.spec, adapter="bfloat16")

    def _selects(self, path: str) -> bool:
        """Whether include= and exclude= take a layer, by its name in the graph and in the model."""
        return self.config.selects(site_of(path), site_of(self.names.get(path, path)))

    def _refusal(self, found: Match, path: str) -> Rejected | None:
        def refuse(reason: str, remedy: str) -> Rejected:
            return Rejected(path, reason, remedy, source_of(found.anchor))

        if not self._selects(path):
            return refuse("include= or exclude= leaves it out", "Change the patterns")
        dropped = [a.dropout for a in found.adapters if a.dropout > 0]
        if dropped and self.config.dropout == "reject":
            return refuse(
                f'it has an adapter dropout p={dropped[0]:g}, and dropout="reject" is set',
                'Set lora_dropout=0, or dropout="exact"',
            )
        if transformed(found.scope.mode(found.anchor)):
            return refuse("it runs inside a torch.func transform", LEAVE)
        packed = self.config.base_dtype == "nvfp4" and not _is_prepared(found)
        if packed and (why := nvfp4.why_not(hint(_size(found)[1]))):
            return refuse(why, 'It runs as it was; base_dtype="fp8" takes it')
        if any(is_dtensor(param.value) for param in params_of(found)):
            return refuse(*CUT_OTHERWISE)
        if isinstance(found.base, Experts) and (no := why_not_experts(found, self.config)):
            return refuse(*no)
        for param in params_of(found):
            if param.node is not None and found.scope.outer(param.node) in self._written:
                return refuse(
                    "one of its parameters is written inside the compiled graph",
                    "Write it outside of the compiled function",
                )
        return None

    def _base(self, found: Match, path: str) -> BaseSlot:
        (weight,) = weights_of(found)
        key = _identity(found.scope, weight)
        if key not in self._bases:
            out, features = _size(found)
            base, scope = in_fp8(found.base), found.scope
            if base is not None:
                nodes = tuple(map(scope.outer, (base.code, base.scale, base.digest)))
                self._bases[key] = BaseSlot(path, out, features, None, nodes)
            else:
                self._bases[key] = BaseSlot(path, out, features, _at_root(scope, weight), None)
        return self._bases[key]

    def _adapter(
        self, found: Match, adapter: AdapterMatch, base: BaseSlot, path: str, spec: SiteSpec
    ) -> AdapterSlot:
        scope, result = found.scope, value_of(found.anchor)
        wide = gemm_dtype(result.dtype, result.device) == torch.float32
        a, b = adapter.lora_a, adapter.lora_b
        cast_with = base if spec.adapter == "fp8" else None
        params = a, b, *adapter.correction.params
        key = (*(p and _identity(scope, p) for p in params), adapter.scaling, wide, id(cast_with))
        if key not in self._adapters:
            self._adapters[key] = AdapterSlot(
                path,
                _at_root(scope, a),
                _at_root(scope, b),
                adapter.scaling,
                wide,
                cast_with,
                adapter.fixed,
                adapter.correction.map(partial(_at_root, scope)),
            )
        return self._adapters[key]

    def _rows_of(self, found: Match, path: str) -> RowsSlot:
        (adapter,) = found.adapters
        key = (*(_identity(found.scope, p) for p in params_of(found)), adapter.scaling)
        if key not in self._rows:
            self._rows[key] = rows_slot(found, path, len(self._rows), _at_root)
        return self._rows[key]


def _groups(sites: list[SitePlan], config: FalqonConfig) -> tuple[tuple[SitePlan, ...], ...]:
    """Sites that become one op together, numbered in the report."""
    scopes = (
        {id(scope): i for i, scope in enumerate(sites[0].match.scope.root.walk())} if sites else {}
    )
    matches = [site.match for site in sites]
    matches.sort(key=lambda found: (scopes[id(found.scope)], found.anchor))
    groups = [[found] for found in matches]
    if config.siblings:
        groups = group_siblings(matches, config.update == "rows")
    of = {id(site.match): site for site in sites}
    alike: dict[tuple[int, SiteSpec], list[SitePlan]] = {}
    for i, group in enumerate(groups):
        for site in (of[id(found)] for found in group):
            alike.setdefault((i, site.spec), []).append(site)
    return tuple(
        tuple(replace(site, report=replace(site.report, group=i)) for site in group)
        for i, group in enumerate(alike.values())
    )


def _is_prepared(found: Match) -> bool:
    return in_fp8(found.base) is not None


def _size(found: Match) -> tuple[int, int]:
    """[out, in] of the base; of a stack, all rows of all experts."""
    (weight,) = weights_of(found)
    if isinstance(found.base, BaseLinear):
        return shape_of(weight.value)
    *stack, first, second = weight.value.shape
    out, features = (second, first) if weight.transposed else (first, second)
    return math.prod(stack) * out, features


def _named_by(found: Match) -> tuple[Param, ...]:
    """The parameters whose module is the site's: not a tied W, which has the name of its first use
    in the graph.
    """
    base, *adapter = params_of(found)
    node = base.node
    if node is None:
        return (base, *adapter)
    tied = len(found.scope.outer(node).users) > 1 or not found.nodes.issuperset(node.users)
    return tuple(adapter) if tied else (base, *adapter)


def _identity(scope: Scope, param: Param) -> object:
    """Equal for equal parameters, wherever in the graph they are read."""
    if param.node is None:
        return id(param.value)
    outer = scope.outer(param.node)
    return (str(outer.target) if outer.op == "get_attr" else outer, param.transposed)


def _at_root(scope: Scope, param: Param) -> Param:
    if param.node is None:
        return param
    return Param(param.value, scope.outer(param.node), param.name, param.transposed)


def _source(param: Param) -> Source | None:
    """Where a parameter is used."""
    return source_of(next(iter(param.node.users))) if param.node is not None else None


def _path_of(found: Match, named_by: Iterable[Param] | None = None) -> str:
    """The path of a site. Of a stack its own, as PEFT names what it targets."""
    base = found.base
    if not isinstance(base, Experts):
        return _path(_named_by(found) if named_by is None else named_by, found.scope)
    return stack_path(_name(found.scope, *weights_of(found)), base.prepared is not None) or "?"


def _path(params: Iterable[Param], scope: Scope) -> str:
    """The deepest module path that holds all of the site's parameters."""
    names = [name for p in params if (name := _name(scope, p))]
    return common_path(names) if names else "?"


def _name(scope: Scope, param: Param) -> str:
    if param.node is None:
        return param.name or ""
    outer = scope.outer(param.node)
    return str(outer.target) if outer.op == "get_attr" else source_path(outer) or str(outer.target)
