"""Pass 1: read a graph as terms, whatever its spelling.

``F.linear``, ``nn.Linear``, ``x @ W.T``, ``addmm`` and their ATen forms read as `Linear`; casts,
dropouts, scalings and adds likewise. The graph itself is not edited: what is not matched later
stays exactly as it was. `Scope` carries this through the bodies of activation checkpoints, and
follows a body's placeholder to the operand that it stands for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from falqon_fx._compat import checkpoint_bodies, fake_mode_of

aten = torch.ops.aten


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
    """x · Wᵀ + bias."""

    x: fx.Node
    weight: Param
    bias: Param | None


@dataclass(frozen=True)
class BaseLinear:
    """The base layer of a prepared site (``falqon::base_linear``); ``state`` are its five nodes."""

    x: fx.Node
    state: tuple[fx.Node, ...]
    bias: fx.Node | None
    scaling: float
    spec: str


@dataclass(frozen=True)
class Add:
    """left + factor · right."""

    left: fx.Node
    right: fx.Node
    factor: float = 1.0


@dataclass(frozen=True)
class Scale:
    """factor · x."""

    x: fx.Node
    factor: float


@dataclass(frozen=True)
class Cast:
    """x in another dtype (or in the same)."""

    x: fx.Node


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability ``p`` (0 in evaluation)."""

    x: fx.Node
    p: float


Term = Linear | BaseLinear | Add | Scale | Cast | Dropout | None

_LINEAR = {F.linear, torch._C._nn.linear, aten.linear.default}
_MATMUL = {torch.matmul, operator.matmul, aten.matmul.default, aten.mm.default, torch.mm}
_ADDMM = {torch.addmm, aten.addmm.default}
_ADD = {torch.add, operator.add, operator.iadd, aten.add.Tensor, aten.add_.Tensor}
_MUL = {torch.mul, operator.mul, operator.imul, aten.mul.Tensor, aten.mul.Scalar, torch.multiply}
_DIV = {torch.div, operator.truediv, operator.itruediv, aten.div.Tensor, aten.div.Scalar}
_DROPOUT = {F.dropout, torch.dropout, aten.dropout.default}
_TRANSPOSE = {torch.t, aten.t.default}
_TRANSPOSE_DIMS = {torch.transpose, aten.transpose.int}
_CAST_METHODS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
_METHODS: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "add_": torch.add,
    "mul": torch.mul,
    "mul_": torch.mul,
    "div": torch.div,
    "matmul": torch.matmul,
    "mm": torch.mm,
    "t": torch.t,
    "transpose": torch.transpose,
}


@dataclass
class Scope:
    """One graph: the root, or the body of a checkpoint called by ``call`` in ``parent``."""

    gm: fx.GraphModule
    parent: Scope | None = None
    call: fx.Node | None = None
    children: list[Scope] = field(default_factory=list)
    operands: dict[fx.Node, fx.Node] = field(default_factory=dict)  # placeholder -> parent's node
    last_input: fx.Node | None = None  # new placeholders go behind it
    _terms: dict[fx.Node, Term] = field(default_factory=dict)

    @property
    def root(self) -> Scope:
        return self if self.parent is None else self.parent.root

    def walk(self) -> Iterator[Scope]:
        """This scope and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()

    def term(self, node: fx.Node) -> Term:
        """What a node computes, or None where no pass needs to know."""
        if node not in self._terms:
            self._terms[node] = _read(node, self)
        return self._terms[node]

    def add_input(self, name: str) -> fx.Node:
        """A new placeholder behind all others."""
        graph = self.gm.graph
        with self.after_inputs():
            self.last_input = graph.placeholder(name)
        return self.last_input

    def after_inputs(self) -> AbstractContextManager[None]:
        """Insert behind the last placeholder, before everything that is computed."""
        graph = self.gm.graph
        if self.last_input is None:
            return graph.inserting_before(next(iter(graph.nodes)))
        return graph.inserting_after(self.last_input)

    def outer(self, node: fx.Node) -> fx.Node:
        """The root graph's node that a body's placeholder stands for; other nodes as they are."""
        scope: Scope | None = self
        while scope is not None and node in scope.operands:
            node, scope = scope.operands[node], scope.parent
        return node


def normalize(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Scope:
    """The scopes of a graph; fills in missing values (shapes, dtypes) by fake propagation."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    if any(value_of(n) is None for n in placeholders) or not placeholders:
        _propagate(gm, example_inputs)
    return _scope(gm, None, None)


def value_of(node: fx.Node) -> Any:
    """A node's fake value, from Dynamo (example_value) or fake propagation and export (val)."""
    return node.meta.get("example_value", node.meta.get("val"))


