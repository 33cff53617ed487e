"""Whether O may be a strided view of [O | O_A] in the rest of a graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from falqon_fx._compat import is_fake, tree_map
from falqon_fx.passes.normalize import value_of


def may_be_strided(anchor: fx.Node, more: int) -> bool:
    """Whether all that reads O, the value of ``anchor``, takes it with rows that lie ``more``
    elements further apart.

    F.linear's result has no gaps, on which some readers count: ``view(-1)``, kernels of others, and
    whatever comes behind the end of the graph. So only torch's own functions may see the view, and
    each is tried on a tensor without data.
    """
    o = value_of(anchor)
    # Its own mode: the one that is being traced with may be another by now.
    with o.fake_mode if is_fake(o) else nullcontext(), torch.no_grad():
        wide = o.new_empty((*o.shape[:-1], o.shape[-1] + more))
        views: dict[fx.Node, Any] = {anchor: wide[..., : o.shape[-1]]}
        waiting = [anchor]
        while waiting:
            for user in waiting.pop().users:
                if not _is_of_torch(user):
                    return False
                try:
                    result = _run(user, views)
                except (RuntimeError, ValueError, TypeError, NotImplementedError):
                    return False
                if _is_view_of(wide, result):
                    views[user] = result
                    waiting.append(user)
    return True


def _is_view_of(base: Tensor, result: Any) -> bool:
    parts: list[Any] = []
    tree_map(parts.append, result)
    memory = StorageWeakRef(base.untyped_storage())
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return any(StorageWeakRef(part.untyped_storage()) == memory for part in tensors)


def _is_of_torch(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target).startswith(("aten.", "prims."))
    if node.op != "call_function" or isinstance(target, torch._ops.HigherOrderOperator):
        return node.op == "call_method"
    module = getattr(target, "__module__", None) or ""  # None for torch's built-in functions
    return module.split(".")[0] in ("", "_operator", "torch")


def _run(node: fx.Node, views: dict[fx.Node, Any]) -> Any:
    """What ``node`` returns where its inputs are those of ``views``."""

    def given(n: fx.Node) -> Any:
        return views[n] if n in views else value_of(n)

    args, kwargs = fx.map_arg((node.args, node.kwargs), given)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return cast(Callable[..., Any], node.target)(*args, **kwargs)
