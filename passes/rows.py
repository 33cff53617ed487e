"""What update="rows" asks of a plan, and the nodes by which its state enters a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from falqon_fx._compat import mark_own_input, value_of
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.passes.match.dataflow import LEAVE, Match
from falqon_fx.passes.scope import Scope
from falqon_fx.passes.terms import Param, RowsBaseLinear
from falqon_fx.rows.state import IN_GRAPH, allocate
from falqon_fx.site.spec import RowsSpec


@dataclass(frozen=True)
class RowsSlot:
    """The state of one (W, A, B) in a graph, shared by all sites that use it.

    ``prepared`` are the root's nodes of a prepared state; else it is looked up per call.
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


def check_rows(found: Match, path: str, config: FalqonConfig) -> tuple[str, str] | None:
    """Why update="rows" leaves a site as it was, and the remedy; None where it takes it.

    Raises:
        FalqonError: an option that the site can't have.
    """
    if len(found.adapters) > 1:
        return (
            "more than one adapter is active on it",
            'Activate one adapter at a time, or set update="adapter"',
        )
    (adapter,) = found.adapters
    if adapter.dropout > 0 and config.dropout == "exact":
        return (
            f"rows written into W' can't have the adapter dropout p={adapter.dropout:g}",
            'Set lora_dropout=0, dropout="ignore" or update="adapter"',
        )
    if adapter.lora_a.value.requires_grad and not adapter.lora_b.value.requires_grad:
        return "lora_A is trained and lora_B is frozen (as in MiCA)", LEAVE
    if isinstance(found.base, RowsBaseLinear):
        merged_with = float(found.base.scaling)  # pins a SymFloat: another value compiles anew
        if merged_with != adapter.scaling:
            return (
                f"prepare() merged it with scaling {merged_with:g}, the graph has "
                f"{adapter.scaling:g}",
                "Call falqon_fx.restore(model), then prepare() again",
            )
    config.rows(adapter.lora_b.value.shape[0], path)
    if adapter.lora_a.value.requires_grad:
        _check_trained_a(found, path, config)
    return None


def _check_trained_a(found: Match, path: str, config: FalqonConfig) -> None:
    """Rows written one by one hold the A of their time, and no later correction undoes that."""
    prepared = isinstance(found.base, RowsBaseLinear)
    on_cpu = value_of(found.x).device.type == "cpu"
    if config.topk == "all" and config.pending != "drop" and not prepared and on_cpu:
        return
    problem = (
        'its lora_A is trained, which update="rows" can do only where it writes all rows '
        '(topk="all") from the base weight (without prepare()), on a CPU, and keeps B '
        '(pending="apply" or "hold")'
    )
    raise FalqonError(
        path, problem, 'Set update="adapter", or freeze lora_A (requires_grad_(False))'
    )


def rows_slot(
    found: Match, path: str, index: int, at_root: Callable[[Scope, Param], Param]
) -> RowsSlot:
    """The slot of a match."""
    (adapter,) = found.adapters
    out, rank = adapter.lora_b.value.shape
    base, scope = found.base, found.scope
    prepared, weight = None, None
    if isinstance(base, RowsBaseLinear):
        prepared = tuple(scope.outer(node) for node in base.state)
    else:
        weight = at_root(scope, base.weight)  # type: ignore[union-attr,arg-type]
    return RowsSlot(
        index,
        path,
        weight,
        at_root(scope, adapter.lora_a),
        at_root(scope, adapter.lora_b),
        out,
        adapter.lora_a.value.shape[1],
        rank,
        adapter.scaling,
        prepared,
    )


@dataclass(frozen=True)
class RowsNodes:
    """The root graph's nodes of a slot: its state, in the order of `IN_GRAPH`, and
    its parameters.
    """

    slot: RowsSlot
    state: tuple[fx.Node, ...]
    base: fx.Node | None
    lora_a: fx.Node
    lora_b: fx.Node


@dataclass(frozen=True)
class RowsOperands:
    """What a site's op reads of a slot: W, Â, their scales, and b where the pending
    part is added.
    """

    weight: fx.Node
    scale: fx.Node
    a: fx.Node
    a_scale: fx.Node
    b: fx.Node | None


