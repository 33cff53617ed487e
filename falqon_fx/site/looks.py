"""A sample of a weight's contents, by which writes are seen that autograd doesn't count."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(weight: Tensor) -> Tensor:
    """At most 16 x 64 evenly spaced elements of a weight, which stand for its contents: a view.

    Reading all of W in each step would cost as much as the step's own GEMMs; in-place edits that
    autograd counts are seen exactly, through the version counter.
    """
    if weight.dim() == 3:  # a stack: a view of it where it has one
        weight = weight.flatten(0, 1) if weight.is_contiguous() else weight[0]
    rows, columns = weight.shape
    return weight[:: max(1, rows // 16), :: max(1, columns // 64)][:16, :64]


def look(weight: Tensor) -> Tensor:
    """What `looks_like` compares a weight with later."""
    with torch.inference_mode(False), torch.no_grad():
        return sample(weight.detach()).clone(memory_format=torch.contiguous_format)


def looks_like(weight: Tensor, seen: Tensor, wait: bool = False) -> bool:
    """Whether its `sample` is still the same; True where looking would wait for a device, unless
    one may ``wait``, as one never may while a graph of launches is captured.
    """
    if waits(weight) and not (wait and not _captures(weight)):
        return True
    return torch.equal(sample(weight), seen)


def waits(weight: Tensor) -> bool:
    """Whether to look at its contents waits for a device."""
    return weight.device.type != "cpu"


def _captures(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
