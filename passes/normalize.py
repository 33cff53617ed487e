"""Pass 1: read a graph as terms, whatever its spelling.

``F.linear``, ``nn.Linear``, ``x @ W.T``, ``addmm`` and their ATen forms read as `Linear`; casts,
dropouts, scalings and adds likewise. The graph itself is not edited: what is not matched later
stays exactly as it was. `Scope` carries this through the bodies of activation checkpoints, and
follows a body's placeholder to the operand that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from falqon_fx._compat import (
    checkpoint_bodies,
    same_sizes,
    value_of,
)
from falqon_fx.passes.modes import Mode, modes
from falqon_fx.passes.propagate import propagate
from falqon_fx.passes.terms import (
    Add,
    AddLinear,
    BaseLinear,
    Cast,
    Dropout,
    Linear,
    Param,
    RowsBaseLinear,
    Scale,
    Term,
    UnsupportedAdapted,
)
from falqon_fx.passes.vocabulary import (
    ADD,
    ADDMM,
    CAST_METHODS,
    CASTS,
    DIV,
    DROPOUT,
    EINSUM,
    LINEAR,
    MATMUL,
    METHODS,
    MUL,
    OPERANDS,
    OTHER,
    OTHER_MODULES,
    ROUNDING,
    TRANSPOSE,
    TRANSPOSE_DIMS,
    VIEW_METHODS,
    VIEWS,
)


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
    _modes: dict[fx.Node, Mode] = field(default_factory=dict)

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

    def mode(self, node: fx.Node) -> Mode:
        """What torch switches on where a node stands; a checkpoint's body runs in those of its
        call. As the graph was when this was first asked.
        """
        if not self._modes:
            around = () if self.parent is None or self.call is None else self.parent.mode(self.call)
            self._modes = {n: (*around, *mode) for n, mode in modes(self.gm.graph).items()}
        return self._modes[node]

    def is_part(self, node: fx.Node) -> bool:
        """Whether a product is a part of another node's: a bias or a view is still to come."""
        terms = [self.term(user) for user in node.users]
        return any(isinstance(term, Linear) and node in term.parts for term in terms)

    def add_input(self, name: str) -> fx.Node:
        """A new placeholder behind all others."""
        graph = self.gm.graph
        with self.after_inputs():
            self.last_input = graph.placeholder(name)
        # The generated code assigns names to other targets one after the other, which may overlap.
        self.last_input.target = self.last_input.name
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
        propagate(gm, example_inputs)
    return _scope(gm, None, None)


def _scope(gm: fx.GraphModule, parent: Scope | None, call: fx.Node | None) -> Scope:
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    scope = Scope(gm, parent, call, last_input=inputs[-1] if inputs else None)
    if call is not None:
        scope.operands = dict(zip(inputs, call.args[1:], strict=True))  # type: ignore[arg-type]
    for node, _, body in checkpoint_bodies(gm):
        scope.children.append(_scope(body, scope, node))
    return scope


def _read(node: fx.Node, scope: Scope) -> Term:
    if is_view(node):
        return _linear_between_views(node, scope)
    if node.op == "call_module":
        return _read_module(node, scope)
    if node.op == "call_method":
        return _read_method(node, scope)
    if node.op == "call_function" and node.target in CASTS:
        x = node.args[0]
        return Cast(x) if isinstance(x, fx.Node) and _casts_only(node, x) else None
    if node.op == "call_function":
        return _read_call(node.target, node.args, dict(node.kwargs), scope)
    return None


def _read_module(node: fx.Node, scope: Scope) -> Term:
    module: Any = scope.gm.get_submodule(str(node.target))
    (x,) = node.args if len(node.args) == 1 else (None,)
    if not isinstance(x, fx.Node) or node.kwargs:
        return None
    if type(module) is nn.Linear:
        bias = None if module.bias is None else Param(module.bias, name=f"{node.target}.bias")
        return Linear(x, Param(module.weight, name=f"{node.target}.weight"), bias)
    if type(module) in OTHER_MODULES:
        weight = Param(module.weight, name=f"{node.target}.weight")
        return UnsupportedAdapted(x, weight, OTHER_MODULES[type(module)])
    if isinstance(module, nn.Dropout):
        return Dropout(x, module.p if module.training else 0.0)
    if isinstance(module, nn.Identity):
        return Cast(x)
    return None