def enter_state(
    root: Scope, slot: RowsSlot, spec: RowsSpec, at_head: Callable[[Param], fx.Node]
) -> RowsNodes:
    """State of unprepared sites becomes trailing placeholders of the root graph."""
    lora_a, lora_b = at_head(slot.lora_a), at_head(slot.lora_b)
    if slot.prepared is not None:
        return RowsNodes(slot, slot.prepared, None, lora_a, lora_b)
    assert slot.base is not None
    value = slot.base.value
    fake = allocate(  # shapes and dtypes; the values come at run time
        slot.out,
        slot.features,
        slot.rank,
        value.dtype,
        slot.scaling,
        spec,
        torch.device("meta"),
    )
    state = []
    for name, tensor in zip(IN_GRAPH, fake.tensors, strict=True):
        node = root.add_input(f"falqon_{slot.index}_{name}")
        node.meta["falqon_shape"] = (tuple(tensor.shape), tensor.dtype, value.device)
        node.meta["val"] = tensor
        mark_own_input(node)
        state.append(node)
    return RowsNodes(slot, tuple(state), at_head(slot.base), lora_a, lora_b)


def insert_write_back(graph: fx.Graph, nodes: Sequence[RowsNodes], spec: RowsSpec) -> fx.Node:
    """One ``falqon::proxy_update_`` for all slots, where the graph is being edited.

    It compares fingerprints of B with the stored ones on the device, so it writes at most once per
    optimizer step, however often the graph runs in between.
    """
    base = [_base(graph, n) for n in nodes]
    columns = [[n.state[i] for n in nodes] for i in range(5)]
    lora_b, lora_a = [n.lora_b for n in nodes], [n.lora_a for n in nodes]
    scaling = [n.slot.scaling for n in nodes]
    update = graph.call_function(
        torch.ops.falqon.proxy_update_.default,
        (*columns, lora_b, lora_a, base, scaling, str(spec)),
    )
    update.meta["val"] = None  # it returns nothing
    if spec.pending == "drop":
        for node in lora_b:
            _zero(graph, node)
    return update


def operands_of(graph: fx.Graph, nodes: RowsNodes, spec: RowsSpec, wide: bool) -> RowsOperands:
    """The parts of W' = [W; A] as they are behind the write-back, where the graph is being edited.

    With pending="hold" evaluation still counts what is not in W' yet: a B that was just loaded is
    all pending. Where A trains all rows are written, and dL/dA asks for B itself, not for a part.
    """
    slot, (code, scale, applied, *_) = nodes.slot, nodes.state
    out = slot.out
    upper, lower = slice(None, out), slice(out, None)
    weight, a = _part(graph, code, upper), _part(graph, code, lower)
    w_scale = a_scale = scale
    if spec.per_row:
        w_scale, a_scale = _part(graph, scale, upper), _part(graph, scale, lower)
    b = None
    if adds_pending(spec.pending) and not slot.lora_a.value.requires_grad:
        b = graph.call_function(
            torch.ops.falqon.pending.default, (nodes.lora_b, applied, slot.scaling, wide)
        )
        dtype = torch.float32 if wide else torch.bfloat16
        b.meta["val"] = _shaped(nodes.lora_b, (out, slot.rank), dtype)
    return RowsOperands(weight, w_scale, a, a_scale, b)


def adds_pending(pending: str | None) -> bool:
    """Whether the graph that is being traced adds what is not in W' yet."""
    return pending == "apply" or (pending == "hold" and not torch.is_grad_enabled())


def _part(graph: fx.Graph, node: fx.Node, rows: slice) -> fx.Node:
    part = graph.call_function(operator.getitem, (node, rows))
    part.meta["val"] = value_of(node)[rows]
    return part


def _shaped(like: fx.Node, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    value: Tensor = value_of(like)
    return value.detach().new_empty(shape, dtype=dtype)


def _base(graph: fx.Graph, nodes: RowsNodes) -> fx.Node | None:
    """The base weight as [out, in], or None where a prepared module holds it in FP8 alone."""
    if nodes.base is None or nodes.slot.base is None:
        return None
    if not nodes.slot.base.transposed:
        return nodes.base
    flipped = graph.call_method("t", (nodes.base,))
    flipped.meta["val"] = nodes.slot.base.value.t()
    return flipped


def _zero(graph: fx.Graph, lora_b: fx.Node) -> None:
    """B := 0 outside autograd, as the public code does after each of its writes."""
    detached = graph.call_method("detach", (lora_b,))
    zero = graph.call_method("zero_", (detached,))
    detached.meta["val"] = zero.meta["val"] = value_of(lora_b).detach()
