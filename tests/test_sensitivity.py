"""What the casts of each layer are expected to cost, by Fisher information."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.errors import FalqonConfigError
from falqon_fx.model import batches as told
from falqon_fx.model.sensitivity import CastCost, cast_costs
from falqon_fx.model.sensitivity import sensitivity as ranked
from falqon_fx.model.sorting import sort_layers
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests.sites import cast, randn
from tests.tolerances import SIGMAS, gamma

IN = CLASSES = 64
SPEC = SiteSpec.from_config(FalqonConfig())


class Two(nn.Module):
    """``out`` makes the logits of x and of what ``up`` adds to it; frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(IN, IN, bias=False), nn.Linear(IN, CLASSES, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.out(x + self.up(x))


def model() -> Two:
    torch.manual_seed(0)
    return Two().requires_grad_(False)


def sensitivity(net: nn.Module, batches: Any, seed: int = 0) -> dict[str, float]:
    return ranked(costs(net, batches, seed))


def costs(net: nn.Module, batches: Any, seed: int = 0) -> dict[str, CastCost]:
    config = FalqonConfig(seed=seed)
    return cast_costs(net, sort_layers(net, config)[0], batches, config)


def error_of(weight: Tensor, x: Tensor) -> Tensor:
    """δO, float64."""
    read = cast(x.reshape(-1, IN), E4M3, SPEC)
    made = read @ cast_base(weight, SPEC).dequantize().double().t()
    return (made - x.reshape(-1, IN).double() @ weight.double().t()).view(*x.shape[:-1], -1)


def test_it_is_half_the_square_of_each_sequence():
    """Against the formula in float64, with the labels drawn as it draws them. The head's gradient
    is p - e_y; that of ``up`` goes through the head. float32 sums over tokens and features.
    """
    net, x = model().eval(), randn(3, 7, IN)
    found = sensitivity(net, [(x,)], seed=5)
    up, head = net.up.weight, net.out.weight
    p = net(x).detach().softmax(-1)
    generator = torch.Generator().manual_seed(5)
    drawn = torch.multinomial(p.reshape(-1, CLASSES), 1, generator=generator).view(3, 7)
    grad = p.double() - nn.functional.one_hot(drawn, CLASSES)
    inner = x + x @ up.t()
    size = p.double() + nn.functional.one_hot(drawn, CLASSES)  # of what the gradient is made of
    for site, g, of, weight, read in (
        ("out", grad, size, head, inner),
        ("up", grad @ head.double(), size @ head.double().abs(), up, x),
    ):
        error = error_of(weight, read)
        each = (g * error).sum((1, 2))
        wanted = 0.5 * float(each.square().sum()) / 21
        # The error is a difference of two sums of IN products, each in float32, of operands that
        # casts make larger by a sixteenth at most; softmax, the head and the sum over a sequence
        # are less than 200 roundings.
        noise = gamma(IN + 4) * 2.2 * (read.double().abs() @ weight.double().abs().t())
        off = (of * (noise + gamma(200) * error.abs())).sum((1, 2))
        bound = float((off * (each.abs() + off)).sum()) / 21
        assert abs(found[site] - wanted) <= bound


def test_of_single_tokens_it_is_the_variance_that_makes_the_kl():
    """½ · Var_p(δO) for each token, within six standard errors of the draw."""
    net, x = model().eval(), randn(2000, 1, IN)
    nn.init.zeros_(net.up.weight)
    found = sensitivity(net, [(x,)])["out"]
    p = net(x).detach().double().softmax(-1)
    error = error_of(net.out.weight, x)
    mean = (p * error).sum(-1, keepdim=True)
    square = (mean - error).square()  # of ⟨p - e_y, δ⟩ for each y
    wanted = 0.5 * (p * square).sum(-1)
    spread = ((p * (0.5 * square).square()).sum(-1) - wanted.square()).mean().sqrt()
    assert abs(found - float(wanted.mean())) < SIGMAS * float(spread) / 2000**0.5
    q = (p.log() + error).softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    # The next order: a third of the cube of what the log-probabilities move by.
    assert abs(float(wanted.mean() - kl.mean())) < float(error.abs().amax(-1).pow(3).mean())


def test_labels_and_masks_say_which_tokens_count():
    net, x = model().eval(), randn(2, 6, IN)
    labels = torch.full((2, 6), -100)
    labels[0, 3] = 1
    one = sensitivity(net, [{"x": x, "labels": labels}])
    assert all(value > 0 for value in one.values())
    with pytest.raises(FalqonError, match="no label in its batches"):
        sensitivity(net, [{"x": x, "labels": torch.full((2, 6), -100)}])


def test_nothing_of_the_model_changes_and_explain_tells():
    net, x = model(), randn(2, 6, IN)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.random.get_rng_state()
    report = falqon_fx.explain(net, x, calibration=[(x,)])
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(module.training and not module._forward_hooks for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert report.most_sensitive(1) == tuple(report.sensitivity)[:1]
    assert "expected rise of the loss by the casts" in str(report)
    assert type(report).from_json(report.to_json()).sensitivity == report.sensitivity
    left = FalqonConfig(exclude=report.most_sensitive(1))
    done = falqon_fx.prepare(net, left, progress=False)
    assert len(done.prepared) == 1
    assert set(done.skipped) == set(report.most_sensitive(1))


class Habits(nn.Module):
    """Three frozen layers, called in one ``way``; all ways compute the same."""

    def __init__(self, way: str = "plainly") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.a, self.b, self.c = (nn.Linear(IN, IN).requires_grad_(False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        way = self.way
        if way == "no gradient":
            with torch.no_grad():
                x = self.a(x)
        else:
            x = self.a(input=x) if way == "by name" else self.a(x)
        middle: Any = self.middle
        if "checkpoint" in way:
            x = checkpoint(middle, x, use_reentrant="reentrant" in way)
        else:
            x = middle(x)
        return self.c(x)

    def middle(self, x: Tensor) -> Tensor:
        x = self.b(x)
        return x.relu_() if self.way == "in place" else x.relu()


@pytest.mark.parametrize("way", ["in place", "checkpoint", "by name"])
def test_however_a_model_calls_its_layers_their_casts_cost_the_same(way):
    x = randn(2, 3, IN)
    wanted, found = costs(Habits(), [x]), costs(Habits(way), [x])
    assert wanted.keys() == found.keys() == {"a", "b", "c"}
    assert found == wanted


def test_what_no_gradient_reaches_is_not_said_to_cost_anything():
    found = costs(Habits("no gradient"), [randn(2, 3, IN)])
    assert found.keys() == {"b", "c"}


def test_a_checkpoint_that_has_no_gradients_is_refused():
    with pytest.raises(FalqonError, match="use_reentrant=False"):
        costs(Habits("reentrant checkpoint"), [randn(2, 3, IN)])


class Sum(Two):
    """``out`` is called twice, or its output taken twice."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.out(x) + self.out(x) if self.calls == 2 else 2 * self.out(x)


def test_errors_of_all_calls_of_a_layer_meet():
    """Doubling is exact, of the output and of its error."""
    found = []
    for calls in (1, 2):
        torch.manual_seed(0)
        found.append(costs(Sum(calls).requires_grad_(False), [randn(3, 5, IN)])["out"])
    assert found[0] == found[1]


class Classes(Two):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x).mean(1)


def test_of_sequences_that_are_classified_each_has_a_label():
    net, x = Classes().requires_grad_(False), randn(4, 6, IN)
    every = costs(net, [{"x": x, "labels": torch.tensor([1, 2, 3, 0])}])
    assert every == costs(net, [x])
    first = costs(net, [{"x": x, "labels": torch.tensor([1, -100, -100, -100])}])
    assert all(cost.both > 0 for cost in first.values())
    assert first != every


def test_a_weight_of_zeros_costs_nothing_and_leaves_others_in_order():
    net = model()
    nn.init.zeros_(net.up.weight)
    config = FalqonConfig(exclude="sensitive:1")
    asked: dict[str, Any] = {"calibration": [randn(2, 6, IN)], "compensate": 0, "outliers": 4}
    report = falqon_fx.prepare(net, config, progress=False, **asked)
    assert report.config.exclude == ("out",)


def test_logits_that_are_no_numbers_are_refused():
    net = model()
    x = torch.full((2, 3, IN), torch.nan)
    with pytest.raises(FalqonError, match="logits of its batch 1 hold NaN"):
        costs(net, [randn(2, 3, IN), x])


def test_a_log_tells_how_far_a_calibration_is(monkeypatch, capsys):
    """Each pass, and what is made of it; all the times that are a while apart."""
    monkeypatch.setattr(told, "EVERY", -1.0)
    falqon_fx.prepare(model(), calibration=[randn(2, 6, IN)] * 3, compensate="auto")
    lines = [line for line in capsys.readouterr().err.splitlines() if "calibrating" in line]
    assert lines == [
        *(f"falqon: calibrating: {n} batches, {12 * n} labels: what casts cost" for n in (1, 2, 3)),
        *(f"falqon: calibrating: {n} batches, {12 * n} tokens" for n in (1, 2, 3)),
        *(f"falqon: calibrating: what {n} of 2 layers read is taken apart" for n in (1, 2)),
    ]


class NoLogits(Two):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return {"loss": super().forward(x).sum()}


@pytest.mark.parametrize("batches", [[], [randn(2, 3)], 7, ["text"]])
def test_bad_batches_are_refused(batches):
    with pytest.raises(FalqonError, match="calibration"):
        sensitivity(model(), batches)


def test_a_model_without_logits_and_a_config_without_a_model_are_refused():
    net = NoLogits().requires_grad_(False)
    with pytest.raises(FalqonError, match="returns a dict"):
        sensitivity(net, [randn(2, 3, IN)])


def test_a_number_of_sensitive_layers_is_named_by_prepare_and_explain():
    config, x = FalqonConfig(exclude="sensitive:1"), randn(2, 6, IN)
    with pytest.raises(FalqonConfigError, match=r"most_sensitive\(1\)"):
        falqon_fx.prepare(model(), config, progress=False)
    worst = next(iter(sensitivity(model(), [(x,)])))
    told = falqon_fx.explain(model(), x, config=config, calibration=[x])
    assert told.options["exclude"] == str((worst,))
    asked: dict[str, Any] = {"calibration": [(x,)], "compensate": 0, "outliers": 0}
    done = falqon_fx.prepare(net := model(), config, progress=False, **asked)
    assert done.config.exclude == (worst,)
    assert set(done.skipped) == {worst}
    torch._dynamo.reset()
    options: dict[str, Any] = {"exclude": "sensitive:1", "inner": "eager"}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a calibration names"):
        torch.compile(net, backend="falqon", options=options)(x)


def test_layers_are_left_by_what_a_calibration_does_not_buy_back():
    """``out`` is exact in FP8 but for one channel of its x that is 30 times as large as the others,
    of which ``up`` reads nothing: that channel's error is bought back, those of ``up``'s W and x
    are not.
    """
    net, x = model(), randn(40, 6, IN)
    x[..., 0] *= 30
    net.out.weight.copy_(net.out.weight.sign() / 16)
    for line in (net.up.weight[:, 0], net.up.weight[0]):
        line.zero_()
    state = net.state_dict()
    config = FalqonConfig(exclude="sensitive:1")
    for outliers, left in ((0, "out"), (1, "up")):
        (again := model()).load_state_dict(state)
        asked: dict[str, Any] = {"calibration": [(x,)], "compensate": 0, "outliers": outliers}
        done = falqon_fx.prepare(again, config, progress=False, **asked)
        assert done.config.exclude == (left,)


def test_what_casts_cost_is_measured_once_for_all_that_ask():
    """The layers that are left and the budget of the others: one pass, and one for the moments."""
    net, calls = model(), list[Any]()
    net.register_forward_hook(lambda *_: calls.append(1))
    config = FalqonConfig(exclude="sensitive:1", inner="eager")
    falqon_fx.prepare(
        net, config, calibration=[(randn(2, 6, IN),)], compensate="auto", progress=False
    )
    assert len(calls) == 2


@pytest.mark.parametrize("pattern", ["sensitive:", "sensitive:0", "sensitive:x", "sensitive:-1"])
def test_other_numbers_of_sensitive_layers_are_refused(pattern):
    with pytest.raises(FalqonConfigError, match="is no pattern"):
        FalqonConfig(exclude=pattern)
