"""Timing before compilation, on CPU as on a GPU: which choices it makes, and O's memory by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from falqon_fx import backend, cuda, ops
from falqon_fx.kernels import choice, dispatch
from falqon_fx.kernels.choice import Candidate, Choice, Choices, run_once
from falqon_fx.passes import autotune as autotuning
from tests.models import LoraLinear, fill_b
from tests.sites import randn


class Mlp(nn.Module):
    """Siblings, and behind them a site whose O leaves the graph.

    In between nothing is rounded: Inductor rounds elsewhere, and not always at the same places.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (LoraLinear(32, 48, 16, bias=True) for _ in range(2))
        self.down = LoraLinear(48, 32, 16, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.maximum(F.relu(self.gate(x), inplace=True), self.up(x)))


class Told(Choices):
    """Each candidate runs once; ``wins`` is the fastest where it is one of them."""

    def __init__(self, wins: str) -> None:
        super().__init__(f"card on which {wins} wins", run_once)
        self.wins, self.made = wins, []

    def get(self, *args, time: bool = True) -> Choice:
        return super().get(*args, time=True)

    def _measure(self, key: str, candidates: Mapping[str, Candidate]) -> tuple[Choice, bool]:
        made, lasting = super()._measure(key, candidates)
        self.made.append(key)
        return replace(made, winner=self.wins) if self.wins in made.seconds else made, lasting


@pytest.fixture
def told(monkeypatch, tmp_path):
    """CPU tensors go the way of a GPU's; a function that says what is to win."""
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path))
    monkeypatch.setattr(autotuning, "_has_choices", lambda group, spec: True)
    monkeypatch.setattr(ops.lowering, "merged_linear", cuda.merged_linear)
    monkeypatch.setattr(ops.lowering, "merged_linear_grad_x", cuda.merged_linear_grad_x)

    def use(wins: str) -> Told:
        choices = Told(wins)
        for place in (choice, dispatch):
            monkeypatch.setattr(place, "choices_for", lambda device: choices)
        return choices

    return use


def step(**options) -> list[Tensor]:
    """Output and gradients of one step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Mlp().bfloat16(), randn(2, 5, 32).bfloat16().requires_grad_()
    fill_b(model)
    options = {"kernel": "scaled_mm", "granularity": "tensor", **options}
    y = torch.compile(model, backend="falqon", fullgraph=True, options=options)(x)
    y.sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *grads]


@pytest.mark.parametrize("pending", ["apply", "hold"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_o_is_a_view_where_that_is_faster_and_the_numbers_stay(told, graphs, inner, pending):
    told("own")
    own = step(inner=inner, pending=pending)
    assert "scaled_mm:merged" not in {site.kernel for site in graphs.pop().sites}
    told("strided")
    views = step(inner=inner, pending=pending)
    kernels = {site.path.split(".")[-1]: site for site in graphs.pop().sites}
    assert kernels.pop("down").kernel != "scaled_mm:merged"  # its O is what the graph returns
    for site in kernels.values():
        assert site.kernel == "scaled_mm:merged"
        assert "O's memory, n=10 k=32 bfloat16,bfloat16 48,16,bfloat16" in site.kernel_reason
    for a, b in zip(own, views, strict=True):
        assert torch.equal(a, b)


def test_all_choices_of_a_step_fall_before_it_runs(told, monkeypatch):
    choices, before = told("own"), []
    compiled = backend._compile

    def compile_(*args):
        before.extend(choices.made)
        return compiled(*args)

    monkeypatch.setattr(backend, "_compile", compile_)
    step(inner="eager", pending="apply")
    kinds = [key.split(" ")[0] for key in before]
    assert choices.made == before  # the step itself found them all
    # Two groups: O_A, O and dL/dx of each, and for the siblings O's memory and its view.
    assert sorted(kinds) == sorted(["O's", "forward", *["forward", "forward", "dL/dx"] * 2])


def test_a_choice_is_made_once_for_equal_groups_and_again_by_nobody(told):
    choices = told("own")
    step(inner="eager")
    first = len(choices.made)
    step(inner="eager")
    assert len(choices.made) == first
    again = told("own")
    step(inner="eager")
    assert again.made == []  # another process reads them


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_timed_for_backward(told, mode):
    choices = told("own")
    torch._dynamo.reset()
    model = Mlp().bfloat16()
    options = {"kernel": "scaled_mm", "granularity": "tensor", "inner": "eager"}
    with mode():
        torch.compile(model, backend="falqon", options=options)(randn(5, 32).bfloat16())
    assert choices.made
    assert not [key for key in choices.made if key.startswith("dL")]


def test_random_numbers_autocast_and_gradients_of_the_model_stay(told):
    told("own")
    torch._dynamo.reset()
    model, options = Mlp(), {"kernel": "dequantize", "inner": "eager"}
    torch.manual_seed(3)
    wanted = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.compile(model, backend="falqon", options=options)(randn(5, 32))
    assert torch.equal(torch.get_rng_state(), wanted)
    assert all(p.grad is None for p in model.parameters())


def test_on_a_cpu_nothing_is_timed(graphs, monkeypatch):
    def never(*args):
        raise AssertionError("timed")

    monkeypatch.setattr(autotuning, "time_products", never)
    step(inner="eager", kernel="auto")
    assert {site.kernel for site in graphs.pop().sites} == {"aten"}