def _propagate(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = fake_mode_of(example_inputs) or FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(gm, mode).propagate(*example_inputs)


def _scope(gm: fx.GraphModule, parent: Scope | None, call: fx.Node | None) -> Scope:
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    scope = Scope(gm, parent, call, last_input=inputs[-1] if inputs else None)
    if call is not None:
        scope.operands = dict(zip(inputs, call.args[1:], strict=True))  # type: ignore[arg-type]
    for node, _, body in checkpoint_bodies(gm):
        scope.children.append(_scope(body, scope, node))
    return scope


def _read(node: fx.Node, scope: Scope) -> Term:
    if node.op == "call_module":
        return _read_module(node, scope)
    if node.op == "call_method":
        return _read_method(node, scope)
    if node.op == "call_function":
        return _read_call(node.target, node.args, dict(node.kwargs), scope)
    return None


def _read_module(node: fx.Node, scope: Scope) -> Term:
    module = scope.gm.get_submodule(str(node.target))
    (x,) = node.args if len(node.args) == 1 else (None,)
    if not isinstance(x, fx.Node) or node.kwargs:
        return None
    if type(module) is nn.Linear:
        bias = None if module.bias is None else Param(module.bias, name=f"{node.target}.bias")
        return Linear(x, Param(module.weight, name=f"{node.target}.weight"), bias)
    if isinstance(module, nn.Dropout):
        return Dropout(x, module.p if module.training else 0.0)
    if isinstance(module, nn.Identity):
        return Cast(x)
    return None


def _read_method(node: fx.Node, scope: Scope) -> Term:
    name = str(node.target)
    if name in _METHODS:
        return _read_call(_METHODS[name], node.args, dict(node.kwargs), scope)
    x = node.args[0]
    if not isinstance(x, fx.Node):
        return None
    if name in _CAST_METHODS and len(node.args) == 1 and not node.kwargs:
        return Cast(x)
    if name in ("to", "type") and _casts_only(node):
        return Cast(x)
    return Cast(x) if name == "contiguous" and len(node.args) == 1 else None


def _casts_only(node: fx.Node) -> bool:
    """Whether a ``.to`` keeps the device: only dtypes among its arguments."""
    rest = [*node.args[1:], *node.kwargs.values()]
    return bool(rest) and all(isinstance(a, torch.dtype | bool) for a in rest)


def _read_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scope: Scope) -> Term:
    if target is torch.ops.falqon.base_linear.default or target is torch.ops.falqon.base_linear:
        return BaseLinear(args[0], tuple(args[1:6]), args[6], args[7], args[8])
    if target in _LINEAR:
        return _linear(args, kwargs, scope)
    if target in _MATMUL and len(args) == 2:
        return _matmul(args[0], args[1], None, scope)
    if target in _ADDMM and len(args) == 3 and not kwargs:
        return _matmul(args[1], args[2], args[0], scope)
    if target in _ADD and _are_nodes(args[:2]):
        factor = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        return Add(args[0], args[1], float(factor)) if _is_number(factor) else None
    if target in _MUL and len(args) == 2 and not kwargs:
        node, factor = args if isinstance(args[0], fx.Node) else args[::-1]
        return Scale(node, float(factor)) if _is_number(factor) and _are_nodes([node]) else None
    if target in _DIV and len(args) == 2 and not kwargs and isinstance(args[0], fx.Node):
        return Scale(args[0], 1.0 / args[1]) if _is_number(args[1]) and args[1] else None
    if target in _DROPOUT:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        return Dropout(args[0], float(p) if training else 0.0)
    if target in (
        aten.to.dtype,
        aten._to_copy.default,
        torch.ops.prims.convert_element_type.default,
    ):
        extra = {k: v for k, v in kwargs.items() if k != "dtype" and v is not None}
        return None if extra else Cast(args[0])
    return None


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any], scope: Scope) -> Term:
    names = ("input", "weight", "bias")
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    x, weight, bias = (bound.get(name) for name in names)
    w = param_of(weight, scope)
    b = None if bias is None else param_of(bias, scope)
    if (
        not isinstance(x, fx.Node)
        or w is None
        or w.value.dim() != 2
        or (bias is not None and not b)
    ):
        return None
    return Linear(x, w, b)


def _matmul(x: Any, weight: Any, bias: Any, scope: Scope) -> Term:
    w = param_of(weight, scope)
    b = None if bias is None else param_of(bias, scope)
    if (
        not isinstance(x, fx.Node)
        or w is None
        or w.value.dim() != 2
        or (bias is not None and not b)
    ):
        return None
    if b is not None and b.value.dim() != 1:
        return None
    flipped = Param(w.value, w.node, w.name, not w.transposed)  # x @ M is a Linear with W = Mᵀ
    return Linear(x, flipped, b)


def param_of(node: Any, scope: Scope) -> Param | None:
    """The leaf tensor that a node is, or is the 2-D transpose of; None for computed values."""
    if not isinstance(node, fx.Node):
        return None
    if node.op in ("placeholder", "get_attr"):
        outer = scope.outer(node)
        value = value_of(outer)
        if outer.op == "get_attr":
            value = attribute(scope.root.gm, str(outer.target))
        elif outer.op != "placeholder" or not isinstance(value, nn.Parameter):
            return None
        return Param(value, node) if isinstance(value, Tensor) else None
    if _is_transpose(node):
        inner = param_of(node.args[0], scope)
        return inner and Param(inner.value, inner.node, inner.name, not inner.transposed)
    return None


def attribute(gm: fx.GraphModule, name: str) -> Any:
    """What a get_attr node with this target reads."""
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _is_transpose(node: fx.Node) -> bool:
    target: Any = _METHODS.get(str(node.target)) if node.op == "call_method" else node.target
    if target in _TRANSPOSE:
        return True
    if target is getattr and node.args[1:] in (("T",), ("mT",)):
        return True
    if target in _TRANSPOSE_DIMS and len(node.args) == 3:
        return {d % 2 for d in node.args[1:] if isinstance(d, int)} == {0, 1}
    return False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_nodes(values: Sequence[object]) -> bool:
    return len(values) > 0 and all(isinstance(v, fx.Node) for v in values)
