"""Frozen linear layers without an adapter: which run in FP8 beside the adapted
ones, and why not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn
from torch.nn import functional as F

from falqon_fx._compat import is_plain, value_of
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.passes.match.dataflow import (
    Match,
    MatchRejected,
    casts,
    check_mode,
    check_private,
    check_unwritten,
    nodes_of,
    trailing_cast,
)
from falqon_fx.passes.modes import may_autocast
from falqon_fx.passes.scope import Scope
from falqon_fx.passes.terms import BaseLinear, Linear, UnsupportedAdapted
from falqon_fx.passes.vocabulary import LINEAR

_SMALL = 64  # below this many inputs or outputs no FP8 product gains
_WIDE = 12  # times as many outputs as inputs, and _MANY of them: a vocabulary, not a layer
_MANY = 8192
# The last name in the path of a layer whose output decides more than its FLOPs cost.
_HEADS = {"lm_head", "head", "score", "classifier", "embed_out", "output", "output_projection"}
_HEADS |= {"qa_outputs"}
_ROUTERS = {"gate", "router", "wg", "shared_expert_gate"}
_EXPERTS = 1024  # no router has more outputs; a `gate` that has is half of a gated MLP
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_left(path: str, out: int, features: int, tied: bool) -> str | None:
    """Why a frozen linear layer [out, features] at ``path`` is left as it is, None if it is not.

    ``tied``: its weight is an embedding's, too.
    """
    name = path.removesuffix(".original_module").rpartition(".")[2]  # beside PEFT's trained copy
    if site_of(path) != path:  # with its adapter on it is a site, and its numbers are the same
        return None
    if part_of_adapter(path):
        return "it is part of an adapter"
    if tied:
        return "its weight is tied to an embedding"
    if name in _HEADS or (out >= _MANY and out >= _WIDE * features):
        return "it is an output head"
    if name in _ROUTERS and out <= _EXPERTS:
        return "it is a router"
    if min(out, features) < _SMALL:
        return f"it is too small to gain ({out} x {features})"
    return None


def wide_product(found: Match) -> fx.Node | None:
    """The product of a layer that stays out of FP8, in bfloat16 on a CPU that has none of its own:
    it takes twenty times as long there as in float32, an output head longer than all sites.
    """
    base, scope = found.base, found.scope
    (node,) = (n for n in found.nodes if scope.term(n) is base)
    value = value_of(node)
    if not isinstance(base, Linear) or node.target not in LINEAR:
        return None
    given = [t.dtype for t in (value, value_of(base.x), base.weight.value)]
    is_slow = gemm_dtype(value.dtype, value.device) != value.dtype
    frozen = base.bias is None or not base.bias.value.requires_grad
    same = given == [torch.bfloat16] * 3
    return node if same and is_slow and frozen and not base.weight.transposed else None


def slow_attention(root: Scope) -> list[fx.Node]:
    """The attention of a graph that has such products."""
    found: list[fx.Node] = []
    for scope in root.walk():
        for node in scope.gm.graph.find_nodes(
            op="call_function", target=F.scaled_dot_product_attention
        ):
            names = ("query", "key", "value")
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            values = [value_of(given[name]) for name in names]
            slow = all(gemm_dtype(v.dtype, v.device) != v.dtype == torch.bfloat16 for v in values)
            if slow and not may_autocast(scope.mode(node), "cpu"):
                found.append(node)
    return found


def part_of_adapter(path: str) -> bool:
    """Whether a linear layer is a lora_A or lora_B: a frozen one looks like any other."""
    return not {"lora_A", "lora_B"}.isdisjoint(path.split("."))


def site_of(path: str) -> str:
    """The path that a layer has as a site: that of the LoRA layer whose base it is, or its own."""
    return path.removesuffix(".base_layer")


def match_frozen(root: Scope, matches: Sequence[Match]) -> Iterator[Match]:
    """The linear layers of a graph on a plain frozen weight that belong to no match yet; prepared
    ones, too.
    """
    for scope in root.walk():
        own = [found for found in matches if found.scope is scope]
        taken = {n for found in own for n in found.nodes}
        read = {n for found in own for n in (found.x, *(a.x for a in found.added))}
        for node in scope.gm.graph.nodes:
            base = scope.term(node)
            if node in taken or scope.is_part(node):
                continue
            if isinstance(base, BaseLinear) or (isinstance(base, Linear) and _is_frozen(base)):
                parts = base.parts if isinstance(base, Linear) else ()
                # What another site reads in front of a cast must stay.
                anchor = node if node in read else trailing_cast(scope, node)
                reads = casts(scope, node, base.x, taken)
                inside = {node, anchor, *parts}
                try:
                    check_mode(scope, inside)
                    check_unwritten((reads[-1], *nodes_of(base.bias)), reads[:-1], inside)
                    check_private(inside - {anchor}, inside, taken)
                except MatchRejected:
                    continue  # its pieces serve something else, too
                taken |= inside
                yield Match(scope, anchor, frozenset(inside), reads[-1], base)


def embeddings(root: Scope) -> set[int]:
    """The weights that a graph also reads as embeddings, by id."""
    found: set[int] = set()
    for scope in root.walk():
        for node in scope.gm.graph.nodes:
            term = scope.term(node)
            if isinstance(term, UnsupportedAdapted):
                found.add(id(term.weight.value))
    return found


def _is_frozen(base: Linear) -> bool:
    """Not a buffer: a bank of filters or a projection of positions wants its precision."""
    value = base.weight.value
    return (
        is_plain(value)
        and isinstance(value, nn.Parameter)
        and not value.requires_grad
        and value.is_leaf
        and value.dtype in _FLOATS
        and value.dim() == 2
    )
