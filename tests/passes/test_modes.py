"""Sites under torch.no_grad(), torch.autocast() and the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint

import falqon_fx
from falqon_fx import backend
from falqon_fx.passes.modes import modes, transformed
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
    """q, k and v around something that is computed without gradients, as rotary embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (LoraLinear(32, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        with torch.no_grad():
            angle = torch.arange(4.0)[:, None].cos()
        return q * angle + self.k(x) * self.v(x)


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
    monkeypatch.setattr(
        backend, "rewrite", lambda *a, **k: made.append(rewrite(*a, **k)) or made[-1]
    )
    return made


def run(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """Output, dL/dx and the gradients of all parameters."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    model.zero_grad()
    y = call(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def test_a_site_without_gradients_takes_no_siblings_with_it(results):
    torch.manual_seed(5)  # no pick is so close that the casts decide it
    model = Two()
    fill_b(model)
    wanted = run(model, model)
    got = run(model, torch.compile(model, backend="falqon", options={"inner": "eager"}))
    (report,) = (result.report for result in results)
    assert [site.path for site in report.sites] == ["picks", "computes"]
    assert len(results[0].gm.graph.find_nodes(op="call_function", target=FUSED)) == 2
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours is None) == (theirs is None)
    # Within the casts: the cosine that tests/test_zoo.py asks of whole models.
    eager = dict(zip((n for n, _ in model.named_parameters()), wanted[2:]))
    for part in ("lora_A", "lora_B"):
        gradient = model.computes.get_parameter(f"{part}.weight").grad
        wide = eager[f"computes.{part}.weight"]
        assert cosine_similarity(gradient.flatten(), wide.flatten(), dim=0) > 0.9


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
    options = {"inner": "eager", "frozen": "leave"}
    got = run(model, torch.compile(model, backend="falqon", options=options))
    (refused,) = results[0].report.rejected
    assert refused.site == "proj"
    assert "covers a part of it alone" in refused.reason
    assert not results[0].report.sites
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(ours, theirs)


def test_the_base_of_such_a_site_runs_in_fp8_in_its_own_mode(results):
    model = Partly(torch.no_grad)
    fill_b(model)
    wanted = run(model, model)
    got = run(model, torch.compile(model, backend="falqon", options={"inner": "eager"}))
    assert [(s.path, s.adapters) for s in results[0].report.sites] == [("proj.base_layer", 0)]
    assert len(results[0].report.rejected) == 1
    for ours, theirs in zip(got[1:], wanted[1:], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("part", ["lora", "frozen"])
def test_a_cast_without_gradients_goes_on_cutting_them_off(part, results):
    """Sites read what casts were made from, but not through this one."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora, self.frozen = LoraLinear(64, 64), nn.Linear(64, 64).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                cut = x.bfloat16().float()
            return getattr(self, part)(cut) + x.sum()

    model = Cut()
    fill_b(model)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = torch.compile(model, backend="falqon", options={"inner": "eager"})(x)
    assert len(results[0].report.sites) == 1
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, y.numel()))


def test_a_cast_of_the_result_in_another_mode_is_no_part_of_the_site(results):
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(64, 64).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.proj(x)
            with torch.no_grad():
                return y.bfloat16()

    compiled = torch.compile(Outside(), backend="falqon", options={"inner": "eager"})
    assert not compiled(torch.ones(4, 64, requires_grad=True)).requires_grad
    (site,) = results[0].report.sites
    assert site.out_dtype == "float32"


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


# -- torch.func ------------------------------------------------------------------------------------


class Sample(nn.Module):
    """A LoRA layer and a frozen one that is wide enough for FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.lora, self.frozen = LoraLinear(32, 64), nn.Linear(64, 72).requires_grad_(False)
        fill_b(self, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.lora(x))

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().sum()


TRANSFORMS: dict[str, Callable[[Sample, Tensor], object]] = {
    "vmap": lambda m, x: torch.func.vmap(m.forward)(x),
    "grad": lambda m, x: torch.func.grad(m.loss)(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x.cos(),)),
    "vjp": lambda m, x: torch.func.vjp(m, x)[1](torch.ones(4, 72)),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x[0]),
    "jacfwd": lambda m, x: torch.func.jacfwd(m)(x[0]),
    "hessian": lambda m, x: torch.func.hessian(m.loss)(x[0]),
    "a gradient a sample": lambda m, x: torch.func.vmap(torch.func.grad(m.loss))(x),
    "a checkpoint in vmap": lambda m, x: torch.func.vmap(
        lambda one: checkpoint(m, one, use_reentrant=False)
    )(x),
    "vmap in a checkpoint": lambda m, x: checkpoint(
        torch.func.vmap(m.forward), x, use_reentrant=False
    ),
}

BY = {"grad": "inductor", "jvp": "aot_eager", "hessian": "aot_eager", "vmap": "aot_eager"}


def example() -> Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(2))


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flat(part)]


# The fast tests compile once by Inductor: what is left alone is its own business.
@pytest.mark.parametrize(
    ("function", "inner"),
    [
        pytest.param(
            function,
            inner,
            id=f"{name}-{inner}",
            marks=[] if inner == BY.get(name, "eager") else pytest.mark.slow,
        )
        for name, function in TRANSFORMS.items()
        for inner in ("eager", "aot_eager", "inductor")
    ],
)
def test_a_site_in_a_transform_of_torch_func_is_left_alone(function, inner, results):
    """Its numbers are those of the inner compiler alone, and eager's but where Inductor sums."""
    model, x = Sample(), example()
    try:
        wanted = flat(function(model, x))
    except RuntimeError as error:  # torch 2.11 on checkpoints in vmap
        if "does not have vmap support" not in str(error):
            raise
        pytest.skip("this torch can't run it uncompiled")
    call = torch.compile(
        lambda x: function(model, x), backend="falqon", options={"inner": inner}, fullgraph=True
    )
    got = flat(call(x))
    torch._dynamo.reset()
    other = flat(torch.compile(lambda x: function(model, x), backend=inner, fullgraph=True)(x))
    for ours, theirs, eager in zip(got, other, wanted, strict=True):
        assert torch.equal(ours, theirs)
        if inner != "inductor":
            assert torch.equal(ours, eager)
    (report,) = (result.report for result in results)
    assert not report.sites
    reasons = {item.reason for item in (*report.rejected, *report.left)}
    assert reasons == {"it runs inside a torch.func transform"}
    assert len(report.rejected) == len(report.left) == 1


def test_a_site_beside_a_transform_is_rewritten(results):
    model, x = Sample(), example()

    def both(x: Tensor) -> Tensor:
        return torch.func.vmap(model.forward)(x) + model(x)

    torch.compile(both, backend="falqon", options={"inner": "eager"}, fullgraph=True)(x)
    (report,) = (result.report for result in results)
    assert [site.adapters for site in report.sites] == [1, 0]
    assert len(report.rejected) == len(report.left) == 1


@pytest.mark.parametrize("name", ["vmap", "grad", "jvp"])
def test_dynamo_writes_a_transform_between_the_marks_that_are_looked_for(name):
    graphs: list[fx.Graph] = []
    model = Sample()
    torch._dynamo.reset()
    torch.compile(
        lambda x: TRANSFORMS[name](model, x),
        backend=lambda gm, _: graphs.append(gm.graph) or gm.forward,
        fullgraph=True,
    )(example())
    of = modes(graphs[0])
    linears = [n for n in graphs[0].nodes if n.target is torch._C._nn.linear]
    assert len(linears) == 4
    assert all(transformed(of[n]) for n in linears)
    assert not transformed(of[graphs[0].output_node()])
