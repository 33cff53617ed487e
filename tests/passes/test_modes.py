"""Sites under torch.no_grad() and torch.autocast()."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import backend
from falqon_fx.passes.modes import modes
from tests.models import LoraLinear, fill_b

FUSED = torch.ops.falqon.merged_linear.default


class Two(nn.Module):
    """Two layers that read one x; the first picks, as an indexer of attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.picks, self.computes = LoraLinear(32, 48), LoraLinear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            picked = self.picks(x).argmax(-1, keepdim=True)
        return self.computes(x) * (picked + 1)


class Three(nn.Module):
    """q, k and v behind something that is computed without gradients, as rotary embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (LoraLinear(32, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            angle = torch.arange(4.0)[:, None].cos()
        return self.q(x) * angle + self.k(x) * self.v(x)


class Partly(nn.Module):
    """A base layer in one mode, its adapter in another."""

    def __init__(self, mode: Callable[[], torch.autograd.grad_mode.no_grad]) -> None:
        super().__init__()
        self.proj, self.mode = LoraLinear(32, 16), mode

    def forward(self, x: Tensor) -> Tensor:
        proj = self.proj
        with self.mode():
            y = proj.base_layer(x)
        return y + proj.lora_B(proj.lora_A(x)) * proj.scaling


@pytest.fixture
def results(monkeypatch) -> list[falqon_fx.RewriteResult]:
    torch._dynamo.reset()
    made: list[falqon_fx.RewriteResult] = []
    rewrite = backend.rewrite
    monkeypatch.setattr(backend, "rewrite", lambda *args: made.append(rewrite(*args)) or made[-1])
    return made


def run(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """Output, dL/dx and the gradients of all parameters."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    model.zero_grad()
    y = call(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def test_a_site_without_gradients_takes_no_siblings_with_it(results):
    model = Two()
    fill_b(model)
    wanted = run(model, model)
    got = run(model, torch.compile(model, backend="falqon", options={"inner": "eager"}))
    (report,) = (result.report for result in results)
    assert [site.path for site in report.sites] == ["picks", "computes"]
    assert len(results[0].gm.graph.find_nodes(op="call_function", target=FUSED)) == 2
    for (name, _), ours, theirs in zip(
        [("", None), ("", None), *model.named_parameters()], got, wanted, strict=True
    ):
        assert name.endswith("lora_A.weight") or (ours is None) == (theirs is None), name
    # Within the casts: the cosine that tests/test_zoo.py asks of whole models.
    gradient = model.computes.lora_B.weight.grad
    eager = dict(zip((n for n, _ in model.named_parameters()), wanted[2:]))[
        "computes.lora_B.weight"
    ]
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), eager.flatten(), dim=0) > 0.9


def test_siblings_stay_together_where_the_mode_is_back(results):
    model = Three()
    fill_b(model)
    run(model, torch.compile(model, backend="falqon", options={"inner": "eager"}))
    (op,) = results[0].gm.graph.find_nodes(op="call_function", target=FUSED)
    assert len(op.args[1]) == 3


@pytest.mark.parametrize(
    "mode", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["grad", "autocast"]
)
def test_a_site_that_is_partly_in_a_mode_is_refused_and_left_as_it_is(mode, results):
    model = Partly(mode)
    fill_b(model)
    wanted = run(model, model)
    got = run(model, torch.compile(model, backend="falqon", options={"inner": "eager"}))
    (refused,) = results[0].report.rejected
    assert refused.site == "proj"
    assert "covers a part of it alone" in refused.reason
    assert not results[0].report.sites
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(ours, theirs)


def test_inference_mode_and_nested_autocast_are_entered_and_left():
    def model(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ x
            with torch.autocast("cpu", enabled=False):
                z = x @ x
            return y + z + x @ x

    graphs = []
    torch._dynamo.reset()
    torch.compile(model, backend=lambda gm, _: graphs.append(gm.graph) or gm.forward)(torch.eye(4))
    of = modes(graphs[0])
    first, inner, last = (of[n] for n in graphs[0].nodes if "matmul" in str(n.target))
    assert first == last
    assert (len(first), len(inner)) == (2, 3)
