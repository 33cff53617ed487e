"""A copy of a graph to edit: Dynamo goes on using the one that it gave us."""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from falqon_fx import _compat


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph on the same parameters, checkpoint bodies copied too."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    assert output is not None
    value, old_output = cast(tuple[Any, fx.Node], output)
    node = graph.output(value, getattr(old_output, "type", None))
    node.meta.update(old_output.meta)
    # Code that was made for a graph is never forgotten, for the tracebacks that may name it: a lazy
    # one makes it when it is first asked for.
    copy = _compat.LazyGraphModule(gm, graph)
    copy.meta.update(gm.meta)
    _compat.copy_dynamo_attributes(gm, copy)
    for _, name, body in list(_compat.checkpoint_bodies(copy)):
        setattr(copy, name, copy_graph(body))
    return copy
