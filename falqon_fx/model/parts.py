"""Prepared layers under tensor parallelism: each process has its part of W in FP8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from falqon_fx._compat import is_dtensor
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.model.prepared_linear import autocast
from falqon_fx.ops.base_linear import base_linear
from falqon_fx.site.agreement import agree, check_options, groups_of
from falqon_fx.site.base import Base, cast_base
from falqon_fx.site.sharded import local
from falqon_fx.site.spec import SiteSpec

PARAMETERS = ("code", "scale", "digest")


def check_part(path: str, weight: Any, config: FalqonConfig) -> None:
    """Refuse a cut that is no tensor parallelism of whole rows or columns of even size.

    Raises:
        FalqonError: FSDP's, one over several dimensions of a mesh, an uneven one; an option that
            needs all of W in one place.
    """
    if not is_dtensor(weight):
        return
    check_options(path, config)
    mesh, placement = weight.device_mesh, weight.placements[0]
    if mesh.ndim != 1:
        raise FalqonError(
            path,
            f"its base weight is cut over a mesh of {mesh.ndim} dimensions",
            "Call falqon_fx.prepare(model) after parallelize_module and before fully_shard",
        )
    if placement.is_shard() and weight.shape[placement.dim] % mesh.size() != 0:
        raise FalqonError(
            path,
            f"its base weight {list(weight.shape)} is cut over {mesh.size()} processes unevenly",
            "Take a number of processes that divides it, or leave the layer out with exclude=",
        )


def check_together(weights: Sequence[Tensor], problem: FalqonError | None) -> None:
    """What one process finds wrong stops all that hold parts of ``weights``.

    Raises:
        FalqonError: on each of them.
    """
    for group in groups_of(weights):
        agree(group, {"the layers to prepare": str(len(weights))}, problem)
    if problem is not None:
        raise problem


def cast_part(weight: Any, spec: SiteSpec) -> Base:
    """W cast to FP8, of a cut one this process's part: its bytes and scales are those of the whole.

    A row that is cut has one scale on all processes, or nothing could be exported as it is.
    """
    if not is_dtensor(weight):
        return cast_base(weight, spec)
    part, placement = local(weight), weight.placements[0]
    amax = None
    if placement.is_shard() and not (spec.per_row and placement.dim == 0):
        amax = part.abs().amax(1, keepdim=True) if spec.per_row else part.abs().amax()
        amax = amax.to(torch.float32)
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=weight.device_mesh.get_group())
    return cast_base(part, spec, amax)


def cut_like(layer: Any, weight: Any) -> None:
    """Make the parameters of a prepared layer DTensors, cut as ``weight`` was."""
    if not is_dtensor(weight):
        return
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placement = weight.placements[0]
    rows = placement.is_shard(0) and layer.scale.dim() == 2
    # Each process has a digest of its own bytes.
    cuts = {"code": placement, "scale": Shard(0) if rows else Replicate(), "digest": Shard(0)}
    for name in PARAMETERS:
        part = getattr(layer, name).detach()
        whole = DTensor.from_local(part, weight.device_mesh, (cuts[name],), run_check=False)
        setattr(layer, name, nn.Parameter(whole, requires_grad=False))
    layer.out_features, layer.in_features = weight.shape


def on_parts(layer: Any, x: Any) -> Any:
    """The output of a cut layer for a DTensor x: a DTensor, cut by columns or a sum to be added up.

    Raises:
        FalqonError: x is none.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not is_dtensor(x):
        raise FalqonError(
            layer.path,
            "its base weight is cut over processes, its input is not a DTensor",
            "Use parallelize_module with ColwiseParallel or RowwiseParallel on its base layer",
        )
    mesh, columns = layer.code.device_mesh, layer.code.placements[0].is_shard(0)
    wanted = Replicate() if columns else Shard(x.dim() - 1)
    if x.placements != (wanted,):
        x = x.redistribute(placements=(wanted,))
    part = x.to_local(grad_placements=(Partial(),)) if columns else x.to_local()
    bias = layer.bias
    if bias is not None:
        bias = bias.to_local()
        bias = bias if columns else bias / mesh.size()  # added once a process
    state = (layer.code.to_local(), layer.scale.to_local(), layer.digest.to_local())
    y = base_linear(autocast(part), *state, bias, layer.spec_text)
    return DTensor.from_local(y, mesh, (Shard(-1) if columns else Partial(),), run_check=False)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of the one whose place it takes: parallel styles live in them, and a
    ``forward`` of its own, as transformers' tensor parallelism puts there, is put there again.
    """
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    plan, mesh = (getattr(old, name, None) for name in ("_hf_tp_plan", "_hf_device_mesh"))
    if plan is not None and "forward" in vars(old):
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

        vars(new).update(_hf_tp_plan=plan, _hf_device_mesh=mesh)
        ALL_PARALLEL_STYLES[plan].install_forward(new, mesh)


_HOOKS = [n for n in vars(nn.Module()) if n.startswith("_forward") and "hook" in n]
