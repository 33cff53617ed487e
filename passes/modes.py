"""The modes of torch that a graph switches while it runs: gradients on or off, autocast,
torch.func.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from falqon_fx._compat import (
    ENTER_MODE,
    ENTER_TRANSFORM,
    EXIT_MODE,
    EXIT_TRANSFORM,
    SET_GRAD,
)
from falqon_fx.site.numerics import AUTOCAST_DEVICES

Mode = tuple[object, ...]
_TRANSFORM = "torch.func"


def modes(graph: fx.Graph) -> dict[fx.Node, Mode]:
    """What is switched on where each node stands; nodes of one mode may be computed as one.

    A graph begins with gradients on or off as they are now: Dynamo guards on that.
    """
    return dict(_walk(graph))


def transformed(mode: Mode) -> bool:
    """Whether a node of this mode runs inside a torch.func transform (vmap, grad, jvp)."""
    return _TRANSFORM in mode


def may_autocast(mode: Mode, device: str) -> bool:
    """Whether torch may cast the operands of this mode's products: here, or around the graph."""
    around = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    return around or any(isinstance(part, fx.Node) for part in mode)


def _walk(graph: fx.Graph) -> Iterator[tuple[fx.Node, Mode]]:
    grad: object = torch.is_grad_enabled()
    entered: list[fx.Node] = []
    levels = 0
    for node in graph.nodes:
        if node.target is SET_GRAD:
            grad = node.args[0]
        elif node.target in ENTER_MODE:
            entered.append(node)
        elif node.target in EXIT_MODE:
            entered.remove(node.args[0])
        elif node.target in ENTER_TRANSFORM:
            levels += 1
        elif node.target in EXIT_TRANSFORM:
            levels -= 1
        yield node, (grad, *entered, *[_TRANSFORM] * levels)
