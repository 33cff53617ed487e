"""Pass 3: decide what becomes of each match: which state, which spec, or why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from falqon_fx._compat import is_ddp_piece, is_dtensor, is_fsdp, source_path
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.passes.cost import losing
from falqon_fx.passes.cuts import cut_sites
from falqon_fx.passes.dataflow import Match, RejectedMatch
from falqon_fx.passes.describe import describe, source_of
from falqon_fx.passes.kernels import architecture_of
from falqon_fx.passes.modes import Mode, modes
from falqon_fx.passes.normalize import Scope, value_of
from falqon_fx.passes.siblings import group_siblings
from falqon_fx.passes.terms import BaseLinear, Param
from falqon_fx.report import Rejected, Site, Source, common_path
from falqon_fx.spec import SiteSpec, parse_spec


@dataclass(frozen=True)
class Slot:
    """The state of one (W, A, B) in a graph, shared by all sites that use it.

    ``prepared`` are the root nodes of a prepared state; else the state is looked up per call.
    """

    index: int
    path: str
    base: Param | None
    lora_a: Param
    lora_b: Param
    out: int
    features: int
    rank: int
    scaling: float
    prepared: tuple[fx.Node, ...] | None


@dataclass(frozen=True)
class SitePlan:
    """A match that will be rewritten."""

    match: Match
    slot: Slot
    report: Site


@dataclass(frozen=True)
class Plan:
    """What to do with a graph."""

    root: Scope
    config: FalqonConfig
    spec: SiteSpec
    groups: tuple[tuple[SitePlan, ...], ...]  # each becomes one op: siblings share their x
    slots: tuple[Slot, ...]
    rejected: tuple[Rejected, ...]
    strided: frozenset[int] = frozenset()  # groups whose O is a view, see `passes.autotune`

    @property
    def sites(self) -> tuple[SitePlan, ...]:
        """All sites, group by group."""
        return tuple(site for group in self.groups for site in group)

    def spec_of(self, group: tuple[SitePlan, ...]) -> str:
        """What the op of a group carries."""
        strided = group[0].report.group in self.strided
        return str(replace(self.spec, output="strided") if strided else self.spec)


def plan(
    root: Scope, matches: list[Match], rejected: list[RejectedMatch], config: FalqonConfig
) -> Plan:
    """Choose sites and give equal (W, A, B, scaling) one slot.

    Raises:
        FalqonError: a site that can't be trained rightly as asked (device, topk, sharding, a cut
            through it).
    """
    if is_ddp_piece(root.gm):
        _check_whole(root, matches)
    spec = SiteSpec.from_config(config)
    refused = [
        Rejected(_path(root, (r.lora_a, r.lora_b), r.scope), r.reason, r.remedy, _source(r.lora_b))
        for r in rejected
    ]
    within = {n: mode for scope in root.walk() for n, mode in modes(scope.gm.graph).items()}
    sites: list[SitePlan] = []
    slots: dict[tuple[object, ...], Slot] = {}
    for found in matches:
        path = _path(root, _named_by(found), found.scope)
        why = _refusal(found, path, config, within)
        if why is not None:
            refused.append(why)
            continue
        _check(found, path, config)
        key = (*(_identity(found.scope, p) for p in _params(found)), found.scaling)
        slot = slots.get(key) or _slot(len(slots), path, found)
        device = value_of(found.x).device
        site = describe(found, slot, spec, architecture_of(device, config))
        why = losing(site, config, device)
        if why is not None:
            refused.append(why)
            continue
        slots[key] = slot
        sites.append(SitePlan(found, slot, site))
    groups = _groups(sites, config, within)
    return Plan(root, config, spec, groups, tuple(slots.values()), tuple(refused))


def _groups(
    sites: list[SitePlan], config: FalqonConfig, within: Mapping[fx.Node, Mode]
) -> tuple[tuple[SitePlan, ...], ...]:
    """Sites that become one op together, numbered in the report."""
    matches = [site.match for site in sites]
    groups = group_siblings(matches, within) if config.siblings else [[found] for found in matches]
    of = {id(site.match): site for site in sites}
    return tuple(
        tuple(
            replace(of[id(found)], report=replace(of[id(found)].report, group=i)) for found in group
        )
        for i, group in enumerate(groups)
    )


def _params(found: Match) -> tuple[Param, ...]:
    if isinstance(found.base, BaseLinear):
        code = found.base.state[0]
        return (Param(value_of(found.scope.outer(code)), code), found.lora_a, found.lora_b)
    return (found.base.weight, found.lora_a, found.lora_b)


def _named_by(found: Match) -> tuple[Param, ...]:
    """The parameters whose module is the site's: not a tied W, which has the name of its first use
    in the graph.
    """
    base, *adapter = _params(found)
    node = base.node
    if node is None:
        return (base, *adapter)
    tied = len(found.scope.outer(node).users) > 1 or not found.nodes.issuperset(node.users)
    return tuple(adapter) if tied else (base, *adapter)


def _refusal(
    found: Match, path: str, config: FalqonConfig, within: Mapping[fx.Node, Mode]
) -> Rejected | None:
    if not config.selects(path):
        return Rejected(
            path,
            "include= or exclude= leaves it out",
            "Change the patterns",
            source_of(found.anchor),
        )
    if found.dropout > 0 and config.dropout == "reject":
        return Rejected(
            path,
            f"a merged weight can't apply the adapter dropout p={found.dropout:g}",
            'Set lora_dropout=0, or dropout="ignore"',
            source_of(found.anchor),
        )
    if len({within[node] for node in found.nodes}) > 1:
        return Rejected(
            path,
            "torch.no_grad() or torch.autocast() covers a part of it alone; one op has one mode",
            "Compute the base layer and its adapter in the same mode",
            source_of(found.anchor),
        )
    return None


def _check(found: Match, path: str, config: FalqonConfig) -> None:
    x = value_of(found.x)
    for param in _params(found):
        node = None if param.node is None else found.scope.outer(param.node)
        if is_dtensor(param.value) or (node is not None and is_fsdp(node)):
            raise FalqonError(
                path,
                "its parameters are sharded (FSDP or tensor parallel), which is not built yet",
                "Use DDP or one GPU",
            )
        if x is not None and param.value.device != x.device:
            raise FalqonError(
                path,
                f"a parameter is on {param.value.device}, its input on {x.device}",
                "Move the whole model to one device",
            )
    config.rows(found.lora_b.value.shape[0], path)
    if isinstance(found.base, BaseLinear):
        done = parse_spec(found.base.spec)
        asked = SiteSpec.from_config(config)
        if (done.granularity, done.scale) != (asked.granularity, asked.scale):
            raise FalqonError(
                path,
                f"prepare() used granularity={done.granularity!r}, scale={done.scale!r}; the "
                f"backend is asked for {asked.granularity!r}, {asked.scale!r}",
                "Give prepare() and torch.compile() the same config",
            )


def _check_whole(root: Scope, matches: list[Match]) -> None:
    """No site may lie half in this piece of a graph."""
    whole = {node for found in matches for node in found.nodes}
    cut = [_path(root, (param,), scope) for scope, param in cut_sites(root, whole)]
    if cut:
        raise FalqonError(
            ", ".join(cut),
            "DDP's optimizer compiles the model in pieces and cuts through these sites",
            "Set torch._dynamo.config.optimize_ddp = False, or a larger bucket_cap_mb",
        )


def _identity(scope: Scope, param: Param) -> object:
    """Equal for equal parameters, wherever in the graph they are read."""
    if param.node is None:
        return id(param.value)
    outer = scope.outer(param.node)
    return (str(outer.target) if outer.op == "get_attr" else outer, param.transposed)


def _slot(index: int, path: str, found: Match) -> Slot:
    out, rank = found.lora_b.value.shape
    base, scope = found.base, found.scope
    common = {
        "index": index,
        "path": path,
        "out": out,
        "rank": rank,
        "scaling": found.scaling,
        "features": found.lora_a.value.shape[1],
        "lora_a": _at_root(scope, found.lora_a),
        "lora_b": _at_root(scope, found.lora_b),
    }
    if isinstance(base, BaseLinear):
        nodes = tuple(scope.outer(node) for node in base.state)
        return Slot(base=None, prepared=nodes, **common)  # type: ignore[arg-type]
    return Slot(base=_at_root(scope, base.weight), prepared=None, **common)  # type: ignore[arg-type]


def _at_root(scope: Scope, param: Param) -> Param:
    if param.node is None:
        return param
    return Param(param.value, scope.outer(param.node), param.name, param.transposed)


def _source(param: Param) -> Source | None:
    """Where a parameter is used."""
    return source_of(next(iter(param.node.users))) if param.node is not None else None


def _path(root: Scope, params: Iterable[Param], scope: Scope) -> str:
    """The deepest module path that holds all of the site's parameters."""
    names = [name for p in params if (name := _name(scope, p))]
    return common_path(names) if names else "?"


def _name(scope: Scope, param: Param) -> str:
    if param.node is None:
        return param.name or ""
    outer = scope.outer(param.node)
    return str(outer.target) if outer.op == "get_attr" else source_path(outer) or str(outer.target)
