"""Pass over the graphs that Inductor lowers: ``torch.addmm`` adds to what a product stored, where
nobody else reads that.

Out of place the library copies O (or dL/dx) to where the sum goes before it adds to it, which takes
as long as the addition itself. In-place ops are no part of what AOTAutograd and its partitioner may
see, so that they come last.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten, prims = torch.ops.aten, torch.ops.prims


def add_in_place(graph: fx.Graph) -> None:
    """Edit the graph of one direction in place. What read the sum reads the memory that it is in:
    Inductor orders such reads behind the write, and knows how long that memory is in use.
    """
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        whole = node.args[0]
        if isinstance(whole, fx.Node) and _is_for(whole, node):
            with graph.inserting_before(node):
                written = graph.call_function(aten.addmm_.default, node.args, dict(node.kwargs))
            written.meta.update(node.meta)
            node.replace_all_uses_with(whole)
            graph.erase_node(node)


def _is_for(whole: fx.Node, node: fx.Node) -> bool:
    """Whether a matrix lies in memory of its own, as the sum would, and ``node`` alone reads it."""
    made, sum_of = whole.meta.get("val"), node.meta.get("val")
    if not isinstance(made, Tensor) or not isinstance(sum_of, Tensor) or not made.is_contiguous():
        return False
    alike = (made.shape, made.dtype) == (sum_of.shape, sum_of.dtype) and sum_of.is_contiguous()
    return alike and [*whole.users] == [node] and _is_new(whole)


def _is_new(whole: fx.Node) -> bool:
    """Whether a node makes what it returns: an FP8 product, or a cast of several, summed."""
    if whole.target is prims.convert_element_type.default:
        source, dtype = whole.args  # a cast to the dtype that is there already is no copy
        return isinstance(source, fx.Node) and source.meta["val"].dtype != dtype
    return whole.target is aten._scaled_mm.default
