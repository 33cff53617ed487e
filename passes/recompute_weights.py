"""Joint-graph pass: FP8 and INT8 weights are decoded anew in backward, and never kept from the
forward pass.

AOTAutograd's partitioner weighs what to save for backward. Where a product is computed on decoded
weights, a bf16 copy of all of them may look cheaper to keep than to make again; and with
update="rows" W' is to it the result of an update and no parameter.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from falqon_fx.site.numerics import E4M3, INT8


def recompute_weights(graph: fx.Graph) -> None:
    """Mark what decodes a W, or an updated W', in a functionalized joint graph."""
    for node in graph.nodes:
        if node.op == "placeholder":  # after `prepare` its bytes
            for weight in [node, *(user for user in node.users if _is_view(user))]:
                if _dtype(weight) in (E4M3, INT8):
                    _mark(weight)
        elif _is_update(node):
            for result in node.users:
                if _dtype(result) == E4M3:
                    _mark(result)


def _mark(weight: fx.Node) -> None:
    """The cast, its scale and the views in between, but not the GEMMs behind them."""
    for user in weight.users:
        if user.op == "call_function" and (_is_view(user) or user.target in _DECODING):
            user.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            _mark(user)


_DECODING = {
    torch.ops.aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.cat.default,
    torch.ops.aten.clone.default,
}


def _is_update(node: fx.Node) -> bool:
    """The functionalized form of ``falqon::proxy_update_``."""
    return node.op == "call_function" and node.args[:1] == (torch.ops.falqon.proxy_update_.default,)


def _is_view(node: fx.Node) -> bool:
    return getattr(node.target, "is_view", False)


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)
