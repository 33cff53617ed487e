"""What a model on a mesh would hold and move, by arithmetic.

Tensor parallelism cuts W and one half of an adapter. FSDP2 cuts every parameter, of those the part,
by its first dimension into as many parts as there are processes, rounded up, and gathers a unit's
parts at once, in the dtypes that they have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from falqon_fx._compat import FSDP2_TAKES_INTEGERS
from falqon_fx.config import FalqonConfig
from falqon_fx.cost.cards import Card
from falqon_fx.cost.links import NETWORK, link_of, share
from falqon_fx.model.mesh import MeshPlan, way
from falqon_fx.model.pieces import Kind, Piece, pieces
from falqon_fx.report.data import GraphReport, Site
from falqon_fx.report.mesh import LayerShards, Mesh, Traffic, Unit
from falqon_fx.site.sharded import OLD_FSDP2

# What tensor parallelism cuts of a layer, and by which dimension. Of one scale for all of W, and of
# the digest, each process has its own.
_CUT: dict[str, dict[Kind, int]] = {
    "columns": {"base": 0, "scales": 0, "b": 0, "bias": 0},
    "rows": {"base": 1, "a": 1},
    "": {},
}
_WAYS = {"colwise": "columns", "rowwise": "rows"}
_HALVES = {"columns": "A", "rows": "B and biases"}


@dataclass(frozen=True)
class _Layer:
    """A layer's parameters, whole and as a process of ``tp`` has them."""

    path: str
    unit: str
    cut: str
    why_whole: str
    whole: tuple[Piece, ...]
    parts: tuple[Piece, ...]


def on_mesh(
    model: nn.Module,
    plan: MeshPlan,
    config: FalqonConfig,
    graphs: Sequence[GraphReport],
    card: Card | None,
    predict: Callable[[GraphReport], GraphReport],
) -> Mesh:
    """The plan of a model whose ``graphs`` were looked at; ``predict`` adds costs on ``card``."""
    layers = [*_layers(model, plan, config)]
    parts = [piece for layer in layers for piece in layer.parts]
    after = [piece for piece in parts if piece.when != "before"]
    units = [*_units(layers, plan)] if plan.fsdp > 1 else []
    cuts = {layer.path: layer.cut for layer in layers}
    local = [replace(g, sites=tuple(_local(s, cuts, plan) for s in g.sites)) for g in graphs]
    traffic = [*_gathers(units), *_gradients(layers, units, plan), *_activations(graphs, cuts)]
    costs = [site.cost for graph in map(predict, local) for site in graph.sites if site.cost]
    return Mesh(
        axes=plan.axes,
        layers=tuple(_shards(layer, plan) for layer in layers),
        units=tuple(units),
        traffic=tuple(_timed(one, plan, card) for one in traffic),
        held=_held(after, plan),
        held_before=_held([piece for piece in parts if piece.when != "after"], plan),
        trained=_held([piece for piece in after if piece.trained], plan),
        seconds=sum(cost.seconds_after for cost in costs) if costs else None,
        notes=tuple(_notes(plan, units, card)),
    )


def _layers(model: nn.Module, plan: MeshPlan, config: FalqonConfig) -> Iterator[_Layer]:
    units, ways = plan.units_of(model), plan.ways(model)
    found: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces(model, config):
        found[piece.path].append(piece)
    for path, whole in found.items():
        unit = max((u for u in units if f"{path}.".startswith(f"{u}.")), key=len, default="")
        cut, why = _way(path, whole, plan, ways)
        dimensions = _CUT[cut]
        parts = [_cut(piece, dimensions.get(piece.kind), plan.tp) for piece in whole]
        yield _Layer(path, unit, cut, why, tuple(whole), tuple(parts))


def _cut(piece: Piece, dimension: int | None, parts: int) -> Piece:
    """A process's part; what has one row for all of W is not cut."""
    if dimension is None or (piece.kind == "scales" and len(piece.shape) == 1):
        return piece
    return piece.cut(dimension, parts)


