"""Products with the stacked weights of experts, each row with its expert's: the spellings that
transformers' implementations give, with PEFT's adapter on the stack or without one.

    grouped_mm(x, transpose(W'), offs)                     rows sorted by expert
    squeeze(bmm(W'[ids], unsqueeze(x)))                    an expert for each row, in any order
    W' = W + s · B_e · A_e, by baddbmm or as a sum         or W itself

W may be stored [E, in, out] as well. How A and B lie in memory is not read off the spelling: the
views on the way from the parameter are run on the numbers of its places.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from falqon_fx._compat import value_of, without_fake_mode
from falqon_fx.ops.base_linear import STACK
from falqon_fx.passes.match.dataflow import (
    LEAVE,
    AdapterMatch,
    Match,
    MatchRejected,
    RejectedMatch,
    casts,
    check_base,
    check_private,
    check_unwritten,
    strip_elementwise,
    trailing_cast,
)
from falqon_fx.passes.match.unmatched import only_moves
from falqon_fx.passes.modes import transformed
from falqon_fx.passes.scope import Scope, is_number, is_transpose, param_of
from falqon_fx.passes.terms import Add, Cast, Experts, Linear, Param, PreparedStack
from falqon_fx.passes.vocabulary import BADDBMM, BMM, GROUPED_MM, GROUPED_MM_NAMES


@dataclass(frozen=True)
class _Product:
    """Rows of ``x`` times their experts' weights; ``turned`` where these are stored [in, out].

    ``nodes`` are what computes it beside the weights.
    """

    anchor: fx.Node
    x: fx.Node
    weight: fx.Node
    turned: bool
    groups: fx.Node
    by_id: bool
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Sum:
    """W + s · B_e · A_e, or W alone, with the nodes that compute it."""

    weight: Param | PreparedStack
    adapter: AdapterMatch | None
    nodes: tuple[fx.Node, ...]


def match_experts(
    scope: Scope, taken: set[fx.Node], adapted: bool
) -> Iterator[Match | RejectedMatch]:
    """The stacks of a graph, or of the body of a checkpoint, that have an adapter (``adapted``), or
    have none.
    """
    for node in scope.gm.graph.nodes:
        product = None if node in taken else _product(node)
        if product is None:
            continue
        try:
            total = _sum(scope, product)
            if total is None or adapted != (total.adapter is not None):
                continue
            yield _complete(scope, product, total, taken)
        except MatchRejected as no:
            if adapted and isinstance(no, _Refused):
                yield RejectedMatch(scope, no.lora_a, no.lora_b, no.reason, no.remedy)


def match_frozen_experts(root: Scope, matches: Sequence[Match]) -> Iterator[Match]:
    """The stacks of plain frozen weights of a graph that belong to no match yet."""
    for scope in root.walk():
        taken = {n for found in matches if found.scope is scope for n in found.nodes}
        for found in match_experts(scope, taken, adapted=False):
            if isinstance(found, Match) and isinstance(found.base, Experts):
                yield found


class _Refused(MatchRejected):
    """Why an adapted stack is not a site."""

    def __init__(self, lora_a: Param, lora_b: Param, why: MatchRejected) -> None:
        super().__init__(why.reason, why.remedy)
        self.lora_a, self.lora_b = lora_a, lora_b


def _product(node: fx.Node) -> _Product | None:
    return _grouped(node) or _batched(node)


def _grouped(node: fx.Node) -> _Product | None:
    if node.target not in GROUPED_MM and str(node.target) not in GROUPED_MM_NAMES:
        return None
    bound = dict(zip(("x", "weight", "groups"), node.args, strict=False))
    bound |= {_OPERANDS.get(name, name): value for name, value in node.kwargs.items()}
    x, weight, groups = (bound.pop(name, None) for name in ("x", "weight", "groups"))
    nodes = (x, weight, groups)
    if any(not isinstance(n, fx.Node) for n in nodes) or any(v is not None for v in bound.values()):
        return None
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    assert isinstance(groups, fx.Node)
    if _dims(x) != 2 or _dims(weight) != 3:
        return None
    if _swaps_last(weight):
        return _Product(node, x, weight.args[0], False, groups, False, (node, weight))  # type: ignore[arg-type]
    return _Product(node, x, weight, True, groups, False, (node,))


_OPERANDS = {
    "input": "x",
    "self": "x",
    "mat_a": "x",
    "mat2": "weight",
    "mat_b": "weight",
    "offs": "groups",
}


def _batched(node: fx.Node) -> _Product | None:
    """bmm(W'[ids], x[..., None])[..., 0], or bmm(x[:, None], W'[ids])[:, 0] of [in, out]."""
    product = _operand(node, "squeeze")
    if product is None or product.target not in BMM | {"bmm"} or len(product.args) != 2:
        return None
    left, right = product.args
    for weight, x, turned, dim in ((left, right, False, 2), (right, left, True, 1)):
        if not isinstance(weight, fx.Node) or not isinstance(x, fx.Node):
            return None
        inner, taken = _operand(x, "unsqueeze"), _taken(weight)
        if inner is None or taken is None or _dims(inner) != 2 or _dims(weight) != 3:
            continue
        if _at(x, _dims(inner) + 1) != dim or _at(node, 3) != dim:
            continue
        stack, ids = taken
        return _Product(node, inner, stack, turned, ids, True, (node, product, x, weight))
    return None


def _operand(node: fx.Node, name: str) -> fx.Node | None:
    """What ``node`` squeezes or unsqueezes."""
    names = {name, getattr(torch, name)}
    if node.target not in names or len(node.args) != 2 or node.kwargs:
        return None
    inner = node.args[0]
    return inner if isinstance(inner, fx.Node) else None


def _at(node: fx.Node, dims: int) -> int | None:
    """The dimension that a squeeze or an unsqueeze names, of ``dims``."""
    dim = node.args[1]
    return dim % dims if isinstance(dim, int) else None


def _taken(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(values, places) of values[places], for int64 places in one dimension."""
    if node.target is not operator.getitem or len(node.args) != 2:
        return None
    values, places = node.args
    if isinstance(places, tuple) and len(places) == 1:
        (places,) = places
    if not isinstance(values, fx.Node) or not isinstance(places, fx.Node):
        return None
    index = value_of(places)
    is_index = isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() == 1
    return (values, places) if is_index else None


