"""Random programs of linear layers with and without LoRA, as torch-level graphs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from falqon_fx import MergedAdapter
from tests.emulation import EmulatedSite, siblings
from tests.sites import randn
from tests.spellings import HandWritten, Spelling, spellings

WIDTH = 24
STEPS = (
    "site",
    "plain",  # a linear layer without LoRA
    "delta",  # x · (W + s · B · A)ᵀ
    "residual",
    "in-place residual",
    "shared input",  # three sites read one value
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
    kind: str
    spelling: Spelling
    seed: int


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
                parameter.copy_(randn(*parameter.shape, seed=seed + i) / 4)

    def forward(self, x: Tensor) -> Tensor:
        delta = self.lora_b.weight @ self.lora_a.weight
        weight = self.base.weight + delta * self.scaling
        return nn.functional.linear(x, weight, self.base.bias)


class FlattenedBase(HandWritten):
    """The base layer sees [n, in], the adapter [..., in]."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.base(x.view(-1, WIDTH)).view(2, 3, WIDTH)
        return flat + self.lora_b(self.lora_a(x)) * float(self.spelling.scaling)


SITES = (HandWritten, Delta)


class Program(nn.Module):
    """Steps in a row on x [6, 24]; the values between them stay near one in size."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList()
        self.used: list[list[int]] = []  # the layers of each step
        self.groups: list[list[int]] = []  # of the emulation: which layers are siblings
        for step in steps:
            self.used.append(self._make(step))

    def _make(self, step: Step) -> list[int]:
        count = {"shared input": 3, "activation": 0, "in-place activation": 0, "cast": 0}
        made = []
        own = [i for i, layer in enumerate(self.layers) if type(layer) is HandWritten]
        if step.kind == "again" and own:
            return [own[step.seed % len(own)]]
        for i in range(count.get(step.kind, 1)):
            seed = step.seed + 20 * i
            layer: nn.Module
            if step.kind == "plain":
                layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
                with torch.no_grad():
                    layer.weight.copy_(randn(WIDTH, WIDTH, seed=seed) / 4)
            elif step.kind == "delta":
                layer = Delta(step.spelling, seed)
            elif step.kind == "flattened base":
                layer = FlattenedBase(step.spelling, seed)
            else:
                layer = HandWritten(step.spelling, seed)
            if isinstance(layer, HandWritten):
                with torch.no_grad():
                    for parameter in layer.parameters():
                        parameter.div_(4)
            made.append(len(self.layers))
            self.layers.append(layer)
        return made

    def extra_repr(self) -> str:
        return "\n".join(f"{step.kind} {used} {step.spelling}" for step, used in self._pairs())

    def _pairs(self) -> list[tuple[Step, list[int]]]:
        return list(zip(self.steps, self.used, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for step, used in self._pairs():
            layers = [self.layers[i] for i in used]
            x = self._run(step.kind, layers, x)
        return x

    def _run(self, kind: str, layers: list[nn.Module], x: Tensor) -> Tensor:
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

    def together(self, layers: list[nn.Module], x: Tensor) -> list[Tensor]:
        """What layers make of one x, in groups where the rewritten program computes them so."""
        results: dict[int, Tensor] = {}
        index = {id(layer): i for i, layer in enumerate(self.layers)}
        places = [index[id(layer)] for layer in layers]
        for group in self.groups:
            if group[0] in places:
                made = siblings([self.layers[i] for i in group], x)
                results.update(zip(group, made, strict=True))
        return [results[i] if i in results else self.layers[i](x) for i in places]

    def sites(self) -> dict[str, nn.Module]:
        """The LoRA layers that run, by path."""
        found = {f"layers.{i}": self.layers[i] for used in self.used for i in used}
        return {path: layer for path, layer in found.items() if isinstance(layer, SITES)}


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Float32 programs of one to six steps; every LoRA layer in them is to be found."""
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(STEPS))
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
        steps.append(Step(kind, spelling, draw(st.integers(0, 1000))))
    return Program(steps)


def emulated(
    program: Program,
    states: Mapping[str, MergedAdapter],
    groups: list[list[int]],
    strided: bool = False,
) -> Program:
    """The same program with each LoRA layer replaced by the emulation of its merged form."""
    twin = copy.deepcopy(program)
    twin.groups = groups
    for path, state in states.items():
        index = int(path.removeprefix("layers.").partition(".")[0])
        layer = twin.layers[index]
        twin.layers[index] = EmulatedSite(layer.lora_b.weight, layer.base, state, strided)
    return twin
