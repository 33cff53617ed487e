"""What the matchers share: walking the data flow, and the checks that make a site safe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from falqon_fx._compat import is_dtensor, is_plain, value_of
from falqon_fx.kernels.spec import MAX_TAIL, aligned, rank_of
from falqon_fx.passes.scope import Scope
from falqon_fx.passes.terms import (
    BaseLinear,
    Cast,
    Dropout,
    Experts,
    Linear,
    Param,
    Prepared,
    Scale,
)
from falqon_fx.passes.writes import memory_of, written
from falqon_fx.site.quantized import ALREADY, REMEDY, quantized_as
from falqon_fx.site.spec import parse_spec


@dataclass(frozen=True)
class Correction:
    """What a calibration has made for a site (`falqon_fx.site.compensate`), each None without it:
    A_c [r, in] and B_c [out, r], which stand for the cast error of W, and channels [c] of x, whose
    cast error W_S [out, c] brings to the output.
    """

    error_a: Param | None = None
    error_b: Param | None = None
    channels: Param | None = None
    columns: Param | None = None

    @property
    def params(self) -> tuple[Param | None, ...]:
        return self.error_a, self.error_b, self.channels, self.columns

    def map(self, of: Callable[[Param], Param]) -> Correction:
        """The same of other parameters."""
        return Correction(*(param and of(param) for param in self.params))

    @property
    def error(self) -> tuple[Param, Param] | None:
        """A_c and B_c."""
        if self.error_a is None or self.error_b is None:
            return None
        return self.error_a, self.error_b

    @property
    def rank(self) -> int:
        """The rows of A_c."""
        return 0 if self.error_a is None else int(self.error_a.value.shape[0])

    @property
    def width(self) -> int:
        """The columns of W_S."""
        return 0 if self.columns is None else int(self.columns.value.shape[1])


NO_CORRECTION = Correction()


@dataclass(frozen=True)
class AdapterMatch:
    """s · B(A(·)) on a site. ``x`` is what A reads where that is not the site's own x (dropout).
    ``correction`` is computed with it, as more rows of A and columns of B.
    """

    lora_a: Param
    lora_b: Param
    scaling: float
    lora_bias: Param | None = None
    bias_scaling: float = 1.0  # of lora_bias: what is applied behind B
    dropout: float = 0.0
    x: fx.Node | None = None
    fixed: bool = False  # no adapter of the user's: it is A_c and B_c of a correction
    correction: Correction = NO_CORRECTION

    def takes(self, correction: Correction) -> bool:
        """Whether it can be computed with this one: A_c reads what A does, and an accumulator of
        kernels holds both.
        """
        width = correction.width
        rank = rank_of(int(self.lora_a.value.shape[0]), correction.rank, width)
        fits = aligned(rank) + aligned(width) <= MAX_TAIL
        return fits and (self.x is None or correction.error is None)


@dataclass(frozen=True)
class Match:
    """One site: ``anchor`` is the node whose value the fused op will replace. A frozen linear layer
    or stack alone has no ``adapters``.
    """

    scope: Scope
    anchor: fx.Node
    nodes: frozenset[fx.Node]  # computed inside the site; gone after the rewrite
    x: fx.Node
    base: Linear | Prepared | Experts
    adapters: tuple[AdapterMatch, ...] = ()

    @property
    def correction(self) -> Correction:
        """That of a prepared W."""
        base = self.base
        if not isinstance(base, BaseLinear):
            return NO_CORRECTION
        nodes = base.error_a, base.error_b, base.channels, base.columns
        return Correction(
            *(None if n is None else Param(value_of(self.scope.outer(n)), n) for n in nodes)
        )

    @property
    def added(self) -> tuple[AdapterMatch, ...]:
        """The adapters, one of them with the correction of W; one more for it where none reads
        what W reads, or has room, or where one scale of A and A_c would have to do for both.
        """
        own, adapters = self.correction, self.adapters
        apart = own.error and not self._per_row
        takes = [j for j, a in enumerate(adapters) if not apart and a.takes(own)]
        if own == NO_CORRECTION or not (takes or own.error):
            return adapters
        if takes:
            j = takes[-1]
            return (*adapters[:j], replace(adapters[j], correction=own), *adapters[j + 1 :])
        assert own.error is not None
        behind = replace(own, error_a=None, error_b=None)
        return (*adapters, AdapterMatch(*own.error, 1.0, fixed=True, correction=behind))

    @property
    def _per_row(self) -> bool:
        """Whether each row of a prepared W and of A has a scale of its own."""
        return isinstance(self.base, BaseLinear) and parse_spec(self.base.spec_text).per_row

    @property
    def alone(self) -> tuple[Param, Param] | None:
        """Channels and W_S that no adapter takes."""
        own = self.correction
        if own.channels is None or own.columns is None:
            return None
        taken = any(adapter.correction.columns for adapter in self.added)
        return None if taken else (own.channels, own.columns)


@dataclass(frozen=True)
class RejectedMatch:
    """A LoRA-like pair B(A(·)) that stays as it is. ``torn``: a part of it is in another graph."""

    scope: Scope
    lora_a: Param
    lora_b: Param
    reason: str
    remedy: str
    torn: bool = False


@dataclass(frozen=True)
class Chain:
    """What lies between two points of the data flow, with the nodes passed on the way."""

    end: fx.Node
    factor: float
    dropout: float
    nodes: tuple[fx.Node, ...]


class MatchRejected(Exception):
    """Why something is not a site, and what the user can do about it."""

    def __init__(self, reason: str, remedy: str, torn: bool = False) -> None:
        self.reason, self.remedy, self.torn = reason, remedy, torn


LEAVE = "The layer runs unmerged, as it was"
UNQUANTIZED = "Use an unquantized nn.Linear as base"
_STEPS = 16  # nodes between a weight that others have quantized and the output of its layer


def strip_elementwise(scope: Scope, node: fx.Node, until: tuple[fx.Node, ...] = ()) -> Chain:
    """Go down through casts, scalings and dropouts."""
    factor, dropout = 1.0, 0.0
    nodes: list[fx.Node] = []
    while True:
        term = scope.term(node)
        if node in until or not isinstance(term, Scale | Dropout | Cast):
            return Chain(node, factor, dropout, tuple(nodes))
        if isinstance(term, Scale):
            factor *= term.factor
        elif isinstance(term, Dropout):
            dropout = either(dropout, term.p)
        nodes.append(node)
        node = term.x


def either(p: float, q: float) -> float:
    """The probability that one of two dropouts strikes."""
    return p + q - p * q


def check_base(base: Linear) -> None:
    """Refuse base weights that can't be merged."""
    value = base.weight.value
    if (kind := quantized_as(value)) is not None:
        raise MatchRejected(ALREADY.format(kind), REMEDY)
    if not is_plain(value) and not is_dtensor(value):  # plan refuses sharded ones by name
        raise MatchRejected(f"the base weight is a {type(value).__name__}", UNQUANTIZED)
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise MatchRejected(f"the base weight is in {value.dtype}", UNQUANTIZED)
    if value.requires_grad:
        raise MatchRejected(
            "the base weight is trained too",
            "Freeze it (requires_grad_(False)): an FP8 base is constant",
        )


