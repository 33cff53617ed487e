"""Parameters that the compiled graph itself writes: casts made at its head would be out of date."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from falqon_fx.passes.normalize import normalize
from falqon_fx.passes.writes import written, written_parameters
from tests.models import LoraLinear, fill_b
from tests.sites import randn
from tests.spellings import Passes


def add_(p: Tensor) -> None:
    p.add_(0.25)


def by_operator(p: Tensor) -> None:
    p += 0.25


def through_a_view(p: Tensor) -> None:
    p[0].add_(0.25)


def through_a_flat_view(p: Tensor) -> None:
    p.view(-1)[:5].fill_(0.25)


def through_data(p: Tensor) -> None:
    p.data.add_(0.25)


def through_detach(p: Tensor) -> None:
    p.detach().mul_(1.5)


def by_item(p: Tensor) -> None:
    p[1:] = 0.25


def by_copy(p: Tensor) -> None:
    p.copy_(torch.full_like(p, 0.25))


def by_out(p: Tensor) -> None:
    torch.mul(torch.ones_like(p), 0.25, out=p)


def by_foreach(p: Tensor) -> None:
    torch._foreach_add_([p], 0.25)


def by_new_data(p: Tensor) -> None:
    p.data = p.data * 0.5


def by_clamp(p: Tensor) -> None:
    torch.clamp_(p, -0.01, 0.01)


WRITES = [
    *(add_, by_operator, through_a_view, through_a_flat_view, through_data, through_detach),
    *(by_item, by_copy, by_out, by_foreach, by_new_data, by_clamp),
]
PARTS = ("base_layer", "lora_A", "lora_B")


class Writing(nn.Module):
    """A LoRA layer, one of whose parameters is written before it runs, or behind it."""

    def __init__(self, part: str, write: Any, late: bool = False) -> None:
        super().__init__()
        self.layer, self.part, self.write, self.late = LoraLinear(24, 20), part, write, late
        fill_b(self, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) if self.late else None
        with torch.no_grad():
            self.write(getattr(self.layer, self.part).weight)
        return self.layer(x) if y is None else y


def runs(model: nn.Module, x: Tensor, backend: Any) -> list[Tensor]:
    """Two calls, each of which writes, from the state that the model has now."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    call = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    results = [call(x).detach() for _ in range(2)]
    results += [value.clone() for value in model.state_dict().values()]
    model.load_state_dict(state)
    return results


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_site_whose_parameter_the_graph_writes_is_left_and_its_numbers_are_right(write, part):
    model, x, passes = Writing(part, write), randn(5, 24), Passes(frozen="leave")
    for ours, eager in zip(runs(model, x, passes), runs(model, x, None), strict=True):
        assert torch.equal(ours, eager)
    assert not passes.sites
    (item,) = passes.rejected
    assert item.site == "layer"
    assert item.reason == "one of its parameters is written inside the compiled graph"
    assert item.remedy == "Write it outside of the compiled function"


@pytest.mark.parametrize("part", PARTS)
def test_a_write_behind_the_site_counts_too(part):
    """Each call would begin with casts of what the call before has left; it is refused alike."""
    model, passes, x = Writing(part, add_, late=True), Passes(frozen="leave"), randn(5, 24)
    for ours, eager in zip(runs(model, x, passes), runs(model, x, None), strict=True):
        assert torch.equal(ours, eager)
    assert not passes.sites


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_frozen_layer_whose_weight_the_graph_writes_is_left(write):
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.other = nn.Linear(72, 64), nn.Linear(64, 80)
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                write(self.proj.weight)
            return self.other(self.proj(x))

    passes = Passes()
    passes.run(Frozen(), randn(5, 72))
    assert [site.path for site in passes.sites] == ["other"]
    assert [(item.site, item.reason) for item in passes.left] == [
        ("proj", "one of its parameters is written inside the compiled graph")
    ]


def test_other_layers_than_the_written_one_are_rewritten():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.written, self.other = Writing("lora_B", add_), LoraLinear(20, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.written(x))

    passes = Passes(frozen="leave")
    passes.run(Two(), randn(5, 24))
    assert [site.path for site in passes.sites] == ["other"]
    assert [item.site for item in passes.rejected] == ["written.layer"]


def test_a_parameter_that_is_only_read_or_copied_is_not_written():
    def reads(p: Tensor) -> None:
        p.clone().add_(1.0)
        torch.add(p, 1.0).mul_(2.0)
        p.t().sum().add_(1.0)

    passes = Passes()
    passes.run(Writing("lora_A", reads), randn(5, 24))
    assert len(passes.sites) == 1


# -- what a node writes ----------------------------------------------------------------------------


@torch.library.custom_op("falqon_test::writes_second", mutates_args=("second",))
def writes_second(first: Tensor, second: Tensor) -> Tensor:
    second.add_(first)
    return first.clone()


@writes_second.register_fake
def _(first: Tensor, second: Tensor) -> Tensor:
    return torch.empty_like(first)


def test_an_op_writes_what_its_schema_says():
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return writes_second(self.a, self.b) + x

    graphs: list[fx.GraphModule] = []
    torch.compile(
        torch.no_grad()(Calls()), backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True
    )(torch.ones(3))
    root = normalize(graphs[0], [])
    (node,) = written_parameters(root)
    assert node.name.endswith("parameters_b_")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1,
        lambda x: x.clone(),
        lambda x: x.__add__(1),
        lambda x: torch.relu(x),
        lambda x: F.relu(x, inplace=False),
        lambda x: x.size(),
    ],
)
def test_what_writes_nothing(function):
    assert not any(writes(function))


def test_a_function_writes_where_it_is_told_to():
    assert any(writes(lambda x: F.relu(x, inplace=True)))


def writes(function: Callable[[Tensor], Any]) -> Iterator[list[fx.Node]]:
    """What each node of a function's graph writes."""
    return map(written, fx.symbolic_trace(function).graph.nodes)
