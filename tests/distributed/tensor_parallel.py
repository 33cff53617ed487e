"""A model that is cut over two processes, in numbers whose sums are exact.

Small integers: FP8 holds x, W, A and B exactly, and whatever is rounded on the way (hidden values,
gradients) is the same number on all processes, cast with a power of two. No sum needs more than the
24 bits of float32, so none depends on its order: what tensor parallelism computes must be what one
process computes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.backend import falqon as falqon_backend
from tests.models import LoraLinear, freeze_a

WIDTH, HIDDEN = 64, 128  # of which a process has 64: what a frozen layer needs to run in FP8


class Dropped(LoraLinear):
    """`LoraLinear` with a dropout in front of A."""

    def __init__(self, features: int, out: int, dropout: float, **options: Any) -> None:
        super().__init__(features, out, **options)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        read = x.to(self.lora_A.weight.dtype)
        if self.dropout:
            read = nn.functional.dropout(read, self.dropout)
        y = self.base_layer(x) + self.lora_B(self.lora_A(read)) * self.scaling
        return y.to(x.dtype)


class Net(nn.Module):
    """Two siblings with adapters and a frozen layer, cut by columns; one with an adapter, cut by
    rows.
    """

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": True, "dtype": dtype}
        self.up = Dropped(WIDTH, HIDDEN, dropout, **options)
        self.gate = Dropped(WIDTH, HIDDEN, dropout, **options)
        self.plain = nn.Linear(WIDTH, HIDDEN, bias=False, dtype=dtype).requires_grad_(False)
        self.down = Dropped(HIDDEN, WIDTH, dropout, **options)

    def forward(self, x: Tensor) -> Tensor:
        hidden = sum(torch.relu(layer(x)) for layer in (self.up, self.gate, self.plain))
        return self.down(hidden)


class Checkpointed(Net):
    """The same, computed anew in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return result


def integers(shape: tuple[int, ...], largest: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def make(kind: type[Net] = Net, train_a: bool = True, **options: Any) -> Net:
    model = kind(**options)
    if not train_a:
        freeze_a(model)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(integers(tuple(parameter.shape), 1, seed))
    return model


def plan(sequence: bool) -> dict[str, Any]:
    """torch's own styles: with ``sequence`` activations outside are cut by tokens."""
    tokens = Shard(1) if sequence else None
    styles: dict[str, Any] = {}
    for name in ("up", "gate"):
        styles[f"{name}.base_layer"] = ColwiseParallel(input_layouts=tokens)
        styles[f"{name}.lora_B"] = ColwiseParallel(input_layouts=tokens)
        if sequence:
            styles[f"{name}.lora_A"] = SequenceParallel()
    styles["plain"] = ColwiseParallel(input_layouts=tokens)
    styles["down.base_layer"] = RowwiseParallel(output_layouts=tokens)
    styles["down.lora_A"] = RowwiseParallel(output_layouts=tokens)
    if sequence:
        styles["down.lora_B"] = SequenceParallel(use_local_output=True)
    return styles


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def cut(model: nn.Module, sequence: bool, over: Any = None) -> nn.Module:
    """torch's SequenceParallel makes frozen parameters trainable, which is taken back."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    model = parallelize_module(model, over or mesh(), plan(sequence))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model


@dataclass(frozen=True)
class Step:
    """What one step gives: y, dL/dx, and the trained parameters with their gradients, whole."""

    y: Tensor
    grad_x: Tensor
    trained: dict[str, Tensor]

    def differs(self, other: Step) -> list[str]:
        names = [name for name in ("y", "grad_x") if not equal(self, other, name)]
        pairs = ((n, t, other.trained[n]) for n, t in self.trained.items())
        return names + [name for name, mine, theirs in pairs if not torch.equal(mine, theirs)]


def equal(step: Step, other: Step, name: str) -> bool:
    return torch.equal(getattr(step, name), getattr(other, name))


def take(model: nn.Module, call: Any, sequence: bool = False) -> Step:
    """A step of AdamW; with ``sequence`` this process has its share of the tokens."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if sequence else (1, 0)
    x, weight = integers((2, 8, WIDTH), 2, 100), integers((2, 8, WIDTH), 1, 101)
    x, weight = (t.chunk(size, 1)[rank].clone() for t in (x, weight))
    x.requires_grad_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)
    y = call(x)
    (y * weight).sum().backward()
    grads = {f"{name}.grad": whole(p.grad) for name, p in trained(model)}
    optimizer.step()
    stepped = {name: whole(p) for name, p in trained(model)}
    assert x.grad is not None
    if sequence:
        y, x_grad = (gather(t, 1) for t in (y.detach(), x.grad))
    else:
        y, x_grad = y.detach(), x.grad
    return Step(y, x_grad, {**grads, **stepped})


def trained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def whole(tensor: Any) -> Tensor:
    result: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return result.detach().clone()


def gather(tensor: Tensor, dim: int) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


def compiled(model: nn.Module, config: FalqonConfig, graphs: list[Any] | None = None) -> Any:
    """The compiled model; ``graphs`` gets what the passes make of each graph."""

    def backend(gm: Any, inputs: Any) -> Any:
        if graphs is not None:
            graphs.append(falqon_fx.rewrite(gm, inputs, config))
        return falqon_backend(gm, inputs, options={"config": config})

    return torch.compile(model, backend=backend)


def alone(config: FalqonConfig, prepared: bool, **options: Any) -> Step:
    torch._dynamo.reset()
    model = make(**options)
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    return take(model, compiled(model, config))


def together(
    config: FalqonConfig, sequence: bool, prepared: bool, graphs: list[Any], **options: Any
) -> Step:
    torch._dynamo.reset()
    model = cut(make(**options), sequence)
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    return take(model, compiled(model, config, graphs), sequence)
