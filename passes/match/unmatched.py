"""LoRA-like pairs that no matcher can read, so that none goes unreported.

Two trained weights that share a small dimension and are multiplied with one another, or one with
the other's product, whatever the operation and the views, casts and scalings in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import fx

from falqon_fx._compat import OpOverload, is_dtensor, source_path, value_of
from falqon_fx.passes.dialects import PRODUCTS
from falqon_fx.passes.match.dataflow import Match, RejectedMatch
from falqon_fx.passes.scope import Scope, is_transpose, is_view, param_of
from falqon_fx.passes.shards import CUT_OTHERWISE
from falqon_fx.passes.terms import Cast, Dropout, Linear, Param, Scale
from falqon_fx.passes.vocabulary import BATCHED, MOVE_METHODS, MOVES, PRODUCT_METHODS

_STEPS = 16  # views, casts and scalings between two products that are looked through


def unmatched(
    scope: Scope, matches: Sequence[Match], rejected: Sequence[RejectedMatch]
) -> Iterator[RejectedMatch]:
    """The pairs of one graph, or of the body of a checkpoint, that are in neither list."""
    known = _known(matches, rejected)
    for node in scope.gm.graph.nodes:
        if not is_product(node):
            continue
        for first, second in _pairs(scope, node):
            if {id(first.value), id(second.value)} & known or not _low_rank(first, second):
                continue
            known |= {id(first.value), id(second.value)}
            yield RejectedMatch(scope, first, second, *_reason(node, first, second))


def named_as_lora(
    root: Scope, matches: Sequence[Match], rejected: Sequence[RejectedMatch]
) -> Iterator[RejectedMatch]:
    """Weights of a whole graph that are named as LoRA's and stand in neither list; frozen ones too,
    as Arrow's.
    """
    for params in _by_owner(root, _known(matches, rejected)).values():
        names = " and ".join(params)
        why = f"{names} {'stand' if len(params) > 1 else 'stands'} in this graph, but not as"
        why += " base(x) + s·B(A(x))"
        first, *_, last = [*params.values()] * 2
        if is_dtensor(first.value) or is_dtensor(last.value):
            yield RejectedMatch(root, first, last, *CUT_OTHERWISE)
            continue
        yield RejectedMatch(root, first, last, why, _REMEDY_BY_NAME, torn=first is last)


def _known(matches: Sequence[Match], rejected: Sequence[RejectedMatch]) -> set[int]:
    pairs = [(a.lora_a, a.lora_b) for m in matches for a in m.adapters]
    pairs += [(r.lora_a, r.lora_b) for r in rejected]
    return {id(p.value) for pair in pairs for p in pair}


def _by_owner(scope: Scope, known: set[int]) -> dict[str, dict[str, Param]]:
    """Trained parameters by the path of their layer and their names."""
    found: dict[str, dict[str, Param]] = {}
    for node in scope.gm.graph.nodes:
        if node.op not in ("placeholder", "get_attr") or not node.users:
            continue
        if any(map(is_ours, node.users)):
            continue
        name = source_path(node) or str(node.target)
        named = _LORA.search(name)
        param = param_of(node, scope) if named else None
        if named and param is not None and param.value.dim() > 1 and id(param.value) not in known:
            found.setdefault(name[: named.start()].rstrip("."), {})[named[0]] = param
    return found


_LORA = re.compile(r"\blora_[AaBb](?![a-z])")


def named_lora(scope: Scope, param: Param) -> bool:
    """Whether a parameter's name says that it is LoRA's."""
    name = param.name or ""
    if param.node is not None:
        outer = scope.outer(param.node)
        name = source_path(outer) or str(outer.target)
    return "lora" in name.lower()


def is_ours(node: fx.Node) -> bool:
    """Whether a node is one that the passes have put there before."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "falqon"


_REMEDY_BY_NAME = (
    "A graph break (TORCH_LOGS=graph_breaks), or a variant of LoRA that does more than that: "
    "the layer runs unmerged, as it was"
)
_REMEDY = "Write it as base(x) + s * B(A(x)) with nn.Linear or F.linear; as it is it runs unmerged"


_REMEDY_OF_STACKS = (
    'Use model.set_experts_implementation("grouped_mm") where transformers has it; as it is it '
    "runs unmerged"
)


def _reason(node: fx.Node, first: Param, second: Param) -> tuple[str, str]:
    if 3 in (first.value.dim(), second.value.dim()) or _makes_a_stack(node):
        why = "it adapts stacked weights, such as those of experts, outside of a grouped product"
        return why, _REMEDY_OF_STACKS
    name = getattr(node.target, "__name__", node.target)
    why = f"its low-rank product is computed by {name} in a way that is not base(x) + s·B(A(x))"
    return why, _REMEDY


def _makes_a_stack(node: fx.Node) -> bool:
    value = value_of(node)
    return node.target in BATCHED and value is not None and value.dim() == 3


def _pairs(scope: Scope, node: fx.Node) -> Iterator[tuple[Param, Param]]:
    """(Q, P) for a product of trained P with trained Q or with a product of Q."""
    operands = [_below(scope, n) for n in node.all_input_nodes]
    trained = [p for n in operands if (p := _trained(scope, n))]
    for i, first in enumerate(trained):
        for second in trained[i + 1 :]:
            yield first, second
    for inner in operands:
        # Of two linears in a row `match` says all there is to say.
        both_linear = isinstance(scope.term(inner), Linear) and isinstance(scope.term(node), Linear)
        if is_product(inner) and not both_linear:
            for n in inner.all_input_nodes:
                first_inner = _trained(scope, _below(scope, n))
                for second in trained:
                    if first_inner is not None and first_inner.value is not second.value:
                        yield first_inner, second


def _below(scope: Scope, node: fx.Node) -> fx.Node:
    """What a node is a view, cast, scaling or dropout of."""
    for _ in range(_STEPS):
        term = scope.term(node)
        if isinstance(term, Cast | Scale | Dropout):
            node = term.x
        elif only_moves(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            break
    return node


def _trained(scope: Scope, node: fx.Node) -> Param | None:
    param = param_of(node, scope)
    if param is None or not param.value.requires_grad or param.value.dim() < 2:
        return None
    return param


def _low_rank(first: Param, second: Param) -> bool:
    """Whether the two share a dimension that is smaller than the largest of each."""
    shared = set(first.value.shape) & set(second.value.shape)
    largest = min(max(first.value.shape), max(second.value.shape))
    return any(int(size) < int(largest) for size in shared)


def is_product(node: fx.Node) -> bool:
    """Whether a node multiplies matrices, of whatever shape."""
    if node.op == "call_method":
        return node.target in PRODUCT_METHODS
    return node.op == "call_function" and (node.target in PRODUCTS or node.target in BATCHED)


def only_moves(node: fx.Node) -> bool:
    """Whether a node only views, splits or reorders the elements of its first argument."""
    if is_view(node) or is_transpose(node):
        return True
    if node.op == "call_method":
        return node.target in MOVE_METHODS
    return node.op == "call_function" and node.target in MOVES
