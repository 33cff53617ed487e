"""The modes of torch that a graph switches while it runs: gradients on or off, autocast."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from falqon_fx._compat import ENTER_MODE, EXIT_MODE, SET_GRAD

Mode = tuple[object, ...]


def modes(graph: fx.Graph) -> dict[fx.Node, Mode]:
    """What is switched on where each node stands; nodes of one mode may be computed as one.

    What was on before the graph began is unknown, and equal to nothing that it switches.
    """
    return dict(_walk(graph))


def _walk(graph: fx.Graph) -> Iterator[tuple[fx.Node, Mode]]:
    grad: object = "as before the graph"
    entered: list[fx.Node] = []
    for node in graph.nodes:
        if node.target is SET_GRAD:
            grad = node.args[0]
        elif node.target in ENTER_MODE:
            entered.append(node)
        elif node.target in EXIT_MODE:
            entered.remove(node.args[0])
        yield node, (grad, *entered)
