"""The dialects: how calls are spelled, and the reader of each.

A new one is a reader and an entry of a table at the end (docs/guides/add-a-dialect.md).

A reader takes the arguments, the operands among the keywords (`OPERANDS`) already in their places,
and says what the call means; None where no pass needs to know.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx

from falqon_fx.ops import base_linear
from falqon_fx.passes.scope import Scope, are_nodes, as_number, is_number, param_of
from falqon_fx.passes.terms import (
    Add,
    AddLinear,
    BaseLinear,
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
    DIV,
    DROPOUT,
    EINSUM,
    LINEAR,
    MATMUL,
    MUL,
    OPERANDS,
    OTHER,
)
from falqon_fx.rows import ops as rows

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def read_call(target: Any, args: Args, kwargs: Kwargs, scope: Scope) -> Term:
    """What a call of ``target`` means."""
    read = READERS.get(target)
    operands = [kwargs.pop(name) for name in OPERANDS if name in kwargs]
    return read((*args, *operands), kwargs, scope) if read else None


def on_parameters(x: Any, weight: Any, bias: Any, scope: Scope) -> Linear | None:
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


def flipped(found: Linear) -> Linear:
    """The same with the transpose of its weight: x @ M is a Linear with W = Mᵀ."""
    w = found.weight
    return Linear(found.x, Param(w.value, w.node, w.name, not w.transposed), found.bias)


def _linear(args: Args, kwargs: Kwargs, scope: Scope) -> Term:
    names = ("input", "weight", "bias")
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    return on_parameters(bound.get("input"), bound.get("weight"), bound.get("bias"), scope)


def _matmul(args: Args, kwargs: Kwargs, scope: Scope) -> Term:
    return _product(args[0], args[1], None, scope) if len(args) == 2 else None


def _product(x: Any, weight: Any, bias: Any, scope: Scope) -> Linear | None:
    """x @ M + bias."""
    found = on_parameters(x, weight, bias, scope)
    if found is None or (found.bias is not None and found.bias.value.dim() != 1):
        return None
    return flipped(found)


def _addmm(args: Args, kwargs: Kwargs, scope: Scope) -> Term:
    beta, factor = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if len(args) != 3 or not is_number(beta) or not is_number(factor):
        return None
    left, x, weight = args
    if beta == factor == 1 and param_of(left, scope):
        return _product(x, weight, left, scope)
    product = _product(x, weight, None, scope)
    if product is None or not isinstance(left, fx.Node):
        return None
    return AddLinear(left, product.x, product.weight, float(beta), float(factor))


def _einsum(args: Args, kwargs: Kwargs, scope: Scope) -> Term:
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
        if found := on_parameters(x, weight, None, scope):
            return flipped(found) if w_dims[0] == contracted else found
    return None


def _other(kind: str, args: Args, kwargs: Kwargs, scope: Scope) -> Term:
    if len(args) < 2:
        return None
    x, weight = args[1::-1] if param_of(args[0], scope) else args[:2]
    w = param_of(weight, scope)
    return UnsupportedAdapted(x, w, kind) if isinstance(x, fx.Node) and w else None


def _add(args: Args, kwargs: Kwargs, scope: Scope) -> Term:
    factor = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if not are_nodes(args[:2]) or not is_number(factor):
        return None
    plain = _add_bias(args[0], args[1], scope) or _add_bias(args[1], args[0], scope)
    return plain if plain and factor == 1 else Add(args[0], args[1], float(factor))


def _add_bias(product: fx.Node, bias: fx.Node, scope: Scope) -> Linear | None:
    """``x @ W.T + bias`` as one linear."""
    b = param_of(bias, scope)
    if b is None or b.value.dim() != 1:
        return None
    linear = scope.term(product)
    if not isinstance(linear, Linear) or linear.bias is not None or len(product.users) != 1:
        return None
    return Linear(linear.x, linear.weight, b, (product,))


def _mul(args: Args, kwargs: Kwargs, scope: Scope) -> Term:
    for node, factor in (args, args[::-1]) if len(args) == 2 and not kwargs else ():
        if isinstance(node, fx.Node) and (number := as_number(factor)) is not None:
            return Scale(node, number)
    return None


def _div(args: Args, kwargs: Kwargs, scope: Scope) -> Term:
    if len(args) != 2 or kwargs or not isinstance(args[0], fx.Node):
        return None
    divisor = as_number(args[1])
    return Scale(args[0], 1.0 / divisor) if divisor is not None and args[1] != 0 else None


def _dropout(args: Args, kwargs: Kwargs, scope: Scope) -> Term:
    p = as_number(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    inplace = kwargs.get("inplace", args[3] if len(args) > 3 else False)
    return None if inplace or p is None else Dropout(args[0], p if training else 0.0)


def _base_linear(args: Args, kwargs: Kwargs, scope: Scope) -> Term:
    return BaseLinear(*args)


def _rows_base_linear(args: Args, kwargs: Kwargs, scope: Scope) -> Term:
    return RowsBaseLinear(args[0], tuple(args[1:6]), args[6], as_number(args[7]), args[8])


# What multiplies with a weight: where no site comes of it, a LoRA written so is reported.
PRODUCTS: dict[Any, Callable[[Args, Kwargs, Scope], Term]] = {
    **dict.fromkeys(LINEAR, _linear),
    **dict.fromkeys(MATMUL, _matmul),
    **dict.fromkeys(ADDMM, _addmm),
    **dict.fromkeys(EINSUM, _einsum),
    **{target: partial(_other, kind) for target, kind in OTHER.items()},
}
READERS: dict[Any, Callable[[Args, Kwargs, Scope], Term]] = {
    **PRODUCTS,
    **dict.fromkeys(ADD, _add),
    **dict.fromkeys(MUL, _mul),
    **dict.fromkeys(DIV, _div),
    **dict.fromkeys(DROPOUT, _dropout),
    **dict.fromkeys((base_linear.OP, base_linear.OP.default), _base_linear),
    **dict.fromkeys((rows.BASE_LINEAR, rows.BASE_LINEAR.default), _rows_base_linear),
}
