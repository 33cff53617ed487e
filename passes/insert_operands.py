"""Bring what the sites' ops read into the graph: FP8 bases, and the adapters' casts.

Each base W enters as two trailing placeholders, its E4M3 or int8 weight and its scale, and a copy
of those of siblings as one where it is kept. The adapters are cast by one
``falqon::proxy_update`` at the head of the graph, for all its sites, from the parameters as they
are whenever the graph runs. With update="rows" their place is taken by the written W'
(`falqon_fx.passes.rows`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import fx

from falqon_fx._compat import is_fsdp, mark_own_input, value_of
from falqon_fx.ops import merged_linear
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.passes import room, transposes
from falqon_fx.passes.plan import Plan, SitePlan
from falqon_fx.passes.rows import (
    RowsNodes,
    RowsOperands,
    RowsSlot,
    enter_state,
    insert_write_back,
    operands_of,
)
from falqon_fx.passes.scope import Scope
from falqon_fx.passes.slots import AdapterSlot, BaseSlot, CopySlot
from falqon_fx.passes.terms import Param
from falqon_fx.site.forms import code_of, scale_shape
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import RowsSpec, SiteSpec


@dataclass(frozen=True)
class BaseNodes:
    """The root's nodes of a base: what is looked up by (the parameter W, or the bytes and the scale
    of a prepared layer), and the placeholders of what is found; on a GPU, with adapter_dtype="fp8",
    that of a count of what is clamped, too.
    """

    slot: BaseSlot
    given: tuple[fx.Node, ...]
    weight: fx.Node
    scale: fx.Node
    clamped: fx.Node | None = None

    @property
    def entered(self) -> tuple[fx.Node, ...]:
        """The placeholders, in their order."""
        count = () if self.clamped is None else (self.clamped,)
        return (self.weight, self.scale, *count)


@dataclass(frozen=True)
class AdapterNodes:
    """The root's nodes of an adapter: its parameters and their casts; b is None where the pending
    part of update="rows" is not added, alpha but for adapter_dtype="fp8", channels where b has no
    columns for the cast error of x.
    """

    lora_a: fx.Node
    lora_b: fx.Node
    a: fx.Node
    a_scale: fx.Node
    b: fx.Node | None
    alpha: fx.Node | None
    scaling: float
    channels: fx.Node | None = None


@dataclass(frozen=True)
class CopyNodes:
    """The root's placeholder of a copy of some bases, all in one."""

    slot: CopySlot
    bases: tuple[BaseNodes, ...]
    node: fx.Node


@dataclass(frozen=True)
class SiteNodes:
    """What the op of a site reads beside x and biases."""

    weight: fx.Node
    scale: fx.Node
    clamped: fx.Node | None
    adapters: tuple[AdapterNodes, ...]


@dataclass(frozen=True)
class Operands:
    """The nodes that this pass made or found, by slot."""

    bases: tuple[BaseNodes, ...]
    rows: tuple[RowsNodes, ...]
    adapters: Mapping[int, AdapterNodes]  # by the id of the slot
    written: Mapping[int, RowsOperands]
    pairs: tuple[tuple[BaseNodes, AdapterNodes], ...]  # which of the user's is added to which base
    turned: tuple[CopyNodes, ...] = ()
    joined: tuple[CopyNodes, ...] = ()

    @property
    def copies(self) -> tuple[CopyNodes, ...]:
        """All copies of W, in their order among the inputs."""
        return (*self.turned, *self.joined)

    def of(self, site: SitePlan) -> SiteNodes:
        """The operands of a planned site."""
        if isinstance(site.base, RowsSlot):
            own = self.written[id(site.base)]
            (nodes,) = (n for n in self.rows if n.slot is site.base)
            adapter = AdapterNodes(
                nodes.lora_a, nodes.lora_b, own.a, own.a_scale, own.b, None, site.base.scaling
            )
            return SiteNodes(own.weight, own.scale, None, (adapter,))
        (base,) = (n for n in self.bases if n.slot is site.base)
        adapters = tuple(self.adapters[id(slot)] for slot in site.adapters)
        count = base.clamped if site.spec.adapter == "fp8" else None
        return SiteNodes(base.weight, base.scale, count, adapters)

    def turned_of(self, group: Sequence[SitePlan]) -> list[fx.Node]:
        """The transposes of a group of sites, where they are kept: one node, or none."""
        slot = transposes.slot_of(group, [turned.slot for turned in self.turned])
        return [turned.node for turned in self.turned if turned.slot is slot]

    def joined_of(self, group: Sequence[SitePlan]) -> list[fx.Node]:
        """W of a group of sites with room for its adapters, likewise."""
        slot = room.slot_of(group, [joined.slot for joined in self.joined])
        return [joined.node for joined in self.joined if joined.slot is slot]


