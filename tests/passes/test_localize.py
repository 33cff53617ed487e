"""What the passes make of a graph on DTensors; no process but this one, and nothing is sent."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx._compat import value_of
from tests.distributed.tensor_parallel import HIDDEN, WIDTH, Checkpointed, cut, integers, make, mesh
from tests.models import LoraLinear
from tests.versions import needs_meshes_in_graphs

pytestmark = needs_meshes_in_graphs
ALL = ["down", "gate", "plain", "up"]


@pytest.fixture(scope="module", autouse=True)
def two_processes() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def rewritten(model: nn.Module, x: Tensor) -> Any:
    found: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        found.append(falqon_fx.rewrite(gm, inputs, FalqonConfig(inner="eager")))
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x)
    (result,) = found
    for node in nodes(result):
        valued = node.op not in ("output", "get_attr") and "autocast" not in node.name
        assert not valued or value_of(node) is not None, node
        if node.name.startswith(("from_local", "redistribute", "to_local", "add")):
            read = [
                value_of(n).dtype for n in node.all_input_nodes if isinstance(value_of(n), Tensor)
            ]
            assert value_of(node).dtype == functools.reduce(torch.promote_types, read), node
    return result


def nodes(result: Any) -> list[torch.fx.Node]:
    """Those of checkpoints' bodies too."""
    graphs = [m.graph for m in result.gm.modules() if isinstance(m, torch.fx.GraphModule)]
    return [node for graph in graphs for node in graph.nodes]


def counts(result: Any) -> Counter[str]:
    """The operations by name."""
    targets = [node.target for node in nodes(result)]
    names = (getattr(target, "__name__", str(target)) for target in targets)
    return Counter(name.partition(".")[0] for name in names)


@pytest.mark.parametrize(
    ("sequence", "options", "gathers"),
    [
        (False, {}, 0),
        (True, {}, 1),
        (True, {"kind": Checkpointed}, 1),
        (False, {"dtype": torch.bfloat16}, 0),
        # What is dropped is the gathered x, not its cast.
        (True, {"dtype": torch.bfloat16, "dropout": 0.5}, 0),
    ],
)
def test_sites_are_those_of_one_process(sequence: bool, options: dict[str, Any], gathers: int):
    """And x enters once for all that read it, the output leaves once, with its adapter's part."""
    tokens = 4 if sequence else 8
    x = integers((2, tokens, WIDTH), 2, 0).to(options.get("dtype", torch.float32))
    result = rewritten(cut(make(**options), sequence), x)
    (report,) = result.report.graphs
    assert sorted(site.path.removesuffix(".base_layer") for site in report.sites) == ALL
    assert report.rejected == ()
    noted = [(note.site, note.text.endswith("(1 in this graph)")) for note in report.notes]
    assert noted == [(report.sites[0].path, True)] * gathers
    found = counts(result)
    assert (found["gather_tokens"], found["from_local"]) == (gathers, 2 - gathers)
    inputs = result.gm.graph.find_nodes(op="placeholder")
    assert all(node.users for node in inputs if str(node.target).endswith("parameters_bias_"))
    # A of two layers cut by columns and B of one cut by rows: whole, with a part of the gradient.
    assert sum(parameter.mesh is not None for parameter in result.local) == 3


class Promoted(LoraLinear):
    """Its sum stays in its adapter's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x.float())) * self.scaling
        return result


def test_a_sum_in_a_wider_dtype_leaves_in_it():
    layer = Promoted(HIDDEN, WIDTH, bias=True, dtype=torch.bfloat16)
    parallelize_module(layer, mesh(), dict.fromkeys(["base_layer", "lora_A"], RowwiseParallel()))
    result = rewritten(layer, integers((4, HIDDEN // 2), 2, 0).bfloat16())
    (report,) = result.report.graphs
    assert [len(report.sites), report.rejected] == [1, ()]
    left = [value_of(n) for n in nodes(result) if n.name.startswith("from_local")]
    assert [value.dtype for value in left] == [torch.float32]


class Widened(LoraLinear):
    """A's product is cast to B's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x).float()) * self.scaling
        return result


def test_a_cast_of_what_enters_is_computed_on_each_process():
    layer = Widened(WIDTH, HIDDEN, dtype=torch.bfloat16)
    layer.lora_A.bfloat16()
    parallelize_module(layer, mesh(), dict.fromkeys(["base_layer", "lora_B"], ColwiseParallel()))
    result = rewritten(layer, integers((4, WIDTH), 2, 0).bfloat16())
    (report,) = result.report.graphs
    assert [len(report.sites), report.rejected] == [1, ()]
    assert counts(result)["from_local"] == 1  # x alone


class Autocast(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = self.layer(x)
        return result


@pytest.mark.parametrize("kind", [LoraLinear, nn.Linear])
def test_the_output_has_the_dtype_of_autocast_whatever_its_bias_has(kind: type[Any]):
    layer: nn.Module = kind(HIDDEN, WIDTH, bias=True)
    how: Any = dict.fromkeys(["base_layer", "lora_A"], RowwiseParallel())
    if kind is nn.Linear:
        layer.requires_grad_(False)
        how = RowwiseParallel()
    layer = parallelize_module(layer, mesh(), how)
    result = rewritten(Autocast(layer), integers((4, HIDDEN // 2), 2, 0).bfloat16())
    (report,) = result.report.graphs
    assert [len(report.sites), report.rejected] == [1, ()]
    (y,) = result.gm.graph.output_node().args[0]
    assert y.target == "to"
    assert [value_of(n).dtype for n in (y, y.args[0])] == [torch.bfloat16, torch.float32]


class Whole(nn.Module):
    """A layer that every process has all of, among DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mesh = LoraLinear(WIDTH, WIDTH, bias=True), mesh()
        distribute_module(self.layer, self.mesh)

    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(DTensor.from_local(x, self.mesh, [Replicate()], run_check=False))
        result: Tensor = made.to_local()
        return result


def test_a_layer_that_every_process_has_whole_is_a_site():
    """In FP8; its adapter's part is added among DTensors, which is not looked into."""
    result = rewritten(Whole(), integers((4, WIDTH), 2, 0))
    (report,) = result.report.graphs
    assert [site.path for site in report.sites] == ["layer.base_layer"]
    assert [r.reason.partition(" is not")[0] for r in report.rejected] == ["the output of B(A(x))"]
    assert counts(result)["linear"] == 2  # A's and B's, on local tensors


def test_what_two_processes_cannot_share_evenly_is_left():
    styles = {"base_layer": ColwiseParallel(), "lora_B": ColwiseParallel()}
    layer = parallelize_module(LoraLinear(WIDTH, 129), mesh(), styles)
    (report,) = rewritten(layer, integers((4, WIDTH), 2, 0)).report.graphs
    assert report.sites == ()
    (why,) = report.rejected
    assert "even columns" in why.reason
