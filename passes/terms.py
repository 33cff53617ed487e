"""What a node can mean to the passes, whatever its spelling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx


@dataclass(frozen=True)
class Param:
    """A leaf tensor: a placeholder or get_attr ``node``, or the attribute ``name`` of a module that
    is still called as a module. ``transposed`` where the graph uses its transpose.
    """

    value: Tensor
    node: fx.Node | None = None
    name: str | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Linear:
    """x · Wᵀ + bias; ``parts`` are nodes of its own, where the bias is added apart."""

    x: fx.Node
    weight: Param
    bias: Param | None
    parts: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class AddLinear:
    """beta · left + factor · x · Wᵀ: ``addmm`` onto a computed value."""

    left: fx.Node
    x: fx.Node
    weight: Param
    beta: float
    factor: float


@dataclass(frozen=True)
class BaseLinear:
    """A prepared base layer (``falqon::base_linear``): the nodes of its bytes, scale and digest,
    and of what a calibration has added to it.
    """

    x: fx.Node
    code: fx.Node
    scale: fx.Node
    digest: fx.Node
    bias: fx.Node | None
    spec_text: str
    error_a: fx.Node | None = None
    error_b: fx.Node | None = None
    channels: fx.Node | None = None
    columns: fx.Node | None = None


@dataclass(frozen=True)
class RowsBaseLinear:
    """The same with update="rows" (``falqon::rows_base_linear``); ``state`` are its five nodes."""

    x: fx.Node
    state: tuple[fx.Node, ...]
    bias: fx.Node | None
    scaling: float
    spec_text: str


Prepared = BaseLinear | RowsBaseLinear


@dataclass(frozen=True)
class PreparedStack:
    """Stacked weights that `prepare` has put in FP8 (``falqon::stacked_weight``): ``value`` as they
    are read, and the nodes of bytes, scale and digest.
    """

    value: Tensor
    code: fx.Node
    scale: fx.Node
    digest: fx.Node
    transposed: bool
    spec_text: str


@dataclass(frozen=True)
class Experts:
    """Rows of x times the weights of their experts, W [E, out, in] (``transposed``: [E, in, out]).

    Attributes:
        weight: a parameter, or a prepared stack.
        rows: the row of x that each row of the product reads; None where that is its own.
        groups: the offsets of rows that are sorted by expert, or with ``by_id`` the expert of each.
    """

    x: fx.Node
    weight: Param | PreparedStack
    rows: fx.Node | None
    groups: fx.Node
    by_id: bool
    bias: None = None

    @property
    def experts(self) -> int:
        return int(self.weight.value.shape[0])

    @property
    def prepared(self) -> PreparedStack | None:
        return self.weight if isinstance(self.weight, PreparedStack) else None


def in_fp8(base: object) -> BaseLinear | PreparedStack | None:
    """The bytes that a base of a match already is, as `prepare` makes them."""
    if isinstance(base, Experts):
        return base.prepared
    return base if isinstance(base, BaseLinear) else None


@dataclass(frozen=True)
class Add:
    """left + factor · right."""

    left: fx.Node
    right: fx.Node
    factor: float = 1.0


@dataclass(frozen=True)
class Scale:
    """factor · x; with dynamic=True the factor is a SymFloat until a match pins it."""

    x: fx.Node
    factor: float


@dataclass(frozen=True)
class Cast:
    """x in another dtype (or in the same)."""

    x: fx.Node


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability ``p`` (0 in evaluation); a SymFloat where that is an input."""

    x: fx.Node
    p: float


@dataclass(frozen=True)
class UnsupportedAdapted:
    """An embedding or a convolution with ``weight``: what LoRA is also put on, but no linear."""

    x: fx.Node
    weight: Param
    kind: str


Term = (
    Linear
    | AddLinear
    | UnsupportedAdapted
    | BaseLinear
    | RowsBaseLinear
    | Add
    | Scale
    | Cast
    | Dropout
    | None
)
