"""One launch of a generated kernel: at once, or as a node of the graph that is being traced.

Inductor compiles and launches the kernels in its graphs itself, and no Python of ours runs there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.fx import traceback
from triton.tools.tensor_descriptor import TensorDescriptor

from falqon_fx import _compat


@dataclass(frozen=True)
class Described:
    """A matrix that a kernel reads through a TMA descriptor, in blocks of this shape."""

    matrix: Tensor
    block: tuple[int, int]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    written: Sequence[str],
    *,
    num_warps: int,
    num_stages: int = 3,
) -> list[Tensor]:
    """What the parameters ``written`` of ``kernel`` hold after ``grid`` programs of it.

    ``arguments`` are tensors, `Described` ones and numbers, in the kernel's order. A launch
    writes into the tensors that are given. In a graph that is traced they stay as they are, and the
    results are other ones: whoever calls this goes on with what is returned.
    """
    named = dict(zip(kernel.arg_names, arguments, strict=True))
    first = next(value for value in named.values() if isinstance(value, Tensor))
    if _compat.is_fake(first):
        described = {n: v for n, v in named.items() if isinstance(v, Described)}
        given = {n: v.matrix if isinstance(v, Described) else v for n, v in named.items()}
        blocks = {name: list(value.block) for name, value in described.items()}
        made = _compat.launch_in_graph(
            _configured(kernel, num_warps, num_stages), grid, given, blocks, [*written]
        )
        return [made[name] for name in written]
    operands = [
        TensorDescriptor.from_tensor(value.matrix, [*value.block])
        if isinstance(value, Described)
        else value
        for value in arguments
    ]
    with torch.cuda.device_of(first):  # Triton launches on the current device
        kernel[grid](*operands, num_warps=num_warps, num_stages=num_stages)
    return [named[name] for name in written]


def with_rows(matrix: Tensor) -> Tensor:
    """``matrix`` with rows as they lie, whose elements stand side by side; else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


# The direction whose graph has a write, as AOTAutograd's partitioner reads it.
FORWARD, BACKWARD = "must_be_in_forward", "must_be_in_backward"


def with_last_columns(whole: Tensor, make: Callable[[], Tensor], direction: str) -> Tensor:
    """``whole`` with what ``make`` returns as its last columns, written in place."""
    if _compat.is_fake(whole):
        return _in_graph(whole, make, direction)
    part = make()
    # Not a write that autograd counts: what comes before the next read writes it anew.
    whole.data.narrow(1, whole.shape[1] - part.shape[1], part.shape[1]).copy_(part)
    return whole


def _in_graph(whole: Tensor, make: Callable[[], Tensor], direction: str) -> Tensor:
    """The same of an input of the graph that is being traced, written as forward or as backward
    runs. Inductor copies nothing, as it is told of the write.
    """
    # Else the partitioner would make and write what backward reads as soon as it can, in forward.
    with traceback.preserve_node_meta(), _marked(direction):
        part = make()
        stride, first = (whole.stride(0), 1), whole.shape[1] - part.shape[1]
        result = torch.as_strided_scatter(whole, part, part.shape, stride, first)
        torch.ops.aten.copy_.default(whole, result)
    return result


@contextlib.contextmanager
def _marked(tag: str) -> Iterator[None]:
    """Nodes that are traced in this block have the tag, as AOTAutograd's partitioner reads it."""
    meta, name = traceback.current_meta, "partitioner_tag"
    before, meta[name] = meta.get(name), tag
    try:
        yield
    finally:
        meta[name] = before


@functools.cache
def _configured(kernel: Any, num_warps: int, num_stages: int) -> Any:
    """The kernel with its warps and stages, as a graph holds it; the interpreter has neither."""
    if not isinstance(kernel, triton.JITFunction):
        return kernel
    config = triton.Config({}, num_warps=num_warps, num_stages=num_stages)
    return triton.autotune(configs=[config], key=[])(kernel)
