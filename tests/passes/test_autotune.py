"""Timing before compilation, on CPU as on a GPU: which choices it makes, and what reports say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from falqon_fx import FalqonConfig, FalqonError, backend, explain
from falqon_fx.kernels import hardware
from falqon_fx.kernels.gemm.tiles import GemmProblem
from falqon_fx.kernels.products import choice, contest, dispatch
from falqon_fx.kernels.products.choice import Candidate, Choice, Choices, run_once
from falqon_fx.kernels.products.problem import key_of
from falqon_fx.ops import fp8_gpu, fp8_grad, gpu, products
from falqon_fx.ops import grad_x as op_of_grad_x
from falqon_fx.ops import merged_linear as ops
from falqon_fx.ops.adapter_grads import adapter_grads_on_gpu, grad_out_a_on_gpu
from falqon_fx.passes import autotune as autotuning
from falqon_fx.passes import transposes
from falqon_fx.passes.autotune import autotune
from falqon_fx.passes.match.pair import match
from falqon_fx.passes.normalize import normalize
from falqon_fx.passes.plan import Plan, plan
from falqon_fx.report.kernels import source
from falqon_fx.site.spec import SiteSpec
from tests.models import LoraLinear, fill_b
from tests.sites import needs_row_scales, randn

WIDTH = 64


class Mlp(nn.Module):
    """Two siblings and a site behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (LoraLinear(WIDTH, 96, 16, bias=True) for _ in range(2))
        self.down = LoraLinear(96, WIDTH, 16, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.maximum(F.relu(self.gate(x)), self.up(x)))


class Attention(nn.Module):
    """Siblings of which one is frozen, and a frozen linear layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = LoraLinear(WIDTH, 96, 16), LoraLinear(WIDTH, 96, 8)
        self.k, self.o = nn.Linear(WIDTH, 96, bias=False), nn.Linear(96, WIDTH)
        for frozen in (self.k, self.o):
            frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * torch.tanh(self.k(x)) + torch.tanh(self.v(x)))


class Dropped(LoraLinear):
    """An adapter behind a dropout."""

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.lora_B(self.lora_A(F.dropout(x, 0.5)))
        return self.base_layer(x) + adapter * self.scaling


class Twice(LoraLinear):
    """Two adapters on one base layer."""

    def __init__(self, features: int, out: int, rank: int) -> None:
        super().__init__(features, out, rank)
        self.second_lora_A = nn.Linear(features, rank // 2, bias=False)
        self.second_lora_B = nn.Linear(rank // 2, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.lora_B(self.lora_A(x)) * self.scaling
        second = self.second_lora_B(self.second_lora_A(x)) * 0.5
        return self.base_layer(x) + first + second


class Rows:
    def __init__(self, pending: str) -> None:
        self.options = {"update": "rows", "pending": pending}

    def __call__(self) -> nn.Module:
        model = Mlp()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
        return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "siblings": Mlp,
    "frozen layers": Attention,
    "dropout": lambda: Dropped(WIDTH, 96, 16),
    "two adapters": lambda: Twice(WIDTH, 96, 16),
    "rows, applied": Rows("apply"),
    "rows, held": Rows("hold"),
}


class Told(Choices):
    """Each candidate runs once; ``wins`` is the fastest where it is one of them."""

    def __init__(self, wins: str) -> None:
        super().__init__(f"card on which {wins} wins", run_once)
        self.wins = wins
        self.made: list[Any] = []

    def get(self, *args, time: bool = True) -> Choice:
        return super().get(*args, time=True)

    def _measure(
        self, key: str, candidates: Mapping[str, Candidate], plain: Candidate | None
    ) -> tuple[Choice, bool]:
        made, lasting = super()._measure(key, candidates, plain)
        self.made.append(key)
        return replace(made, winner=self.wins) if self.wins in made.seconds else made, lasting


@pytest.fixture
def told(monkeypatch, tmp_path):
    """CPU tensors go the way of a GPU's; a function that says what is to win."""
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path))
    monkeypatch.setattr(autotuning, "_has_choices", lambda group, spec: True)
    monkeypatch.setattr(backend, "_on_gpu", lambda result: True)
    monkeypatch.setattr(
        ops, "lower_merged_linear", lambda m: (fp8_gpu if m.alpha else gpu).merged_linear(m)
    )
    monkeypatch.setattr(op_of_grad_x, "lower_grad_x", gpu.merged_linear_grad_x)
    monkeypatch.setattr(fp8_grad, "lower_grad", fp8_gpu.merged_linear_grad)
    monkeypatch.setattr(ops, "lower_adapter_grads", adapter_grads_on_gpu)
    monkeypatch.setattr(ops, "lower_grad_out_a", grad_out_a_on_gpu)
    # What these CPU tensors are multiplied by is interpreted, which Inductor can't compile.
    monkeypatch.setattr(products, "sizes_known", lambda args: False)

    def use(wins: str) -> Told:
        choices = Told(wins)
        for place in (choice, contest, dispatch):
            monkeypatch.setattr(place, "choices_for", lambda device: choices)
        return choices

    return use