def _way(
    path: str, whole: Sequence[Piece], plan: MeshPlan, ways: Mapping[str, str]
) -> tuple[str, str]:
    """How tensor parallelism cuts a layer, and what each process has all of, and why."""
    if plan.ranks == 1 or (plan.tp == 1 and plan.fsdp > 1):
        return "", ""
    if plan.tp == 1:
        return "", "all of it: DDP copies the model"
    base = next((piece for piece in whole if (piece.kind, piece.when) == ("base", "after")), None)
    if base is None:
        return "", "all of it: no layer in FP8"
    word = way(path, ways)
    if word not in _WAYS:
        return "", f"all of it: the plan {f'says {word!r}' if word else 'does not name it'}"
    cut = _WAYS[word]
    size = base.shape[_CUT[cut]["base"]]
    if size % plan.tp:
        kind = "outputs" if cut == "columns" else "inputs"
        return "", f"all of it: {plan.tp} processes don't divide its {size} {kind}"
    adapted = any(piece.kind == "a" for piece in whole)
    return cut, f"{_HALVES[cut]}: the other half is cut" if adapted else ""


def _shard(piece: Piece, plan: MeshPlan) -> Piece:
    """What FSDP leaves of a parameter with a process, padding included."""
    return piece.cut(0, plan.fsdp) if plan.fsdp > 1 else piece


def _held(parts: Iterable[Piece], plan: MeshPlan) -> int:
    return sum(_shard(piece, plan).bytes() for piece in parts)


def _gathered(parts: Iterable[Piece], plan: MeshPlan, leave: Literal["before", "after"]) -> int:
    """What one gather gives a process, of all parts but those that are ``leave`` alone."""
    given = [_shard(piece, plan) for piece in parts if piece.when != leave]
    return plan.fsdp * sum(piece.bytes(plan.param_dtype) for piece in given)


def _shards(layer: _Layer, plan: MeshPlan) -> LayerShards:
    sizes: dict[str, int] = defaultdict(int)
    for piece in layer.whole:
        if piece.when != "before":
            sizes[_NAMES[piece.kind]] += piece.bytes()
    return LayerShards(
        path=layer.path,
        unit=layer.unit,
        held=_held([piece for piece in layer.parts if piece.when != "before"], plan),
        gathered=_gathered(layer.parts, plan, "before") if plan.fsdp > 1 else 0,
        cut=layer.cut,
        whole=layer.why_whole,
        **sizes,
    )


_NAMES = {"digest": "scales", "bias": "rest"} | {k: k for k in ("base", "scales", "a", "b", "rest")}


def _units(layers: Sequence[_Layer], plan: MeshPlan) -> Iterator[Unit]:
    """The units with parameters. The model itself keeps until backward what it has gathered."""
    for path in dict.fromkeys(layer.unit for layer in layers):
        parts = [piece for layer in layers if layer.unit == path for piece in layer.parts]
        again = path != "" and plan.reshard_after_forward
        yield Unit(
            path=path,
            gathered=_gathered(parts, plan, "before"),
            gathered_before=_gathered(parts, plan, "after"),
            gathers=2 if again else 1,
            reduced=plan.fsdp * _gradient_bytes((_shard(piece, plan) for piece in parts), plan),
        )


def _gradient_bytes(parts: Iterable[Piece], plan: MeshPlan) -> int:
    dtype = plan.reduce_dtype or plan.param_dtype
    return sum(piece.bytes(dtype) for piece in parts if piece.trained)


def _gathers(units: Sequence[Unit]) -> Iterator[Traffic]:
    if units:
        now, before = (sum(u.gathers * getattr(u, n) for u in units) for n in _GATHERED)
        yield Traffic("gathers", "all-gather", "fsdp", now, before)


_GATHERED = ("gathered", "gathered_before")