def quantized_below(scope: Scope, node: fx.Node, until: Collection[fx.Node]) -> str | None:
    """What the nearest weight is quantized as from which ``node`` is computed, None where none is;
    ``until`` are x and what it is read through.
    """
    nodes, seen = [node], {*until}
    for _ in range(_STEPS):
        if not nodes or (node := nodes.pop(0)) in seen:
            continue
        seen.add(node)
        outer = scope.outer(node)
        value = value_of(outer)
        if outer.op in ("placeholder", "get_attr") and isinstance(value, Tensor):
            kind = quantized_as(value)
            if kind is not None:
                return kind
        nodes += node.all_input_nodes
    return None


def casts(scope: Scope, reader: fx.Node, x: fx.Node, taken: set[fx.Node]) -> tuple[fx.Node, ...]:
    """What ``reader`` reads and what that is a cast of, down to the first that is none, is another
    site's or was made in another mode: a cast under ``no_grad`` cuts the gradient off.
    """
    nodes, mode = [x], scope.mode(reader)
    while isinstance(term := scope.term(nodes[-1]), Cast):
        if nodes[-1] in taken or scope.mode(nodes[-1]) != mode:
            break
        nodes.append(term.x)
    return tuple(nodes)


def check_mode(scope: Scope, nodes: Iterable[fx.Node]) -> None:
    """Refuse what is computed partly under ``no_grad``, partly not, or under autocast."""
    if len({scope.mode(node) for node in nodes}) > 1:
        raise MatchRejected(
            "torch.no_grad() or torch.autocast() covers a part of it alone; one op has one mode",
            "Compute the base layer and its adapter in the same mode",
        )


def trailing_cast(scope: Scope, add: fx.Node) -> fx.Node:
    """The cast of the sum, where it is the sum's only use: the fused op writes that dtype.

    Not a wider one, for which the original rounds first.
    """
    if len(add.users) == 1:
        (user,) = add.users
        same = scope.mode(user) == scope.mode(add)
        if same and isinstance(scope.term(user), Cast) and not _widens(add, user):
            return user
    return add


def _widens(node: fx.Node, cast: fx.Node) -> bool:
    before, after = value_of(node), value_of(cast)
    return before is not None and after.dtype.itemsize > before.dtype.itemsize


def exclusive(nodes: tuple[fx.Node, ...], inside: set[fx.Node]) -> set[fx.Node]:
    """The casts and dropouts above x that serve this site alone."""
    own: set[fx.Node] = set()
    for node in nodes:
        if not all(user in inside or user in own for user in node.users):
            break
        own.add(node)
    return own


def check_unwritten(
    read: Iterable[fx.Node], above: Iterable[fx.Node], inside: set[fx.Node]
) -> None:
    """The fused op reads x and biases where the site ends: they must still be what the site's nodes
    have ``read``, and those ``above`` it, from x on.
    """
    above, memory = set(above), memory_of(read)
    node, last = min(inside | above), max(inside)
    while node is not last:
        targets = written(node)
        if targets and (node in above or memory & memory_of(targets)):
            raise MatchRejected("its input is written in place meanwhile", LEAVE)
        node = node.next


def nodes_of(bias: Param | fx.Node | None) -> tuple[fx.Node, ...]:
    """The node that a bias is read from; a module's own has none."""
    node = bias.node if isinstance(bias, Param) else bias
    return () if node is None else (node,)


def check_private(nodes: set[fx.Node], inside: set[fx.Node], taken: set[fx.Node]) -> None:
    """Refuse a site whose inner values serve something else too."""
    for node in nodes:
        if node in taken:
            raise MatchRejected("the base layer already belongs to another adapter's site", LEAVE)
        for user in node.users:
            if user not in inside:
                raise MatchRejected(
                    f"its intermediate value {node.name} is also used by {user.name}", LEAVE
                )


def shape(param: Param) -> tuple[int, int]:
    """[out, in] of a weight as it is used."""
    first, second = param.value.shape
    return (second, first) if param.transposed else (first, second)