def _read_method(node: fx.Node, scope: Scope) -> Term:
    name = str(node.target)
    if name in METHODS:
        return _read_call(METHODS[name], node.args, dict(node.kwargs), scope)
    x = node.args[0]
    if not isinstance(x, fx.Node):
        return None
    if name in ("to", "type", "type_as", *CAST_METHODS) and _casts_only(node, x):
        return Cast(x)
    return Cast(x) if name == "contiguous" and len(node.args) == 1 else None


def _casts_only(node: fx.Node, x: fx.Node) -> bool:
    """Whether a ``.to`` keeps the device, and the value up to the rounding of 16 bits or more.

    A cast to FP8 or to integers is a quantization of the user's own.
    """
    before, after = value_of(x), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.device == after.device and {before.dtype, after.dtype} <= ROUNDING


def _read_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scope: Scope) -> Term:
    if target in (torch.ops.falqon.base_linear.default, torch.ops.falqon.base_linear):
        return BaseLinear(*args)
    if target in (torch.ops.falqon.rows_base_linear.default, torch.ops.falqon.rows_base_linear):
        return RowsBaseLinear(args[0], tuple(args[1:6]), args[6], as_number(args[7]), args[8])
    if target in LINEAR:
        return _linear(args, kwargs, scope)
    if target in OTHER:
        return _other(OTHER[target], args[0], args[1], scope) if len(args) > 1 else None
    if target in EINSUM:
        return _einsum(args, scope)
    args = (*args, *(kwargs.pop(name) for name in OPERANDS if name in kwargs))
    if target in MATMUL and len(args) == 2:
        return _matmul(args[0], args[1], None, scope)
    if target in ADDMM and len(args) == 3:
        return _addmm(*args, kwargs, scope)
    if target in ADD and are_nodes(args[:2]):
        factor = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        if not _is_number(factor):
            return None
        plain = _add_bias(args[0], args[1], scope) or _add_bias(args[1], args[0], scope)
        return plain if plain and factor == 1 else Add(args[0], args[1], float(factor))
    if target in MUL and len(args) == 2 and not kwargs:
        for node, factor in (args, args[::-1]):
            if isinstance(node, fx.Node) and (number := as_number(factor)) is not None:
                return Scale(node, number)
        return None
    if target in DIV and len(args) == 2 and not kwargs and isinstance(args[0], fx.Node):
        divisor = as_number(args[1])
        return Scale(args[0], 1.0 / divisor) if divisor is not None and args[1] != 0 else None
    if target in DROPOUT:
        p = as_number(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        inplace = kwargs.get("inplace", args[3] if len(args) > 3 else False)
        return None if inplace or p is None else Dropout(args[0], p if training else 0.0)
    return None


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any], scope: Scope) -> Term:
    names = ("input", "weight", "bias")
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    x, weight, bias = (bound.get(name) for name in names)
    return _on_parameters(x, weight, bias, scope)


def _matmul(x: Any, weight: Any, bias: Any, scope: Scope) -> Term:
    found = _on_parameters(x, weight, bias, scope)
    if found is None or (found.bias is not None and found.bias.value.dim() != 1):
        return None
    w = found.weight
    flipped = Param(w.value, w.node, w.name, not w.transposed)  # x @ M is a Linear with W = Mᵀ
    return Linear(found.x, flipped, found.bias)