def _gradients(
    layers: Sequence[_Layer], units: Sequence[Unit], plan: MeshPlan
) -> Iterator[Traffic]:
    """Innermost first: halves of adapters that tensor parallelism leaves whole, shards, copies."""
    halves = [p for layer in layers if layer.cut for p in _whole_halves(layer) if p.trained]
    if halves:
        widest = max((piece.dtype for piece in halves), key=lambda dtype: dtype.itemsize)
        total = sum(piece.bytes(widest) for piece in halves)
        yield Traffic("gradients", "all-reduce", "tp", total, total)
    total = sum(unit.reduced for unit in units)
    if units:
        yield Traffic("gradients", "reduce-scatter", "fsdp", total, total)
        total //= plan.fsdp
    else:
        total = sum(p.bytes() for layer in layers for p in layer.parts if p.trained)
    if plan.ddp > 1:
        yield Traffic("gradients", "all-reduce", "ddp", total, total)


def _whole_halves(layer: _Layer) -> list[Piece]:
    half = "a" if layer.cut == "columns" else "b"
    return [piece for piece in layer.whole if piece.kind == half]


def _activations(graphs: Sequence[GraphReport], cuts: Mapping[str, str]) -> Iterator[Traffic]:
    """dL/dx of layers cut by columns, once for all that read one x, and O of those by rows."""
    sums: dict[object, int] = {}
    for number, graph in enumerate(graphs):
        places = {line.node: i for i, line in enumerate(graph.before)}
        for site in graph.sites:
            cut = cuts.get(_layer_of(site, cuts), "")
            features = site.in_features if cut == "columns" else site.out_features
            dtype: torch.dtype = getattr(
                torch, site.x_dtype if cut == "columns" else site.out_dtype
            )
            if cut:
                summed = _x_of(site, graph, places) if cut == "columns" else site.path
                sums[number, summed, cut] = site.tokens_hint * features * dtype.itemsize
    if sums:
        total = sum(sums.values())
        yield Traffic("activations", "all-reduce", "tp", total, total)


def _x_of(site: Site, graph: GraphReport, places: Mapping[str, int]) -> object:
    """The node whose value a site reads: what its first node takes from outside of it."""
    for place in sorted(places[node] for node in site.nodes if node in places):
        first = graph.before[place].inputs[:1]
        if first and first[0] not in site.nodes:
            return first
    return site.group


def _layer_of(site: Site, known: Mapping[str, str]) -> str:
    """The path that the parameters of a site go by."""
    return site.path if site.path in known else site.path.removesuffix(".base_layer")


def _local(site: Site, cuts: Mapping[str, str], plan: MeshPlan) -> Site:
    """A site on the parts of one process."""
    cut = cuts.get(_layer_of(site, cuts), "")
    if cut == "columns":
        return replace(site, out_features=site.out_features // plan.tp)
    return replace(site, in_features=site.in_features // plan.tp) if cut else site


def _timed(traffic: Traffic, plan: MeshPlan, card: Card | None) -> Traffic:
    link = link_of(card.name) if card is not None else None
    if link is None:
        return traffic
    if not plan.within(traffic.axis):
        link = NETWORK
    rate = share(traffic.collective, plan.axes[traffic.axis]) / link.bandwidth
    return replace(
        traffic,
        link=f"{link.name}, {link.bandwidth / 1e9:g} GB/s each way",
        source=link.source,
        seconds=traffic.bytes * rate,
        seconds_before=traffic.bytes_before * rate,
    )


def _notes(plan: MeshPlan, units: Sequence[Unit], card: Card | None) -> Iterator[str]:
    if plan.fsdp > 1:
        yield "FSDP2 shards all parameters, no buffers; falqon_fx.prepare comes before fully_shard"
        if not FSDP2_TAKES_INTEGERS:
            yield f"{OLD_FSDP2}: torch 2.12 or newer is needed"
        if not any(unit.path for unit in units):
            yield "the model has no repeated blocks: all of it is gathered at once (units=)"
    if plan.tp > 1:
        yield "tensor parallelism without sequence parallelism: x is whole on every process"
    if plan.ranks > 1 and card is not None and link_of(card.name) is None:
        yield f"no times of transfers: what connects several {card.name} is not known"
    yield (
        "not known: what a transfer reaches of its link's rate, what of it is hidden behind "
        "products, memory of activations and of the allocator"
    )
