"""The state of prepared layers: it travels with the module, and an average of it is an error."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.site.numerics import E4M3
from tests.models import fill_b, tiny_mlp
from tests.sites import randn, same
from tests.test_prepare import (
    BF16,
    F16,
    F32,
    ROWS,
    SITES,
    UPDATES,
    base_off,
    layer_output,
    parameters,
    prepared_mlp,
    states,
)
from tests.tolerances import (
    Approx,
    assert_within,
    gamma,
)

# -- the state travels with the module -------------------------------------------------------------


def same_states(a: nn.Module, b: nn.Module) -> bool:
    return len(states(a)) == 2 and all(map(same, states(a), states(b)))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@UPDATES
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_have_the_same_state_in_memory_of_their_own(
    copied: Callable[[nn.Module], nn.Module], config
):
    model = prepared_mlp(config)
    other, x = copied(model), randn(3, 32)
    assert same_states(model, other)
    assert torch.equal(model(x), other(x))
    pairs = zip(falqon_fx.adapters(model).values(), falqon_fx.adapters(other).values(), strict=True)
    for one, two in pairs:
        assert one.weight.data_ptr() != two.weight.data_ptr()
        assert one.scale.data_ptr() != two.scale.data_ptr()
    before = states(model)
    fill_b(other, 1.0, seed=5)
    falqon_fx.flush(other)
    assert all(map(same, states(model), before))
    assert same_states(model, other) == (config.update == "adapter")


@UPDATES
def test_state_dict_round_trip(tmp_path, config):
    model = prepared_mlp(config)
    torch.manual_seed(7)  # another base, another adapter
    other = prepared_mlp(config, b_size=0.0)
    assert not same_states(model, other)
    file = tmp_path / "model.safetensors"
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, file)
    missing = other.load_state_dict(load_file(file))
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert same_states(model, other)
    assert torch.equal(model(randn(3, 32)), other(randn(3, 32)))


@UPDATES
def test_a_state_dict_holds_no_tensor_that_a_cast_could_hurt(config):
    """FP8 travels as uint8: `.to(bfloat16)` and DDP's broadcast leave it alone. So do the float32
    scales of the default, as int32, which FSDP's mixed precision would cast.
    """
    model = prepared_mlp(config)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {d for n, d in types.items() if n.endswith(".code")} == {torch.uint8}
    assert E4M3 not in types.values()
    if config.update == "adapter":
        base = {n for n in types if "base_layer" in n and not n.endswith("bias")}
        assert not any(types[n].is_floating_point for n in base)
        assert len(base) == 2 * 3
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    assert not list(model.buffers())


@UPDATES
@pytest.mark.parametrize("dtype", [BF16, F16, torch.float64])
def test_a_cast_of_the_model_keeps_the_state(dtype, config):
    model = prepared_mlp(config)
    before = states(model)
    model.to(dtype)
    assert all(map(same, states(model), before))
    assert model.base_model.model[0].base_layer.bias.dtype == dtype
    assert model(randn(3, 32).to(dtype)).dtype == dtype


def test_moving_to_another_device_keeps_dtypes():
    model = prepared_mlp().to("meta")
    base = model.base_model.model[0].base_layer
    types = [torch.uint8, torch.int32, torch.uint8]
    assert [t.dtype for t in (base.code, base.scale, base.digest)] == types
    assert {t.device.type for t in (base.code, base.scale, base.digest)} == {"meta"}
    assert model(torch.empty(3, 32, device="meta")).shape == (3, 32)  # nothing there to verify
    scale = prepared_mlp(ROWS).to("meta").base_model.model[0].base_layer.scale
    assert (scale.dtype, scale.device.type) == (F32, "meta")


def test_the_saved_adapter_loads_in_plain_peft(tmp_path):
    """Base + s·B·A with the adapter's own A and B; the prepared base weight is not in it."""
    model = tiny_mlp()
    base = nn.Sequential(
        *(copy.deepcopy(getattr(m, "base_layer", m)) for m in model.base_model.model)
    )
    falqon_fx.prepare(model, FalqonConfig(init="svd"), progress=False)
    fill_b(model, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: no config of a base model to look up
        model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    for (name, a), (other, b) in zip(
        sorted((n, p) for n, p in model.named_parameters() if "lora_" in n),
        sorted((n, p) for n, p in loaded.named_parameters() if "lora_" in n),
        strict=True,
    ):
        assert name == other
        assert torch.equal(a, b)
    for path, state in falqon_fx.adapters(model).items():
        layer, plain = model.get_submodule(path), loaded.get_submodule(path)
        assert type(plain.base_layer) is nn.Linear
        weight = plain.base_layer.weight.detach()
        x = randn(5, weight.shape[1])
        exact, near = Approx.exact(weight), Approx(weight.double(), base_off(state, weight))
        layer_output(plain, x, exact, adapter=True).assert_holds(plain(x).detach())
        layer_output(plain, x, near, adapter=True).assert_holds(layer(x).detach())


# -- averages --------------------------------------------------------------------------------------


def move(model: nn.Module, seed: int) -> None:
    """A step of an optimizer on A and B."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.add_(randn(*parameter.shape, seed=97 * seed + i) * 0.05)


def test_an_averaged_model_averages_a_and_b_and_has_the_same_base():
    """SWA. Float32 running means of three values: at most 3 · 3 roundings of what they contain."""
    model = prepared_mlp()
    average, seen = AveragedModel(model), []
    for step in range(3):
        move(model, step)
        average.update_parameters(model)
        seen.append(parameters(model))
    assert same_states(model, average.module)
    for name, parameter in average.module.named_parameters():
        if "lora_" in name:
            each = torch.stack([values[name] for values in seen]).double()
            assert_within(parameter, each.mean(0), gamma(9) * each.abs().sum(0))
    x = randn(3, 32)
    assert torch.equal(average(x), falqon_fx.restore(copy.deepcopy(average.module))(x))


def ema_of_all(model: nn.Module) -> nn.Module:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(3):
        move(model, step)
        average.update_parameters(model)
    return average.module


def ema_through_data(model: nn.Module) -> nn.Module:
    """After it was used, by writes that no version counter sees."""
    average = copy.deepcopy(model)
    average(randn(2, 32))
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        mine.data.copy_(0.9 * mine.data + 0.1 * theirs.data)
    return average


def ema_rounded(model: nn.Module) -> nn.Module:
    """Loaded from a state dict whose averages were cast back to the dtypes that they had."""
    average = copy.deepcopy(model)
    average(randn(2, 32))
    state = {n: (0.9 * t + 0.1 * t).to(t.dtype) for n, t in model.state_dict().items()}
    average.load_state_dict(state)
    return average


USES: dict[str, Callable[[nn.Module], object]] = {
    "eager": lambda m: m(randn(3, 32)),
    "compiled": lambda m: torch.compile(m, backend="falqon", options={"inner": "eager"})(
        randn(3, 32)
    ),
    "another backend": lambda m: torch.compile(m, backend="eager")(randn(3, 32)),
    "restore": falqon_fx.restore,
    "merge": falqon_fx.merge_and_unload,
    "adapters": falqon_fx.adapters,
    "weight": lambda m: m.get_submodule(SITES[0]).base_layer.weight,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("ema", [ema_of_all, ema_through_data, ema_rounded])
def test_an_average_of_the_base_is_an_error_and_never_used(ema, use):
    average = ema(prepared_mlp())
    with pytest.raises(FalqonError, match="bytes of its FP8 base are not those") as caught:
        USES[use](average)
    site = "a prepared layer" if use == "another backend" else SITES[0]
    assert caught.value.site == site
    assert "Average the trained parameters alone" in caught.value.remedy


def test_an_average_of_a_state_dict_does_not_load():
    model = prepared_mlp()
    average = {name: 0.9 * t + 0.1 * t for name, t in model.state_dict().items()}
    before = parameters(model)
    with pytest.raises(FalqonError, match=r"torch\.uint8.*has torch\.float32") as caught:
        model.load_state_dict(average)
    assert caught.value.site == SITES[0]
    assert "Average or cast the trained parameters alone" in caught.value.remedy
    base = [name for name in before if "base_layer" in name]
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in base)


def test_an_average_of_the_trained_parameters_is_right():
    """The remedy of the errors above. Each of three steps rounds twice to get each product and once
    for the sum: at most 12 roundings of the largest value that a step had.
    """
    model = prepared_mlp()
    average = copy.deepcopy(model)
    exact = {n: p.double() for n, p in parameters(model).items() if "lora_" in n}
    largest = {name: value.abs() for name, value in exact.items()}
    for step in range(3):
        move(model, step)
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                if theirs.requires_grad:
                    mine.mul_(0.9).add_(theirs, alpha=0.1)
        for name in exact:
            new = model.get_parameter(name).detach().double()
            exact[name] = 0.9 * exact[name] + 0.1 * new
            largest[name] = largest[name].maximum(exact[name].abs() + new.abs())
    assert same_states(model, average)
    for name, value in exact.items():
        assert_within(average.get_parameter(name), value, gamma(12) * largest[name])
    x = randn(3, 32)
    assert torch.equal(average(x), falqon_fx.restore(copy.deepcopy(average))(x))
