"""Parameters that are cut over processes, as this process's parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from falqon_fx._compat import is_dtensor
from falqon_fx.site.sharded import local


@dataclass(frozen=True)
class LocalParameter:
    """A parameter that a graph reads as this process's part: the ``place`` of the argument, and
    that of the mesh over which its gradient is to be summed, if it is.
    """

    place: int
    mesh: int | None


@dataclass(frozen=True)
class Cut:
    """How a DTensor is cut, and how large the whole is."""

    mesh: Any
    placements: Any
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any) -> Cut | None:
        if not is_dtensor(tensor):
            return None
        return cls(tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())

    def wrap(self, part: Tensor) -> Tensor:
        """The DTensor with this part."""
        from torch.distributed.tensor import DTensor

        whole: Tensor = DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )
        return whole


def with_local(args: Sequence[Any], parameters: Sequence[LocalParameter]) -> list[Any]:
    """The arguments of a call with local tensors in the place of ``parameters``.

    Gradients reach the parameters as they are cut; those that each process has a part of are summed
    up in one all-reduce behind the backward pass.
    """
    result = list(args)
    trained = [p for p in parameters if args[p.place].requires_grad and torch.is_grad_enabled()]
    for p in parameters:
        result[p.place] = local(args[p.place])
    if trained:
        groups = [None if p.mesh is None else args[p.mesh].get_group() for p in trained]
        parts = _Parts.apply(groups, *(args[p.place] for p in trained))  # type: ignore[no-untyped-call]
        for p, part in zip(trained, parts, strict=True):
            result[p.place] = part
    return result


class _Parts(torch.autograd.Function):
    """Local parts of parameters; gradients are summed over the ``groups`` given."""

    @staticmethod
    def forward(ctx: Any, groups: list[Any], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.groups, ctx.cuts = groups, [Cut.of(p) for p in parameters]
        ctx.set_materialize_grads(False)
        return tuple(local(p).detach() for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        found = [*grads]
        for group in {id(g): g for g in ctx.groups if g is not None}.values():
            places = [i for i, g in enumerate(ctx.groups) if g is group and found[i] is not None]
            for i, total in zip(places, _sums([found[i] for i in places], group), strict=True):
                found[i] = total
        cuts = zip(found, ctx.cuts, strict=True)
        return None, *(g if g is None or cut is None else cut.wrap(g) for g, cut in cuts)


def _sums(parts: Sequence[Any], group: Any) -> list[Tensor]:
    """Each of them summed over the processes, by one all-reduce in the widest of their dtypes."""
    if not parts:
        return []
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    flat = torch.cat([part.reshape(-1).to(dtype) for part in parts])
    dist.all_reduce(flat, group=group)
    pieces = flat.split([part.numel() for part in parts])
    return [s.view(part.shape).to(part.dtype) for s, part in zip(pieces, parts, strict=True)]