def insert_operands(plan: Plan) -> Operands:
    """Edit the root graph in place."""
    root = plan.root
    bases = tuple(_enter_base(plan, i, slot) for i, slot in enumerate(plan.bases))
    turned = tuple(_enter_copy(plan, i, bases, of) for i, of in enumerate(plan.turned.slots))
    joined = tuple(_enter_copy(plan, i, bases, of) for i, of in enumerate(plan.joined.slots))
    rows_spec = RowsSpec.from_config(plan.config) if plan.rows else None
    rows: tuple[RowsNodes, ...] = ()
    if rows_spec is not None:
        rows = tuple(
            enter_state(root, slot, rows_spec, lambda p: at_head(root, p)) for slot in plan.rows
        )
    adapters: dict[int, AdapterNodes] = {}
    written: dict[int, RowsOperands] = {}
    by_slot = {id(nodes.slot): nodes for nodes in bases}
    with _head(root) as graph:
        for kind in sorted({slot.kind for slot in plan.adapters}):
            slots = [slot for slot in plan.adapters if slot.kind == kind]
            adapters |= _cast_adapters(plan, graph, by_slot, slots)
        if rows_spec is not None:
            insert_write_back(graph, rows, rows_spec)
            wide_of = {id(s.base): _is_wide(s) for s in plan.sites}
            for nodes in rows:
                written[id(nodes.slot)] = operands_of(
                    graph, nodes, rows_spec, wide_of[id(nodes.slot)]
                )
    pairs = {
        (id(site.base), id(slot)): (by_slot[id(site.base)], adapters[id(slot)])
        for site in plan.sites
        for slot in site.adapters
        if not slot.fixed
    }
    return Operands(bases, rows, adapters, written, tuple(pairs.values()), turned, joined)


def _operand(slot: BaseSlot, spec: SiteSpec) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype of W as the op reads it."""
    shape, dtype = code_of(slot.out, slot.features, spec)
    return shape, dtype if spec.base == "nvfp4" else spec.operand


def _enter_base(plan: Plan, index: int, slot: BaseSlot) -> BaseNodes:
    root = plan.root
    given = slot.prepared
    if given is None:
        assert slot.weight is not None
        given = (at_head(root, slot.weight),)
    shapes = {
        "weight": _operand(slot, plan.spec),
        "scale": (scale_shape(slot.out, plan.spec), torch.float32),
    }
    in_fp8 = any(site.base is slot and site.spec.adapter == "fp8" for site in plan.sites)
    if in_fp8 and counts_on(value_of(given[0]).device):
        shapes["clamped"] = ((1,), torch.int32)
    entered = [
        _enter(root, f"falqon_base_{index}_{name}", shape, dtype, given[0])
        for name, (shape, dtype) in shapes.items()
    ]
    return BaseNodes(slot, given, *entered)


def _enter_copy(plan: Plan, index: int, bases: Sequence[BaseNodes], slot: CopySlot) -> CopyNodes:
    nodes = tuple(next(n for n in bases if n.slot is base) for base in slot.bases)
    given, name = nodes[0].given[0], f"falqon_{slot.name}_{index}"
    return CopyNodes(slot, nodes, _enter(plan.root, name, slot.shape, E4M3, given))


def _enter(
    root: Scope, name: str, shape: tuple[int, ...], dtype: torch.dtype, given: fx.Node
) -> fx.Node:
    """A trailing placeholder of what is looked up by ``given``."""
    node = root.add_input(name)
    node.meta["falqon_shape"] = (shape, dtype, value_of(given).device)
    node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    mark_own_input(node, static=not is_fsdp(given))
    return node


def counts_on(device: torch.device) -> bool:
    """Whether kernels count what they clamp, as an op by itself can't on a GPU without waiting."""
    return device.type == "cuda"


