"""Tensors of which each process holds a part (DTensors: FSDP2, tensor parallelism).

All processes that hold a part call what gathers or adds up, in the same order.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx._compat import FSDP2_TAKES_INTEGERS, is_dtensor
from falqon_fx.errors import FalqonError
from falqon_fx.site.numerics import odd_factors

_CHUNK = 1 << 20  # elements that are hashed at a time
_FACTOR = 0x1E3779B97F4A7C15
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where this process holds a part of it."""
    if not is_dtensor(tensor):
        return tensor
    given: Any = tensor.detach()
    if given.device.type != given.device_mesh.device_type:  # offloaded to the CPU
        given = given.to(given.device_mesh.device_type)
    every: Tensor = given.full_tensor()
    return every


def gathered(tensor: Tensor) -> Tensor:
    """The same; what had to be gathered is on the CPU."""
    return whole(tensor).cpu() if is_dtensor(tensor) else tensor


def whole_copy(module: nn.Module) -> Any:
    """A copy of a module that has all of its parameters."""
    held = [p for p in module.parameters() if is_dtensor(p)]
    given = {id(p): nn.Parameter(whole(p), requires_grad=p.requires_grad) for p in held}
    return copy.deepcopy(module, given)


def part_of(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor cut as ``like`` is; nothing is sent."""
    if not is_dtensor(like) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor."""
    held: Tensor = tensor.detach().to_local() if is_dtensor(tensor) else tensor
    return held


def copied(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in memory of its own on the CPU."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")


def added_up(counts: Tensor, like: Any) -> Tensor:
    """The sum of what was counted of each part of ``like``, the same on all processes."""
    if not is_dtensor(like):
        return counts
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = like.device_mesh
    kinds = [Replicate() if p.is_replicate() else Partial() for p in like.placements]
    of_all = DTensor.from_local(counts.to(mesh.device_type), mesh, kinds, run_check=False)
    return of_all.full_tensor()


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A 64-bit hash of each tensor's contents, whatever is held where: Σ over elements of bits ·
    Π_d f_d(place in dimension d) mod 2**64, with odd factors f. Any single change shows.
    """
    alike: defaultdict[Any, list[str]] = defaultdict(list)  # those that are added up together
    for name, tensor in tensors.items():
        given: Any = tensor
        cut = (given.device_mesh, given.placements) if is_dtensor(tensor) else None
        alike[cut].append(name)
    found: dict[str, int] = {}
    for names in alike.values():
        counts = torch.stack([_hash(tensors[name]) for name in names])
        found |= zip(names, added_up(counts, tensors[names[0]]).tolist(), strict=True)
    return {name: found[name] for name in tensors}


def _hash(tensor: Any) -> Tensor:
    """That of the part which this process holds."""
    part, first = local(tensor).detach(), [0] * tensor.dim()
    if is_dtensor(tensor) and part.numel():
        first = tensor.__create_chunk_list__()[0].offsets  # as DCP asks where a part lies
    bits = part.contiguous().unsqueeze(-1).view(_BITS[min(part.element_size(), 8)])
    shape, first = (bits.shape, [*first, 0]) if tensor.dim() else ((1, *bits.shape), [0, 0])
    factors = [
        odd_factors(size, _FACTOR + 2 * dimension, torch.device("cpu"), start)
        for dimension, (size, start) in enumerate(zip(shape, first, strict=True))
    ]
    bits, total = bits.reshape(shape), torch.zeros((), dtype=torch.int64)
    step = max(1, _CHUNK * shape[0] // max(1, bits.numel()))
    for rows in map(slice, range(0, shape[0], step), range(step, shape[0] + step, step)):
        value = bits[rows].cpu().to(torch.int64)
        for factor in reversed(factors[1:]):
            value = (value * factor).sum(-1)
        total = total + (value * factors[0][rows]).sum()
    return total


def settle(model: nn.Module) -> None:
    """Let FSDP free what it gathered: its modules hold their parts then, not the whole."""
    for _, unit in _fsdp_units(model):
        unit.reshard()


def _fsdp_units(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that FSDP shards, by path; none where nothing has imported it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for path, module in model.named_modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            yield path, module


def is_sharded(model: nn.Module) -> bool:
    """Whether other processes hold parts of a model; FSDP's modules are `settle`d."""
    settle(model)
    return any(map(is_dtensor, model.parameters()))


def refuse_sharded(model: nn.Module, call: str, remedy: str) -> None:
    """Raise where a ``call`` would need all of a model and other processes hold parts of it."""
    settle(model)
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            problem = f"it is sharded (FSDP or tensor parallel), and {call} needs all of the model"
            raise FalqonError(name, problem, remedy)


def held_by_fsdp(model: nn.Module) -> set[int]:
    """The parameters that FSDP shards, by id."""
    return {id(parameter) for _, unit in _fsdp_units(model) for parameter in unit.parameters()}


def refuse_fsdp(model: nn.Module, call: str, remedy: str) -> None:
    """Raise where a ``call`` would need a layer's part of a model and FSDP has cut that again."""
    settle(model)
    for path, unit in _fsdp_units(model):
        for name, parameter in unit.named_parameters(path):
            if is_dtensor(parameter):
                problem = f"it is sharded already (FSDP), and {call} works on whole layers"
                raise FalqonError(name, problem, remedy)


OLD_FSDP2 = f"FSDP2 of torch {torch.__version__} shards no integers, as which FP8 weights are kept"


def refuse_old_fsdp2(name: str) -> None:
    """Raise where FSDP2 is to shard FP8 weights and can't."""
    if not FSDP2_TAKES_INTEGERS:
        raise FalqonError(name, OLD_FSDP2, "Use torch 2.12 or newer, or DDP")
