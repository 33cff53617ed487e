"""A site whose adapter adapter_dtype="fp8" has clamped gets it in bfloat16 at the next compilation,
alone of its siblings.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import falqon_fx
from falqon_fx.passes import insert_operands, saturation
from falqon_fx.site.spec import parse_spec
from tests.cuda import as_on_a_gpu
from tests.models import LoraLinear, fill_b
from tests.spellings import Passes


class Attention(nn.Module):
    """q, k and v of one x, and o."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (LoraLinear(32, 32) for _ in range(3))
        self.o = LoraLinear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.o(self.q(x) * self.k(x).tanh() + self.v(x))
        return made


class PlainLora(nn.Module):
    """Without a branch, which a symbolic trace can't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(32, 32).requires_grad_(False)
        self.a, self.b = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.base(x) + 2 * self.b(self.a(x))
        return made


def model_with_outliers() -> Attention:
    """Two rows of k's B are larger than FP8 holds beside rows of its W."""
    torch.manual_seed(0)
    model = Attention()
    fill_b(model, 0.001)
    with torch.no_grad():
        model.k.lora_B.weight[::16] = 1e5
    return model


def trained(call: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = call(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def kinds(passes: Passes) -> dict[str, str]:
    return {site.path: parse_spec(site.spec).adapter for site in passes.sites}


@pytest.mark.parametrize("on_a_gpu", [False, True], ids=["cpu", "gpu"])
def test_the_next_compilation_gives_it_bfloat16(
    on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients of the site are those of bfloat16 adapters to the bit where nothing but
    it is clamped, and a count that a device keeps is read by the compilation alone.
    """
    if on_a_gpu:
        monkeypatch.setattr(insert_operands, "counts_on", lambda device: True)
    with as_on_a_gpu(grad_x=False) if on_a_gpu else warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = model_with_outliers(), torch.randn(8, 32)
        first, second = Passes(adapter_dtype="fp8"), Passes(adapter_dtype="fp8")
        first.run(model, x)
        assert kinds(first) == dict.fromkeys("qkvo", "fp8")
        counts = {path: site.saturated for path, site in falqon_fx.adapters(model).items()}
        assert counts["k"] > 0
        assert counts == {"q": 0, "k": counts["k"], "v": 0, "o": 0}

        second.run(model, x)
        assert kinds(second) == {"q": "fp8", "k": "bfloat16", "v": "fp8", "o": "fp8"}
        (note,) = second.results[0].report.graphs[0].notes
        assert note.site == "k"
        assert "has clamped some of it" in note.text
        after = {path: site.saturated for path, site in falqon_fx.adapters(model).items()}
        assert after == counts  # nothing is clamped any more


def test_its_results_are_those_of_bfloat16_adapters() -> None:
    torch.manual_seed(0)
    alone, x = LoraLinear(32, 32), torch.randn(8, 32)
    with torch.no_grad():
        alone.lora_B.weight[::16] = 1e5
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("fp8", "fp8", "bfloat16"):
            torch._dynamo.reset()
            options = {"inner": "eager", "adapter_dtype": kind}
            call = torch.compile(alone, backend="falqon", options=options)
            found.append(trained(call, alone, x))
    clamped, fallen_back, bfloat16 = found
    assert all(map(torch.equal, fallen_back, bfloat16))
    assert not torch.equal(clamped[0], bfloat16[0])


def test_blocks_that_share_a_graph_are_looked_at_together() -> None:
    """It is made for the first of them, of which nothing was clamped."""
    model = nn.Sequential(LoraLinear(32, 32), nn.Tanh(), model_with_outliers().k)
    fill_b(model[0], 0.001)
    options = {"inner": "eager", "adapter_dtype": "fp8"}
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            torch._dynamo.reset()
            for block in (model[0], model[2]):
                block.compile(backend="falqon", options=options)
            model(torch.randn(8, 32, requires_grad=True))  # as the second's x: else graphs differ
            counts.append({n: s.saturated for n, s in falqon_fx.adapters(model).items()})
    assert counts[0]["2"] > 0
    assert counts == [counts[0]] * 3


def test_processes_keep_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would count something else, and compile another graph."""
    model, x = model_with_outliers(), torch.randn(8, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Passes(adapter_dtype="fp8").run(model, x)
        several = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True)
        monkeypatch.setattr(saturation, "distributed", several)
        again = Passes(adapter_dtype="fp8")
        again.run(model, x)
    assert kinds(again) == dict.fromkeys("qkvo", "fp8")


def test_what_is_not_there_yet_has_clamped_nothing() -> None:
    """As in `explain`, and wherever a model is looked at before it is loaded."""
    with FakeTensorMode():
        model, x = PlainLora(), torch.randn(8, 32)
        config = falqon_fx.FalqonConfig(adapter_dtype="fp8")
        result = falqon_fx.rewrite(torch.fx.symbolic_trace(model), [x], config)
    (site,) = result.report.sites
    assert parse_spec(site.spec).adapter == "fp8"
    assert not result.report.graphs[0].notes