def _cast_adapters(
    plan: Plan, graph: fx.Graph, bases: Mapping[int, BaseNodes], slots: Sequence[AdapterSlot]
) -> dict[int, AdapterNodes]:
    """Cast adapters of one kind."""
    given = [[at_head(plan.root, p) for p in column] for column in cast_from(slots)]
    lora_a, lora_b, *fixed = given
    scaling, wide = [slot.scaling for slot in slots], slots[0].wide
    scales = [bases[id(slot.base)].scale for slot in slots if slot.base is not None]
    casts = graph.call_function(
        merged_linear.CASTS,
        (lora_a, lora_b, scaling, scales, *fixed, wide, str(spec_of(slots[0], plan))),
    )
    size = casts_per_adapter(slots[0])
    dtype = torch.float32 if wide else torch.bfloat16
    values: list[torch.Tensor] = []
    for slot in slots:
        rank, features = slot.rank, slot.lora_a.value.shape[1]
        values.append(_meta((rank, features), plan.spec.operand))
        values.append(_meta((rank, 1) if plan.spec.per_row else (), torch.float32))
        out = slot.lora_b.value.shape[0]
        values.append(_meta((out, slot.width), E4M3 if scales else dtype))
        values += [_meta((rank,), torch.float32)] if scales else []
    casts.meta["val"] = values
    nodes = [_item(graph, casts, i) for i in range(len(values))]
    found = {}
    for j, slot in enumerate(slots):
        a, a_scale, b, *alpha = nodes[size * j : size * (j + 1)]
        of_fp8 = alpha[0] if alpha else None
        own = slot.correction.channels
        channels = None if own is None else at_head(plan.root, own)
        made = a, a_scale, b, of_fp8, slot.scaling, channels
        of_a, of_b = lora_a[j], lora_b[j]
        if slot.fixed:
            of_a, of_b = _constant(graph, of_a), _constant(graph, of_b)
        found[id(slot)] = AdapterNodes(of_a, of_b, *made)
    return found


def _constant(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What no gradient is made of, whatever a loop over all parameters has set."""
    if not value_of(node).requires_grad:
        return node
    constant = graph.call_method("detach", (node,))
    constant.meta["val"] = value_of(node).detach()
    return constant


def detached(slot: AdapterSlot) -> int:
    """How many of an adapter's parameters are read as constants."""
    return slot.fixed * sum(p.value.requires_grad for p in (slot.lora_a, slot.lora_b))


def cast_from(slots: Sequence[AdapterSlot]) -> list[list[Param]]:
    """What the casts of adapters of one kind are made from: every A, every B, and every A_c, B_c
    and W_S where there are any.
    """
    fixed = [slot.correction for slot in slots]
    columns = [[of.error_a for of in fixed], [of.error_b for of in fixed]]
    columns.append([of.columns for of in fixed])
    given = [[param for param in column if param is not None] for column in columns]
    return [[slot.lora_a for slot in slots], [slot.lora_b for slot in slots], *given]


def casts_per_adapter(slot: AdapterSlot) -> int:
    """What ``falqon::proxy_update`` returns for it: Â, its scale, b, and α for b in FP8."""
    return 3 if slot.base is None else 4


def spec_of(slot: AdapterSlot, plan: Plan) -> SiteSpec:
    """How an adapter is cast."""
    return plan.spec if slot.base is not None else replace(plan.spec, adapter="bfloat16")


def _meta(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    item = graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = node.meta["val"][index]
    return item


def _is_wide(site: SitePlan) -> bool:
    result = value_of(site.match.anchor)
    return gemm_dtype(result.dtype, result.device) == torch.float32


@contextmanager
def _head(root: Scope) -> Iterator[fx.Graph]:
    """Insert where the graph begins to compute, in order."""
    graph = root.gm.graph
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first):
        yield graph


def at_head(root: Scope, param: Param) -> fx.Node:
    """A parameter read where the graph begins: its own get_attr may stand further down, and one is
    made for the parameter of a module called as such.
    """
    node = param.node
    if node is not None and node.op == "placeholder":
        return node
    target = str(param.name if node is None else node.target)
    with root.after_inputs():
        copy = root.gm.graph.get_attr(target)
    copy.meta.update(node.meta if node is not None else {"val": param.value})
    return copy