def _einsum(args: tuple[Any, ...], scope: Scope) -> Term:
    """``einsum("...i,oi->...o", x, W)``, its operands and the dimensions of W in either order."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    left, arrow, result = str(equation).replace(" ", "").partition("->")
    names = left.split(",")
    if not arrow or len(names) != 2 or len(operands) != 2:
        return None
    for (x_dims, x), (w_dims, weight) in (zip(names, operands), reversed([*zip(names, operands)])):
        lead, contracted = x_dims[:-1], x_dims[-1:]
        if len(w_dims) != 2 or contracted not in w_dims or len(set(w_dims)) != 2:
            continue
        out = w_dims.replace(contracted, "")
        if result != lead + out or out in x_dims or contracted in lead or out == ".":
            continue
        if found := _on_parameters(x, weight, None, scope):
            w = found.weight
            stored = w.transposed != (w_dims[0] == contracted)
            return Linear(found.x, Param(w.value, w.node, w.name, stored), None)
    return None


def _on_parameters(x: Any, weight: Any, bias: Any, scope: Scope) -> Linear | None:
    """x · Wᵀ + bias, where W and the bias are leaves of the graph."""
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


def _other(kind: str, first: Any, second: Any, scope: Scope) -> UnsupportedAdapted | None:
    x, weight = (second, first) if param_of(first, scope) else (first, second)
    w = param_of(weight, scope)
    return UnsupportedAdapted(x, w, kind) if isinstance(x, fx.Node) and w else None


def _addmm(left: Any, x: Any, weight: Any, kwargs: dict[str, Any], scope: Scope) -> Term:
    beta, factor = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if not _is_number(beta) or not _is_number(factor):
        return None
    if beta == factor == 1 and param_of(left, scope):
        return _matmul(x, weight, left, scope)
    product = _matmul(x, weight, None, scope)
    if not isinstance(product, Linear) or not isinstance(left, fx.Node):
        return None
    return AddLinear(left, product.x, product.weight, float(beta), float(factor))


def _add_bias(product: fx.Node, bias: fx.Node, scope: Scope) -> Linear | None:
    """``x @ W.T + bias`` as one linear."""
    b = param_of(bias, scope)
    if b is None or b.value.dim() != 1:
        return None
    linear = scope.term(product)
    if not isinstance(linear, Linear) or linear.bias is not None or len(product.users) != 1:
        return None
    return Linear(linear.x, linear.weight, b, (product,))


def _linear_between_views(node: fx.Node, scope: Scope) -> Linear | None:
    """``(x.view(-1, in) @ W.T).view(*x.shape[:-1], out)`` as one linear on x."""
    inner = node.args[0]
    linear = scope.term(inner) if isinstance(inner, fx.Node) else None
    if not isinstance(linear, Linear) or not isinstance(inner, fx.Node) or not is_view(linear.x):
        return None
    x = linear.x.args[0]
    given, flat = value_of(x), value_of(linear.x)  # type: ignore[arg-type]
    product, result = value_of(inner), value_of(node)
    if not all(isinstance(v, Tensor) and v.dim() > 0 for v in (given, flat, product, result)):
        return None
    # A view that keeps the last dimension only groups the tokens in another way.
    kept = same_sizes(given.shape[-1:], flat.shape[-1:])
    if not kept or not same_sizes(result.shape, (*given.shape[:-1], product.shape[-1])):
        return None
    parts = (*linear.parts, inner, linear.x)
    return Linear(x, linear.weight, linear.bias, parts)  # type: ignore[arg-type]


def is_view(node: fx.Node) -> bool:
    """Whether a node gives a tensor another shape and nothing else."""
    if node.op == "call_method":
        return node.target in VIEW_METHODS and len(node.args) > 0
    return node.op == "call_function" and node.target in VIEWS and len(node.args) > 0


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
    if is_transpose(node):
        inner = param_of(node.args[0], scope)
        return inner and Param(inner.value, inner.node, inner.name, not inner.transposed)
    return None


def attribute(gm: fx.GraphModule, name: str) -> Any:
    """What a get_attr node with this target reads."""
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value


def is_transpose(node: fx.Node) -> bool:
    """Whether a node is the transpose of a matrix."""
    target: Any = METHODS.get(str(node.target)) if node.op == "call_method" else node.target
    if target in TRANSPOSE:
        return True
    if target is getattr and node.args[1:] in (("T",), ("mT",)):
        return True
    if target in TRANSPOSE_DIMS and len(node.args) == 3:
        return {d % 2 for d in node.args[1:] if isinstance(d, int)} == {0, 1}
    return False


def as_number(value: object) -> Any:
    """A number as a float; one that varies between calls as a SymFloat, which `float` pins."""
    if isinstance(value, fx.Node) and isinstance(value_of(value), torch.SymFloat):
        return value_of(value)
    return float(value) if _is_number(value) else None  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def are_nodes(values: Sequence[object]) -> bool:
    """Whether all are nodes, of one at least."""
    return len(values) > 0 and all(isinstance(v, fx.Node) for v in values)
