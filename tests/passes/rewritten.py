"""A rewritten graph from each frontend, and what `verify` compares, for faults to be put in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from falqon_fx import FalqonConfig
from falqon_fx.errors import PassError
from falqon_fx.passes.insert_operands import Operands
from falqon_fx.passes.pipeline import PASSES
from falqon_fx.passes.plan import Plan
from falqon_fx.passes.verify import Wiring, verify
from falqon_fx.passes.work import Work
from tests.spellings import HandWritten, Spelling

FUSED = torch.ops.falqon.merged_linear.default
CASTS = torch.ops.falqon.proxy_update.default
WRITES = torch.ops.falqon.proxy_update_.default
# Where merged_linear takes what.
WEIGHT, SCALE, BIAS, A, A_SCALE, B, ALPHA, CLAMPED, LORA_A, LORA_B = range(1, 11)
OWN_X, OWNER, SCALING, KEEP_X, TURNED, JOINED, CHANNELS, DTYPE, SPEC = range(11, 20)


class Model(nn.Module):
    """Two adapted siblings, one with a bias of B, and a frozen one; behind them a site with a bias
    that reads their product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q = HandWritten(Spelling(out=64, features=64, base="functional", adapter="functional"))
        self.k = HandWritten(Spelling(out=64, features=64, lora_bias=True, scaling=0.5), seed=10)
        self.v = nn.Linear(64, 64, bias=False).requires_grad_(False)
        self.o = HandWritten(Spelling(out=20, features=64, bias=True), seed=20)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.o(self.q(x) * self.k(x) + self.v(x)).sigmoid()


def frozen_a(model: nn.Module) -> nn.Module:
    """As update="rows" asks for it."""
    for name, parameter in model.named_parameters():
        if "lora_a" in name.lower():
            parameter.requires_grad_(False)
    return model


def traced(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def exported(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(model, (x,)).module()


def captured(model: nn.Module, x: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x)
    return graphs[0]


FRONTENDS = {"symbolic_trace": traced, "export": exported, "Dynamo": captured}


@dataclass
class Rewritten:
    """What the passes before `verify` make of a graph."""

    plan: Plan
    operands: Operands
    before: Wiring

    @property
    def graph(self) -> fx.Graph:
        return self.plan.root.gm.graph

    def find(self, *names: object) -> fx.Node:
        """The last node in the root graph with one of these targets."""
        return [n for n in self.graph.nodes if n.target in names][-1]

    def sigmoid(self) -> fx.Node:
        return self.find("sigmoid", torch.ops.aten.sigmoid.default)

    def siblings(self) -> fx.Node:
        """The op of q, k and v."""
        return self.graph.find_nodes(op="call_function", target=FUSED)[0]

    def fused(self) -> fx.Node:
        """The op of o."""
        return self.find(FUSED)

    def casts(self) -> fx.Node:
        return self.find(CASTS)

    def writes(self) -> fx.Node:
        return self.find(WRITES)

    def verify(self) -> None:
        verify(self.plan, self.operands, self.before)


def values(gm: fx.GraphModule, x: Tensor) -> list[Any]:
    """The flat inputs of a graph: Dynamo's takes the parameters too."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return [node.meta.get("example_value", x) for node in nodes]


def passes(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Rewritten:
    work = Work(gm, inputs, FalqonConfig(**options))
    for step in takewhile(lambda step: step is not PASSES["verify"], PASSES.values()):
        step(work)
    return Rewritten(work.plan, work.operands, work.before)


def change(node: fx.Node, place: int, value: Any) -> None:
    node.args = (*node.args[:place], value, *node.args[place + 1 :])


@contextmanager
def seen(said: str) -> Iterator[None]:
    """A fault is an error that says so, and where."""
    with pytest.raises(PassError, match=said) as error:
        yield
    assert error.value.site == "the graph" or " " not in error.value.site
