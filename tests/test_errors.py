"""Bad input: an error or a warning that names the site and the remedy, and nothing changed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import falqon_fx
from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError
from tests.models import Relu, Stack, compiled, fill_b, freeze_a, tiny_mlp
from tests.parameters import each_value


def refusal(model: nn.Module, call: nn.Module, *args: Tensor) -> FalqonError:
    """The error that a first call raises; no parameter may have changed.

    Dynamo wraps what a backend raises while it compiles.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises((FalqonError, BackendCompilerFailed)) as caught:
        call(*args)
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, FalqonError)
    assert str(error) in str(caught.value)  # all of it reaches the user
    for name, parameter in model.named_parameters():
        assert _same(parameter, before[name]), name
    assert not falqon_fx.adapters(model)
    return error


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and (a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num()))


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 10}, "option 'top_k': is unknown: the options are update, base_dtype, "),
        ({"top_k": 10}, "The nearest option is 'topk'"),
        ({"update": "row"}, "'row' is none of 'adapter', 'rows'. The nearest is 'rows'"),
        ({"granularity": "rows"}, "'rows' is none of 'tensor', 'row'. The nearest is 'row'"),
        ({"topk": 10}, "option 'topk': belongs to update=\"rows\""),
        ({"pending": "hold"}, 'Leave pending out, or set update="rows"'),
        ({"rounding": "nearest"}, 'with update="adapter" nothing is written'),
        ({"update": "rows", "topk": 0}, "the count 0 is below 1"),
        ({"update": "rows", "topk": -3}, "the count -3 is below 1"),
        ({"update": "rows", "topk": 1.5}, "the fraction 1.5 is outside"),
        ({"update": "rows", "topk": 0.0}, "the fraction 0.0 is outside"),
        ({"update": "rows", "topk": True}, "neither a count, a fraction nor 'all'"),
        ({"update": "rows", "topk": "most"}, "neither a count, a fraction nor 'all'"),
        ({"seed": -1}, "-1 is not an integer >= 0"),
        ({"include": 3}, "3 is not a list of patterns"),
        ({"config": {"seed": 10}}, "is not a FalqonConfig"),
    ],
)
def test_a_bad_option_is_named(options, words):
    model = Relu()
    error = refusal(model, compiled(model, **options), torch.randn(2, 32))
    assert isinstance(error, FalqonConfigError)
    assert words in str(error)


def test_a_topk_above_a_sites_rows():
    model = freeze_a(Relu())  # up has 48 rows, down 32
    error = refusal(model, compiled(model, update="rows", topk=40), torch.randn(2, 32))
    assert isinstance(error, FalqonConfigError)
    assert "down" in str(error)
    assert "40" in str(error)
    assert "32" in str(error)
    assert '"all"' in str(error)


def test_update_rows_with_a_trained_a_is_refused_and_names_the_other_update():
    model = Relu()
    error = refusal(model, compiled(model, update="rows"), torch.randn(2, 32))
    assert error.site == "up"
    assert "its lora_A is trained" in error.problem
    assert error.remedy == 'Set update="adapter", or freeze lora_A (requires_grad_(False))'


# -- parameters ------------------------------------------------------------------------------------


BAD = [float("nan"), -float("inf"), 1e5]


