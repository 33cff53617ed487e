"""Random programs of linear layers with and without LoRA, as torch-level graphs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from falqon_fx import FalqonConfig, MergedAdapter
from tests.emulation import Layer, Lora, linear
from tests.sites import randn
from tests.spellings import HandWritten, Spelling, spellings

WIDTH = 64  # what a frozen layer needs to run in FP8
STEPS = (
    "site",
    "several",  # a layer with one to three adapters, each perhaps behind a dropout or frozen
    "plain",  # a linear layer without LoRA
    "delta",  # x · (W + s · B · A)ᵀ
    "residual",
    "in-place residual",
    "shared input",  # three layers read one value
    "again",  # a layer that was there before, on another value
    "view",  # (rows, tokens, width) around a site
    "flattened base",  # only the base layer is flattened, as Conv1D does it
    "slice",  # a strided view as input
    "cast",  # to bfloat16 and back
    "activation",
    "in-place activation",
)


@dataclass(frozen=True)
class Step:
    """``trains``: which of A, B and the bias of its layers ask for gradients; ``rows``: whether
    update="rows" is to take it.
    """

    kind: str
    spelling: Spelling
    seed: int
    trains: tuple[bool, bool, bool] = (True, True, False)
    rows: bool = False


class Delta(nn.Module):
    """The adapter is added to the weight."""

    def __init__(self, spelling: Spelling, seed: int) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=spelling.bias).requires_grad_(False)
        self.lora_a = nn.Linear(WIDTH, spelling.rank, bias=False)
        self.lora_b = nn.Linear(spelling.rank, WIDTH, bias=False)
        self.scaling = float(spelling.scaling)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=seed + i) / 8)

    def forward(self, x: Tensor) -> Tensor:
        delta = self.lora_b.weight @ self.lora_a.weight
        weight = self.base.weight + delta * self.scaling
        return F.linear(x, weight, self.base.bias)


class FlattenedBase(HandWritten):
    """The base layer sees [n, in], the adapter [..., in]."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.base(x.view(-1, WIDTH)).view(2, 3, WIDTH)
        return flat + self.lora_b(self.lora_a(x)) * float(self.spelling.scaling)


class Several(nn.Module):
    """One to three adapters of their own ranks and scalings, some behind a dropout, some frozen."""

    def __init__(self, spelling: Spelling, seed: int) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=spelling.bias).requires_grad_(False)
        ranks = [1 + (seed + 3 * j) % 9 for j in range(1 + seed % 3)]
        self.lora_a = nn.ModuleList(nn.Linear(WIDTH, r, bias=False) for r in ranks)
        self.lora_b = nn.ModuleList(nn.Linear(r, WIDTH, bias=False) for r in ranks)
        self.scalings = [float(spelling.scaling) * 0.5**j for j in range(len(ranks))]
        self.dropouts = [0.25 if seed >> (2 + j) & 1 else 0.0 for j in range(len(ranks))]
        self.turned = bool(seed >> 6 & 1)  # how the sum is written
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=seed + i) / 8)
        for j, (a, b) in enumerate(zip(self.lora_a, self.lora_b)):
            a.requires_grad_(not seed >> (7 + j) & 1)
            b.requires_grad_(seed % 5 != j)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        adapters = zip(self.lora_a, self.lora_b, self.scalings, self.dropouts, strict=True)
        for a, b, scaling, p in adapters:
            up = b(a(F.dropout(x, p, training=True) if p else x)) * scaling
            y = up + y if self.turned else y + up
        return y


SITES = (HandWritten, Delta, Several)


def adapters_of(layer: Any) -> list[tuple[Any, Any, float, float]]:
    """(A, B, scaling, dropout) of each adapter of a LoRA layer."""
    if isinstance(layer, Several):
        every = zip(layer.lora_a, layer.lora_b, layer.scalings, layer.dropouts, strict=True)
        return [(a.weight, b.weight, scaling, p) for a, b, scaling, p in every]
    scaling = layer.scaling if isinstance(layer, Delta) else float(layer.spelling.scaling)
    return [(layer.lora_a.weight, layer.lora_b.weight, scaling, 0.0)]


