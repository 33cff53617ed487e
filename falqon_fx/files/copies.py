"""Tensors written into others of the same shapes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.site.sharded import local, part_of


def copy_tensors(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write the second of each pair into the first, which is of the same shape and dtype; of a
    sharded one the part that is held here.

    Raises:
        ValueError: it is not. Nothing has been written then.
    """
    plain, once = [], [*{id(pair[0]): pair for pair in pairs}.values()]  # tied ones
    for target, tensor in once:
        if (target.shape, target.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{tensor.dtype} {list(tensor.shape)} into {list(target.shape)}")
    with torch.no_grad():
        once = [(local(target), local(part_of(tensor, target))) for target, tensor in once]
        for target, tensor in once:
            if _is_plain(target) and _is_plain(tensor):
                plain.append((target, tensor))
            else:
                target.copy_(tensor)
        if cpu.copy(plain):
            torch.autograd.graph.increment_version([target for target, _ in plain])
        else:
            for target, tensor in plain:
                target.copy_(tensor)


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
    return plain and tensor.device.type == "cpu" and tensor.is_contiguous()