def _dims(node: fx.Node) -> int:
    value = value_of(node)
    return value.dim() if isinstance(value, Tensor) else -1


def _swaps_last(node: fx.Node) -> bool:
    """Whether a node is the transpose of each matrix of a stack."""
    if node.target is getattr:
        return node.args[1:] == ("mT",)
    if not is_transpose(node) or len(node.args) != 3:
        return False
    return {d % 3 for d in node.args[1:] if isinstance(d, int)} == {1, 2}


def _sum(scope: Scope, product: _Product) -> _Sum | None:
    """What the weights are; None where they are no frozen stack, nor one with an adapter."""
    chain = strip_elementwise(scope, product.weight)
    if chain.factor != 1.0 or float(chain.dropout):
        return None
    node = chain.end
    plain = _stack(scope, node)
    if plain is not None:
        own = (node,) if isinstance(plain, PreparedStack) else ()
        return _Sum(plain, None, (*chain.nodes, *own))
    found = _added(scope, node)
    if found is None:
        return None
    base, left, right, factor, inner = found
    weight = _stack(scope, base)
    first, second = _factors(scope, left), _factors(scope, right)
    if weight is None or first is None or second is None:
        return None
    b, a = (second, first) if product.turned else (first, second)
    why = MatchRejected("the layouts of lora_A and lora_B are not PEFT's", LEAVE)
    if a.param.value.dim() != 2 or b.param.value.dim() != 2:
        raise _Refused(a.param, b.param, why)
    experts = weight.value.shape[0]
    if not a.reads(_of_a(experts, product.turned)) or not b.reads(_of_b(experts, product.turned)):
        raise _Refused(a.param, b.param, why)
    own = (base,) if isinstance(weight, PreparedStack) else ()
    nodes = (*chain.nodes, node, *inner, *a.nodes, *b.nodes, *own)
    return _Sum(weight, AdapterMatch(a.param, b.param, float(factor)), nodes)


def _stack(scope: Scope, node: fx.Node) -> Param | PreparedStack | None:
    if node.target in (STACK, STACK.default):
        code, scale, digest, _, transposed, _, spec_text = node.args
        return PreparedStack(value_of(node), code, scale, digest, transposed, spec_text)  # type: ignore[arg-type]
    param = param_of(node, scope)
    return param if param is not None and param.value.dim() == 3 else None


_Added = tuple[fx.Node, fx.Node, fx.Node, Any, tuple[fx.Node, ...]]


def _added(scope: Scope, node: fx.Node) -> _Added | None:
    """(W, left, right, factor, nodes between) of W + factor · left · right."""
    if node.target in BADDBMM or (node.op, node.target) == ("call_method", "baddbmm"):
        beta, factor = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if len(node.args) != 3 or beta != 1 or not is_number(factor):
            return None
        base, left, right = node.args
        return base, left, right, factor, ()  # type: ignore[return-value]
    term = scope.term(node)
    if not isinstance(term, Add):
        return None
    for base, delta, factor in ((term.left, term.right, term.factor), (term.right, term.left, 1.0)):
        if _stack(scope, base) is None or (base is term.right and term.factor != 1.0):
            continue
        chain = strip_elementwise(scope, delta)
        inner = chain.end
        if inner.target not in BMM | {"bmm"} or len(inner.args) != 2 or float(chain.dropout):
            continue
        left, right = inner.args
        nodes = (*chain.nodes, inner)
        return base, left, right, factor * chain.factor, nodes  # type: ignore[return-value]
    return None