OPTIONS = {"kernel": "scaled_mm", "granularity": "tensor", "card": "H100"}


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    make = MODELS[name]
    model = make().bfloat16()
    fill_b(model)
    return model, {**OPTIONS, **getattr(make, "options", {})}


def step(name: str = "siblings", **change) -> list[Tensor]:
    """Output and gradients of one step."""
    torch._dynamo.reset()
    model, options = made(name)
    x = randn(2, 5, WIDTH).bfloat16().requires_grad_()
    y = torch.compile(model, backend="falqon", fullgraph=True, options={**options, **change})(x)
    y.sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *grads]


@pytest.mark.parametrize("name", MODELS)
def test_all_choices_of_a_step_fall_before_it_runs(name, told, monkeypatch):
    choices, before = told("scaled_mm"), []
    compiled = backend._compile

    def compile_(*args):
        before.extend(choices.made)
        return compiled(*args)

    monkeypatch.setattr(backend, "_compile", compile_)
    step(name, inner="eager")
    assert before
    assert choices.made == before  # the step itself found them all


def test_a_kernel_that_takes_no_such_product_is_an_error_of_the_site(told, monkeypatch):
    told("scaled_mm")
    monkeypatch.setattr(dispatch, "libraries", lambda *given: iter([("scaled_mm", refuse)]))
    with pytest.raises(Exception, match=r"no kernel takes forward .*off today") as no:
        step(inner="eager")
    error = getattr(no.value, "inner_exception", None)
    assert isinstance(error, FalqonError)
    assert (error.site, error.remedy) == ("gate", 'kernel="auto" takes what there is')


def refuse(*given, **options) -> Tensor:
    raise ValueError("it is off today")


def test_which_choices_those_are(told):
    choices = told("scaled_mm")
    step(inner="eager")
    # Two groups, the siblings and the site behind them: O_A, O and dL/dx of each.
    assert [key.split(" ")[0] for key in choices.made] == ["forward", "forward", "dL/dx"] * 2
    rows = [key.split("rows=")[1].split("), ")[0] for key in choices.made]
    assert rows == ["(16, 16", "(96, 96", "(64,", "(16,", "(64,", "(96,"]


@needs_row_scales
def test_choices_of_adapters_in_fp8_fall_before_a_step_too(told, graphs):
    """O and dL/dx of the siblings, and of the site behind them: no O_A is chosen for apart."""
    choices = told("scaled_mm+joined")
    step(inner="eager", adapter_dtype="fp8")
    assert [key.split(" n=")[0] for key in choices.made] == ["forward in K", "dL/dx in K"] * 2
    assert [site.kernel for site in graphs.pop().sites] == ["scaled_mm+joined"] * 3