class Headed(nn.Module):
    """Two sites, and a frozen layer without an adapter that FP8 takes."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.out = Relu(64, 48), nn.Linear(64, 96).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.relu(x))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("path", ["relu.down", "out"])
def test_a_base_weight_that_fp8_can_not_hold(value, path):
    """With an adapter or without: no base is made of the layers before it either."""
    model, x = Headed(), torch.randn(2, 64)
    call, layer = compiled(model), model.get_submodule(path)
    weight = getattr(layer, "base_layer", layer).weight
    good = weight[1, 2].item()
    with torch.no_grad():
        weight[1, 2] = value
    error = refusal(model, call, x)
    assert error.site == path
    assert ("exceeds 65536" if value == 1e5 else "holds NaN or Inf") in error.problem
    assert "exclude=" in error.remedy
    with torch.no_grad():
        weight[1, 2] = good
    assert call(x).isfinite().all()  # repaired
    assert len(falqon_fx.adapters(model)) == 2


@pytest.mark.parametrize("value", BAD)
def test_exclude_is_a_remedy_for_a_bad_base_weight(value):
    model, x = Headed(), torch.randn(2, 64)
    with torch.no_grad():
        model.out.weight[1, 2] = value
    found, expected = compiled(model, exclude="out")(x), model(x)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert list(falqon_fx.adapters(model)) == ["relu.up", "relu.down"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_nan_or_inf_in_an_adapter_reaches_the_loss_as_in_the_original(value, name):
    """Nothing else remembers it: `GradScaler` sees it, and a repaired adapter is right again."""
    model, x = Relu(), torch.randn(2, 32)
    fill_b(model)
    call = compiled(model)
    first = call(x)
    parameter = getattr(model.down, name).weight
    good = parameter.detach().clone()
    with torch.no_grad():
        parameter[1, 2] = value
    assert torch.equal(call(x).isfinite(), model(x).isfinite())
    assert not call(x).isfinite().all()
    with torch.no_grad():
        parameter.copy_(good)
    assert torch.equal(call(x), first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_layer", "down: its base weight holds NaN or Inf"),
        ("lora_A", "down: its lora_A holds NaN or Inf"),
        ("lora_B", "down: its lora_B holds NaN or Inf"),
    ],
)
def test_nan_or_inf_in_a_parameter_with_update_rows(value, name, words):
    model = freeze_a(Relu())
    with torch.no_grad():
        getattr(model.down, name).weight[1, 2] = value
    error = refusal(model, compiled(model, update="rows"), torch.randn(2, 32))
    assert words in str(error)
    assert "exclude=" in str(error)


def test_nan_in_one_site_leaves_the_lora_a_of_the_others_alone():
    """init="svd" writes lora_A: it must not have begun."""
    model = Relu()
    with torch.no_grad():
        model.down.base_layer.weight[0, 0] = float("nan")
    error = refusal(model, compiled(model, init="svd"), torch.randn(2, 32))
    assert "down: its base weight holds NaN or Inf" in str(error)


def _swap(part: str, *shape: int) -> Callable[[nn.Module], None]:
    def act(model: nn.Module) -> None:
        getattr(model.up, part).weight = nn.Parameter(torch.randn(*shape))

    return act


def _move(part: str, to: object) -> Callable[[nn.Module], None]:
    return lambda model: getattr(model.up, part).to(to)


# Dynamo runs a model on fake tensors before any backend sees it. They have no rule for dtypes.
TORCHS_OWN = "cannot be multiplied|same reduction dim|broadcast|same device|different devices"
APART = {
    "another rank of A": (_swap("lora_A", 8, 32), TORCHS_OWN),
    "another width of A": (_swap("lora_A", 4, 31), TORCHS_OWN),
    "another rank of B": (_swap("lora_B", 48, 3), TORCHS_OWN),
    "another height of B": (_swap("lora_B", 47, 4), TORCHS_OWN),
    "device of A": (_move("lora_A", "meta"), TORCHS_OWN),
    "device of B": (_move("lora_B", "meta"), TORCHS_OWN),
    "device of W": (_move("base_layer", "meta"), TORCHS_OWN),
    "dtype of A": (_move("lora_A", torch.bfloat16), "up: .* torch.float32, .* torch.bfloat16"),
    "dtype of B": (_move("lora_B", torch.bfloat16), "up: .* torch.bfloat16, .* torch.float32"),
    "dtype of W": (_move("base_layer", torch.bfloat16), "up: .* torch.bfloat16, .* torch.float32"),
}


@each_value(what=list(APART), when=["before", "after"])
def test_parameters_that_came_apart_are_an_error(what, when, dynamo_stays_silent):
    """As in the original; with the parameters as they were all goes on."""
    model, x = Relu(), torch.randn(2, 32)
    fill_b(model)
    call, whole = compiled(model), copy.deepcopy(model)
    expected = compiled(whole)(x)
    if when == "after":
        assert torch.equal(call(x), expected)
    act, words = APART[what]
    act(model)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    if "device" not in what:  # a product with a meta tensor is one more
        with pytest.raises(RuntimeError):
            model(x)
    with pytest.raises((RuntimeError, BackendCompilerFailed), match=words) as caught:
        call(x)
    if "dtype" in what:
        assert "Cast the whole model to one dtype" in str(caught.value)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert _same(parameter, before[name][1])
    model.up = copy.deepcopy(whole.up)
    assert torch.equal(call(x), expected)


def test_under_autocast_an_adapter_of_another_dtype_is_no_error():
    """There torch casts the operands of each product, and the original runs, too."""
    model, x = Relu(), torch.randn(2, 32)
    fill_b(model)
    model.up.lora_A.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(model)(x).dtype == model(x).dtype


@pytest.fixture
def dynamo_stays_silent():
    """Fake tensors log a stack for each error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("name", ["base", "a", "b"])
def test_a_parameter_on_another_device_than_its_input(name):
    """On the way through Dynamo, Dynamo itself refuses before any backend sees the model."""

    class Site(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(32, 48).requires_grad_(False)
            self.a, self.b = nn.Linear(32, 4, bias=False), nn.Linear(4, 48, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    model = nn.Sequential(Site())
    getattr(model[0], name).to("meta")
    gm = torch.fx.symbolic_trace(model)
    with pytest.raises(FalqonError, match="a parameter is on another device than its input") as no:
        falqon_fx.rewrite(gm, [torch.randn(2, 32)])
    assert no.value.site == f"0.{name}"
    assert "Move the whole model to one device" in str(no.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": "tensor"}, "prepare() used granularity='tensor'"),
        (
            {"scale": "amax"},
            "scale='amax'; the backend is asked for granularity='row', scale='pow2'",
        ),
        ({"update": "rows"}, "prepare() made it for update='rows', the backend is asked for"),
    ],
)
def test_a_prepared_model_under_another_config(options, words):
    model, x = freeze_a(tiny_mlp()), torch.randn(2, 32)
    falqon_fx.prepare(model, FalqonConfig(**options), progress=False)
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(model)(x)
    assert words in str(caught.value)
    assert "the same config" in str(caught.value)
    torch._dynamo.reset()
    compiled(model, **options)(x)
    assert len(falqon_fx.adapters(model)) == 2


def test_rows_of_a_layer_whose_adapter_prepare_does_not_know():
    """The config is the same in both: the remedy is another one."""
    model = freeze_a(Stack())
    falqon_fx.prepare(model, FalqonConfig(update="rows"), progress=False)
    with pytest.raises(BackendCompilerFailed, match="where the adapter is not PEFT's"):
        compiled(model, update="rows")(torch.randn(2, 32))


def test_options_that_leave_the_base_alone_may_differ_from_those_of_prepare():
    model, x = tiny_mlp(), torch.randn(2, 32)
    falqon_fx.prepare(model, FalqonConfig(grad_dtype="e4m3", siblings=False), progress=False)
    assert compiled(model)(x).isfinite().all()