@dataclass(frozen=True)
class _Factor:
    """A parameter that is read through views and casts, the last of ``nodes`` nearest to it."""

    param: Param
    nodes: tuple[fx.Node, ...]
    scope: Scope

    def reads(self, layout: Callable[[Tensor], Tensor]) -> bool:
        """Whether the views give the elements of the parameter in this order."""
        shape = tuple(self.param.value.shape)
        with without_fake_mode():
            places = torch.arange(self.param.value.numel(), dtype=torch.int32, device="cpu")
            wanted = read = places.view(shape)
            for node in reversed(self.nodes):
                if not isinstance(self.scope.term(node), Cast):
                    read = _moved(read, node)
            wanted = layout(wanted)
            return read.shape == wanted.shape and torch.equal(read, wanted)


def _moved(places: Tensor, node: fx.Node) -> Tensor:
    rest, options = node.args[1:], dict(node.kwargs)
    if node.op == "call_method":
        moved: Tensor = getattr(places, str(node.target))(*rest, **options)
        return moved
    target: Any = node.target
    return target(places, *rest, **options)  # type: ignore[no-any-return]


def _factors(scope: Scope, node: Any) -> _Factor | None:
    """The parameter behind views and casts of one operand."""
    nodes: list[fx.Node] = []
    while isinstance(node, fx.Node):
        if node.op in ("placeholder", "get_attr"):
            param = param_of(node, scope)
            ours = param is not None and isinstance(param.value, nn.Parameter)
            return _Factor(param, tuple(nodes), scope) if param is not None and ours else None
        moves = only_moves(node) and not _variable((*node.args[1:], *node.kwargs.values()))
        if not moves and not isinstance(scope.term(node), Cast):
            return None
        nodes.append(node)
        node = node.args[0]
    return None


def _variable(arguments: tuple[Any, ...]) -> bool:
    """Whether a node stands among arguments."""
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return bool(found)


def _of_a(experts: int, turned: bool) -> Callable[[Tensor], Tensor]:
    """PEFT's lora_A [E * r, in], the experts slowest, as [E, r, in] or its transposes."""

    def layout(a: Tensor) -> Tensor:
        stacked = a.reshape(experts, -1, a.shape[1])
        return stacked.transpose(1, 2) if turned else stacked

    return layout


def _of_b(experts: int, turned: bool) -> Callable[[Tensor], Tensor]:
    """PEFT's lora_B [out, r * E], the experts fastest, as [E, out, r] or its transposes."""

    def layout(b: Tensor) -> Tensor:
        return b.reshape(b.shape[0], -1, experts).permute((2, 1, 0) if turned else (2, 0, 1))

    return layout


def _complete(scope: Scope, product: _Product, total: _Sum, taken: set[fx.Node]) -> Match:
    adapter = total.adapter
    try:
        return _match(scope, product, total, taken)
    except MatchRejected as no:
        if adapter is None:
            raise
        raise _Refused(adapter.lora_a, adapter.lora_b, no) from no


def _match(scope: Scope, product: _Product, total: _Sum, taken: set[fx.Node]) -> Match:
    node, weight = product.anchor, total.weight
    if isinstance(weight, Param):
        check_base(Linear(product.x, weight, None))
        weight = Param(weight.value, weight.node, weight.name, product.turned)
    elif weight.transposed != product.turned:
        raise MatchRejected("its prepared weights are multiplied as their transposes", LEAVE)
    if adapter := total.adapter:
        _check_shapes(weight, adapter, product.turned)
    reads = casts(scope, node, product.x, taken)
    x, gathered = reads[-1], _taken(reads[-1])
    anchor = trailing_cast(scope, node)
    inside = {anchor, *product.nodes, *total.nodes}
    above = set(reads[:-1])
    rows = None
    if gathered is not None and _dims(gathered[0]) == 2 and _alone(x, inside | above):
        above.add(x)
        x, rows = gathered
    inside |= {n for n in above if _alone(n, inside | above)}
    _check_modes(scope, inside)
    check_unwritten((x, product.groups, *([rows] if rows else [])), above, inside)
    check_private(inside - {anchor}, inside, taken)
    base = Experts(x, weight, rows, product.groups, product.by_id)
    return Match(scope, anchor, frozenset(inside), x, base, (adapter,) if adapter else ())


def _alone(node: fx.Node, inside: set[fx.Node]) -> bool:
    return all(user in inside for user in node.users)


def _check_modes(scope: Scope, nodes: set[fx.Node]) -> None:
    """Gradients are on or off for all of it. Autocast is no matter: grouped products have none, and
    PEFT switches it off where it adds the adapter.
    """
    modes = {scope.mode(node) for node in nodes}
    if len({mode[0] for mode in modes}) > 1 or any(map(transformed, modes)):
        raise MatchRejected("torch.no_grad() or torch.func covers a part of it alone", LEAVE)


def _check_shapes(weight: Param | PreparedStack, adapter: AdapterMatch, turned: bool) -> None:
    experts, *sizes = weight.value.shape
    out, features = reversed(sizes) if turned else sizes
    a, b = adapter.lora_a.value.shape, adapter.lora_b.value.shape
    if (b[0], a[1]) != (out, features) or a[0] != b[1] or a[0] % experts:
        raise MatchRejected("the shapes of W, A and B don't belong together", LEAVE)
