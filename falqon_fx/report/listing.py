"""Graphs as text: a line a node, with names that stay the same from pass to pass."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import fx

from falqon_fx import _compat
from falqon_fx._compat import OpOverload, value_of
from falqon_fx.errors import one_line
from falqon_fx.report.data import Line
from falqon_fx.site.numerics import dtype_name

_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int64": "i64", "int32": "i32"}


def listing(gm: fx.GraphModule, prefix: str = "") -> Iterator[Line]:
    """``name: dtype[shape] = op(arguments)`` for each node; checkpoint bodies follow indented."""
    names = {
        node: _compat.source_path(node) or node.name
        for node in gm.graph.find_nodes(op="placeholder")
    }
    for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
        op, index = node.args
        if isinstance(op, fx.Node) and _is_ours(op.target):
            names[node] = f"{op.name}[{index}]"
    bodies = {node: (name, body) for node, name, body in _compat.checkpoint_bodies(gm)}
    for node in gm.graph.nodes:
        inputs = tuple(prefix + n.name for n in node.all_input_nodes)
        text = one_line(_text(node, names))  # goes into logs, too
        yield Line(prefix + node.name, " " * 4 * prefix.count(".") + text, inputs)
        if node in bodies:
            name, body = bodies[node]
            yield from listing(body, f"{prefix}{name}.")


def _text(node: fx.Node, names: dict[fx.Node, str]) -> str:
    value = _type(value_of(node)) or _state_type(node)
    head = f"{names.get(node, node.name)}{': ' if value else ''}{value}"
    if node.op == "placeholder":
        return head
    if node.op == "output":
        return f"return {_argument(node.args[0], names)}"
    arguments = [_argument(a, names) for a in node.args]
    if _is_ours(node.target):  # many lists of tensors: say which is which
        known = [argument.name for argument in node.target._schema.arguments]
        named = zip(known[1:], arguments[1:])
        arguments[1:] = [f"{name}={text}" for name, text in named if text != "[]"]
    arguments += [f"{name}={_argument(a, names)}" for name, a in node.kwargs.items()]
    if node.op == "get_attr":
        return f"{head} = self.{node.target}"
    if node.op == "call_method":
        return f"{head} = {arguments[0]}.{node.target}({', '.join(arguments[1:])})"
    return f"{head} = {_name(node.target)}({', '.join(arguments)})"


def _state_type(node: fx.Node) -> str:
    if "falqon_shape" not in node.meta:
        return ""
    shape, dtype, _ = node.meta["falqon_shape"]
    return _type(torch.empty(shape, dtype=dtype, device="meta"))


def _is_ours(target: Any) -> TypeGuard[OpOverload]:
    return isinstance(target, OpOverload) and target.namespace == "falqon"


def _name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    if isinstance(target, str):
        return f"self.{target}"
    return str(getattr(target, "__name__", target)).lstrip("_")


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, list | tuple):
        inner = ", ".join(_argument(item, names) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return names.get(value, value.name) if isinstance(value, fx.Node) else repr(value)


def _type(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return ""
    dtype = dtype_name(value.dtype)
    return f"{_SHORT.get(dtype, dtype)}[{', '.join(str(s) for s in value.shape)}]"
