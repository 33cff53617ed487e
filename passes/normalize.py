"""Read a graph as terms, whatever its spelling.

``F.linear``, ``nn.Linear``, ``x @ W.T``, ``addmm`` and their ATen forms read as `Linear`; casts,
dropouts, scalings and adds likewise. The graph itself is not edited: what is not matched later
stays exactly as it was. `Scope` carries this through the bodies of activation checkpoints, and
follows a body's placeholder to the operand that it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from falqon_fx._compat import checkpoint_bodies, same_sizes, value_of
from falqon_fx.passes.dialects import read_call
from falqon_fx.passes.propagate import propagate
from falqon_fx.passes.scope import Scope, is_view
from falqon_fx.passes.terms import Cast, Dropout, Linear, Param, Term, UnsupportedAdapted
from falqon_fx.passes.vocabulary import CAST_METHODS, CASTS, METHODS, OTHER_MODULES, ROUNDING


def normalize(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Scope:
    """The scopes of a graph; fills in missing values (shapes, dtypes) by fake propagation."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    if any(value_of(n) is None for n in placeholders) or not placeholders:
        propagate(gm, example_inputs)
    return _scope(gm, None, None)


def _scope(gm: fx.GraphModule, parent: Scope | None, call: fx.Node | None) -> Scope:
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    scope = Scope(gm, _read, parent, call, last_input=inputs[-1] if inputs else None)
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
        return read_call(node.target, node.args, dict(node.kwargs), scope)
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
        return read_call(METHODS[name], node.args, dict(node.kwargs), scope)
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