def test_choices_by_copies_of_w_are_choices_of_their_own(told, graphs, monkeypatch):
    """Where W is kept transposed, and with room for adapters; a frozen sibling is none of them."""
    monkeypatch.setattr(transposes, "on_gpu", lambda value: True)
    monkeypatch.setattr(hardware, "memory", lambda device: 80 * 2**30)
    choices = told("scaled_mm+kept")
    step("frozen layers", inner="eager", adapter_dtype="fp8")
    made = {key.split(" n=")[0] for key in choices.made}
    assert made == {"forward", "forward in K by kept", "dL/dx by kept", "dL/dx in K by kept"}
    named = {site.path.split(".")[0]: site.kernel for site in graphs.pop().sites}
    assert named == {
        "q": "scaled_mm+kept",
        "v": "scaled_mm+kept",
        "k": "scaled_mm",
        "o": "scaled_mm",
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_report_names_what_computes_each_site(name, told, graphs):
    """Of siblings, too: what won for the product that they share."""
    told("scaled_mm")
    step(name, inner="eager")
    sites = graphs.pop().sites
    assert sites
    for site in sites:
        assert site.kernel == "scaled_mm"
        rows = site.kernel_reason.split("rows=(")[1].split(")")[0].replace(",", " ").split()
        assert str(site.out_features) in rows
        assert f" k={site.in_features}," in site.kernel_reason


def test_siblings_and_their_frozen_ones_are_named_by_their_own_launches(told, graphs):
    told("scaled_mm")
    step("frozen layers", inner="eager")
    (report,) = graphs
    reasons = {site.path.split(".")[0]: site.kernel_reason for site in report.sites}
    assert "rows=(96, 96)" in reasons["q"]
    assert "rank=16" in reasons["q"]
    assert reasons["v"] == reasons["q"]
    assert "rows=(96,)" in reasons["k"]
    assert "rank=0" in reasons["k"]
    assert "rows=(64,)" in reasons["o"]


def test_a_shape_that_another_problem_has_too_is_not_confused_with_it(told):
    """A choice for k features and the same rows, but of another rank, says nothing."""
    choices, spec = told("scaled_mm"), SiteSpec("tensor", "pow2", "e5m2")
    plan = planned()
    operands = autotuning.Operands.of(plan.groups[1], plan)
    (problem,) = operands.problems(spec)
    device = torch.device("cpu")
    choices.get(key_of("forward", problem), {"scaled_mm": lambda: 1.0})
    assert dispatch.forward_choice(device, problem, "auto").winner == "scaled_mm"
    for change in ({"rank": 8}, {"rows": (64, 16)}, {"n": 100}, {"bias": "none"}):
        other = replace(problem, **change)
        assert isinstance(other, GemmProblem)
        assert dispatch.forward_choice(device, other, "auto") is None
    assert dispatch.forward_choice(device, problem, "triton") is None


def planned(**options) -> Plan:
    model, _ = made("siblings")
    graphs = []

    def keep(gm, inputs):
        graphs.append((gm, inputs))
        return lambda *args: args

    torch._dynamo.reset()
    with contextlib.suppress(Exception):  # what comes back is no result
        torch.compile(model, backend=keep)(randn(10, WIDTH).bfloat16())
    ((gm, inputs),) = graphs
    root = normalize(gm, inputs)
    return plan(root, *match(root), FalqonConfig(**{**OPTIONS, "kernel": "auto", **options}))


def test_without_time_nothing_is_timed_and_what_was_timed_before_is_reported(told, monkeypatch):
    told("scaled_mm")
    timed = []
    monkeypatch.setattr(autotuning, "time_products", lambda *args: timed.append(args))
    silent = autotune(planned(kernel="scaled_mm"), time=False)
    assert [site.report for site in silent.sites] == [
        site.report for site in planned(kernel="scaled_mm").sites
    ]
    assert timed == []


def test_what_was_timed_is_reported_without_timing_it_again(told, monkeypatch):
    choices = told("scaled_mm")
    wanted = autotune(planned(kernel="scaled_mm"))
    assert choices.made
    monkeypatch.setattr(autotuning, "time_products", None)
    again = autotune(planned(kernel="scaled_mm"), time=False)
    reports = [site.report for site in again.sites]
    assert reports == [site.report for site in wanted.sites]
    assert all(report.kernel_reason.startswith("forward ") for report in reports)


def test_the_source_of_what_won_is_the_one_that_ran(told, graphs):
    """Of siblings too, whose kernel none has for a site alone."""
    told("none in particular")
    step(inner="eager", kernel="triton")
    for site in graphs.pop().sites:
        assert site.kernel.startswith("triton:")
        text = source(site)
        assert "def gemm(" in text
        pieces = 1 if site.path.startswith("down") else 2
        assert f"pieces={pieces}," in text.replace("\n#  ", "")
        unknown = replace(site, kernel="triton:gemm_of_another_machine")
        assert source(unknown).endswith("its source is not on this machine")


@pytest.mark.parametrize("name", ["siblings", "two adapters"])
def test_inductor_gives_the_numbers_of_eager(name, told):
    """Bit for bit: between these sites nothing is rounded that Inductor would round elsewhere."""
    told("scaled_mm")
    wanted = step(name, inner="eager")
    for actual, expected in zip(step(name, inner="inductor"), wanted, strict=True):
        assert torch.equal(actual, expected)


def test_a_choice_is_made_once_for_equal_groups_and_again_by_nobody(told):
    choices = told("scaled_mm")
    step(inner="eager")
    first = len(choices.made)
    step(inner="eager")
    assert len(choices.made) == first
    again = told("scaled_mm")
    step(inner="eager")
    assert again.made == []  # another process reads them


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_timed_for_backward(told, mode):
    choices = told("scaled_mm")
    torch._dynamo.reset()
    model, options = made("siblings")
    with mode():
        compiled = torch.compile(model, backend="falqon", options={**options, "inner": "eager"})
        compiled(randn(5, WIDTH).bfloat16())
    assert choices.made
    assert not [key for key in choices.made if key.startswith("dL")]


def test_random_numbers_autocast_and_gradients_of_the_model_stay(told):
    told("dequantize")
    torch._dynamo.reset()
    model, options = Mlp(), {"kernel": "dequantize", "inner": "eager"}
    torch.manual_seed(3)
    wanted = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.compile(model, backend="falqon", options=options)(randn(5, WIDTH))
    assert torch.equal(torch.get_rng_state(), wanted)
    assert all(p.grad is None for p in model.parameters())


def test_on_a_cpu_nothing_is_timed(graphs, monkeypatch):
    def never(*args):
        raise AssertionError("timed")

    monkeypatch.setattr(autotuning, "time_products", never)
    step(inner="eager", kernel="auto", card=None)
    assert {site.kernel for site in graphs.pop().sites} == {"aten"}
    model, _ = made("siblings")
    report = explain(model, randn(5, WIDTH).bfloat16(), config=FalqonConfig(card="H100"))
    assert all("times them and the library's" in site.kernel_reason for site in report.sites)
