"""What is left alone, with a warning that says why."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from tests.models import Relu, Stack, compiled, fill_b


def warnings_of(call: nn.Module, *inputs: Tensor) -> tuple[list[Tensor], list[str]]:
    """Results for several inputs, and what a user with Python's default filters reads."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        results = [call(x) for x in inputs]
    return results, [str(w.message) for w in seen if "falqon" in str(w.message)]


def test_a_quantized_base_is_rejected_and_left_alone():
    class Fp8Linear(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            weight = linear.weight.detach().to(torch.float8_e4m3fn)
            self.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.to(x.dtype).t()

    model, x = Relu(), torch.randn(2, 32)
    fill_b(model)
    model.down.set_submodule("base_layer", Fp8Linear(model.down.base_layer))
    expected = model(x)
    (result,), seen = warnings_of(compiled(model, include="down"), x)
    assert torch.equal(result, expected)
    assert any("down" in text and "quantized" in text for text in seen)
    assert not falqon_fx.adapters(model)


def test_a_model_without_lora_runs_as_it_was_and_nothing_is_said():
    model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), torch.randn(2, 32)
    call = compiled(model, inner="aot_eager")
    results, seen = warnings_of(call, x, x[:1], x)  # the second makes another graph
    assert seen == []
    assert torch.equal(results[0], model(x))
    assert torch.equal(results[1], model(x[:1]))
    assert torch.equal(results[2], model(x))
    results[0].sum().backward()


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        torch._dynamo.graph_break()
        return x + 1


class Broken(nn.Module):
    """Graphs without LoRA around LoRA layers, which Dynamo compiles, or runs as they are; the same
    graph before the first LoRA layer is called more than once.
    """

    def __init__(self, *, outside: bool) -> None:
        super().__init__()
        self.head = Head()
        self.lora = Relu()
        self.outside = outside

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.head(x))
        if self.outside:
            return torch.compiler.disable(self.lora)(x) * 2
        x = self.lora(x)
        torch._dynamo.graph_break()
        return x * 2


@pytest.mark.parametrize(
    ("outside", "stepped"),
    [(False, True), (True, True), (True, False)],
    ids=["behind a break", "outside", "outside, by its gradient"],
)
def test_lora_layers_are_missed_only_where_no_graph_has_one_after_a_step(outside, stepped):
    """Once, whatever runs then; with their number, the first of them, and what to do."""
    torch._dynamo.reset()
    model, x = Broken(outside=outside), torch.randn(2, 32)
    call = compiled(model, frozen="leave", inner="eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    (before, _), seen = warnings_of(call, x, x)
    assert seen == []
    before.sum().backward()
    if stepped:  # what is left of a step is that the parameters were written
        optimizer.step()
        optimizer.zero_grad()
    _, seen = warnings_of(call, x, x)
    _, more = warnings_of(call, x, x[:1])
    said = [text for text in (*seen, *more) if "LoRA" in text]
    assert len(said) == int(outside)
    if outside:
        assert "none of its 2 LoRA layers (first lora.down) is in a compiled graph" in said[0]
        assert "Compile the whole model or its blocks" in said[0]


def test_each_rejection_is_warned_of_once():
    model = Stack()
    call = compiled(model, exclude="*.down")
    _, seen = warnings_of(call, torch.randn(2, 32), torch.randn(3, 5, 32))  # two graphs
    assert len(seen) == 2
    assert [f"blocks.{i}.down" in text for i, text in enumerate(seen)] == [True, True]
    assert list(falqon_fx.adapters(model)) == ["blocks.0.up", "blocks.1.up"]