class Program(nn.Module):
    """Steps in a row on x [6, WIDTH]; the values between them stay near one in size."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList()
        self.used: list[list[int]] = []  # the layers of each step
        for step in steps:
            self.used.append(self._make(step))

    def _make(self, step: Step) -> list[int]:
        count = {"shared input": 3, "activation": 0, "in-place activation": 0, "cast": 0}
        own = [i for i, layer in enumerate(self.layers) if type(layer) in (HandWritten, Several)]
        if step.kind == "again" and own:
            return [own[step.seed % len(own)]]
        made = []
        for i in range(count.get(step.kind, 1)):
            seed, kind = step.seed + 21 * i, step.kind
            if kind == "shared input":
                kind = ("site", "plain", "site", "site", "several")[seed % (4 if step.rows else 5)]
            made.append(len(self.layers))
            self.layers.append(_layer(kind, replace(step, seed=seed)))
        return made

    def extra_repr(self) -> str:
        return "\n".join(f"{step.kind} {used} {step.spelling}" for step, used in self._pairs())

    def _pairs(self) -> list[tuple[Step, list[int]]]:
        return list(zip(self.steps, self.used, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for step, used in self._pairs():
            x = self._run(step.kind, [self.layers[i] for i in used], x)
        return x

    def _run(self, kind: str, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        if kind == "residual":
            return x + layers[0](x)
        if kind == "in-place residual":
            y = layers[0](x)
            y += x
            return y
        if kind == "shared input":
            first, second, third = self.together(layers, x)
            return first.sigmoid() * second - third
        if kind in ("view", "flattened base"):
            return layers[0](x.view(2, 3, WIDTH)).view(6, WIDTH)
        if kind == "slice":
            return layers[0](torch.cat([x, x], 1)[:, ::2])
        if kind == "cast":  # apart from sites, which leave out a rounding to bfloat16 around them
            return torch.tanh(torch.sin(x).to(torch.bfloat16).to(torch.float32))
        if kind == "activation":
            return torch.tanh(x)
        if kind == "in-place activation":
            return (x * 2).relu_()
        return layers[0](x)

    def together(self, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
        """What layers make of one x."""
        return [layer(x) for layer in layers]

    def sites(self) -> dict[str, Any]:
        """The LoRA layers that run, by path."""
        found = {f"layers.{i}": self.layers[i] for used in self.used for i in used}
        return {path: layer for path, layer in found.items() if isinstance(layer, SITES)}

    def plain(self) -> dict[str, Any]:
        """The linear layers without LoRA that run, by path."""
        found = {f"layers.{i}": self.layers[i] for used in self.used for i in used}
        return {path: layer for path, layer in found.items() if not isinstance(layer, SITES)}


def _layer(kind: str, step: Step) -> nn.Module:
    layer: nn.Module
    if kind == "plain":
        layer = nn.Linear(WIDTH, WIDTH, bias=step.spelling.bias).requires_grad_(False)
        with torch.no_grad():
            for i, parameter in enumerate(layer.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=step.seed + i) / 8)
        if layer.bias is not None:
            layer.bias.requires_grad_(step.trains[2])
        return layer
    if kind == "several":
        layer = Several(step.spelling, step.seed)
    elif kind == "delta":
        layer = Delta(step.spelling, step.seed)
    else:
        made = FlattenedBase if kind == "flattened base" else HandWritten
        layer = made(step.spelling, step.seed)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.div_(8)
    if kind != "several":
        layer.lora_a.requires_grad_(step.trains[0])
        layer.lora_b.requires_grad_(step.trains[1])
    if layer.base.bias is not None:
        layer.base.bias.requires_grad_(step.trains[2])
    return layer


@st.composite
def programs(draw: st.DrawFn, rows: bool = False) -> Program:
    """Float32 programs of one to six steps; every LoRA layer in them is to be found. With ``rows``
    those that update="rows" takes: one adapter a layer, A frozen, no dropout.
    """
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from([kind for kind in STEPS if not rows or kind != "several"]))
        spelling = replace(
            draw(spellings()),
            out=WIDTH,
            features=WIDTH,
            dtype=torch.float32,
            adapter_dtype=torch.float32,
            lora_bias=False,
        )
        if kind == "view" and "addmm" in (spelling.base, spelling.adapter, spelling.add):
            spelling = replace(spelling, base="module", adapter="module", add="base + adapter")
            spelling = replace(spelling, scale="b")
        a_trains = draw(st.booleans()) and not rows
        trains = (
            a_trains,
            draw(st.sampled_from([True, True, False])),
            draw(st.booleans()),
        )
        steps.append(Step(kind, spelling, draw(st.integers(0, 1000)), trains, rows))
    return Program(steps)


class Emulated(nn.Module):
    """A layer of a program as the backend computes it: from its own parameters, or with
    update="rows" from its state.
    """

    def __init__(self, layer: Any, config: FalqonConfig, state: MergedAdapter | None) -> None:
        super().__init__()
        self.layer, self.config, self.state = layer, config, state

    def inputs(self, x: Tensor) -> Layer:
        """What the op reads, the dropped x drawn now."""
        layer, config, state = self.layer, self.config, self.state
        if isinstance(layer, nn.Linear):
            return Layer.of(layer.weight, layer.bias, (), config)
        loras = []
        for a, b, scaling, p in adapters_of(layer):
            if state is None:
                read = F.dropout(x, p, training=True) if p else None
                loras.append(Lora.of(a, b, scaling, config, read))
            else:
                loras.append(Lora.written(a, b, state))
        if state is None:
            return Layer.of(layer.base.weight, layer.base.bias, loras, config)
        return Layer.written(state, layer.base.bias, loras)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, [self.inputs(x)], self.config)[0]


class EmulatedProgram(Program):
    """A program whose layers are emulated; ``groups``: which of them became one op together."""

    groups: list[list[int]]

    def together(self, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
        """Where the first of a group stands: autograd adds up dL/dx in the order of the ops."""
        results: dict[int, Tensor] = {}
        index = {id(layer): i for i, layer in enumerate(self.layers)}
        places = [index[id(layer)] for layer in layers]
        for i in places:
            if i not in results:
                group = next((group for group in self.groups if i in group), None)
                if group is None:
                    results[i] = self.layers[i](x)
                    continue
                each: list[Any] = [self.layers[j] for j in group]
                made = linear(x, [e.inputs(x) for e in each], each[0].config)
                results |= zip(group, made, strict=True)
        return [results[i] for i in places]


def emulated(
    program: Program,
    layers: Collection[int],
    groups: list[list[int]],
    config: FalqonConfig,
    states: Mapping[str, MergedAdapter] | None = None,
) -> EmulatedProgram:
    """The same program with some of its layers emulated, by their numbers; ``states`` by path."""
    twin: Any = copy.deepcopy(program)
    twin.__class__, twin.groups = EmulatedProgram, groups
    for i in layers:
        twin.layers[i] = Emulated(twin.layers[i], config, (states or {}).get(f"layers.{i}"))
    return twin
