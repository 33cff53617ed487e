"""Parameters that change after compilation, and code that reads the weight of a prepared layer."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import falqon_fx
from tests import tolerances as tol
from tests.models import (
    Relu,
    fill_b,
    made,
    tiny_mlp,
    train,
)
from tests.parameters import PREPARED_OR_NOT, each_value, slow
from tests.situations import INNER, PREPARED, codes, compiled
from tests.training import adam, all_equal

# -- parameters that change ------------------------------------------------------------------------


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2.0)


def through_data(weight: nn.Parameter) -> None:
    """No version counter sees it; on a CPU the contents are looked at."""
    weight.data.mul_(2.0)


def other_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2.0


CHANGES = pytest.mark.parametrize("change", [in_place, through_data, other_data])


@each_value(name=["base_layer", "lora_A", "lora_B"], change=[in_place, through_data, other_data])
def test_a_changed_parameter_is_seen(created, name, change):
    """W makes a new base, of that layer alone, in the place of the old one; A and B none."""
    model, x = Relu(), torch.randn(2, 5, 32)
    fill_b(model)
    call = compiled(model)
    first = call(x).detach()
    old = weakref.ref(falqon_fx.adapters(model)["up"].weight.untyped_storage())
    change(getattr(model.up, name).weight)
    changed = call(x).detach()
    assert created == ["up", "down", *(["up"] if name == "base_layer" else [])]
    gc.collect()
    assert (old() is None) == (name == "base_layer")
    torch._dynamo.reset()
    assert torch.equal(changed, compiled(copy.deepcopy(model))(x))
    assert not torch.equal(changed, first)


@CHANGES
@pytest.mark.parametrize("name", ["base_layer", "lora_A"])
def test_a_changed_w_or_a_rebuilds_the_weight_of_update_rows(name, change):
    """Both are in it."""
    model, x = made(Relu, "rows"), torch.randn(2, 5, 32)
    fill_b(model)
    call = compiled(model, update="rows")
    call(x)
    change(getattr(model.up, name).weight)
    changed = call(x)
    torch._dynamo.reset()
    assert torch.equal(changed, compiled(copy.deepcopy(model), update="rows")(x))


@PREPARED
def test_load_state_dict_gives_the_loaded_models_results(prepared):
    def one(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = tiny_mlp()
        fill_b(model, 0.1, seed)
        if prepared:
            falqon_fx.prepare(model, progress=False)
        return model

    model, other, x = one(0), one(1), torch.randn(2, 5, 32)
    call = compiled(model)
    train(call, adam(model), x, steps=2)
    model.load_state_dict(other.state_dict())
    loaded = call(x)
    torch._dynamo.reset()
    assert torch.equal(loaded, compiled(other)(x))


def test_a_dtype_cast_after_compile_casts_the_base_anew(created):
    model, x = Relu(), torch.randn(2, 5, 32)
    fill_b(model)
    call = compiled(model)
    call(x)
    model.to(torch.bfloat16)
    half = call(x.bfloat16())
    assert created == ["up", "down"] * 2
    torch._dynamo.reset()
    assert torch.equal(half, compiled(copy.deepcopy(model))(x.bfloat16()))


@pytest.fixture
def swapped() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


CONVERSIONS = {
    "to": lambda model: model.to(torch.bfloat16),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ),
}


@each_value(
    inner=["eager", "inductor"],
    prepared=PREPARED_OR_NOT,
    when=["before", "after"],
    convert=list(CONVERSIONS),
)
def test_parameters_that_are_swapped(swapped, convert, when, prepared, inner):
    """torch.__future__.set_swap_module_params_on_conversion asks that nothing holds a weak
    reference to a parameter.
    """
    model = tiny_mlp()
    fill_b(model, 0.1)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    plain, x = copy.deepcopy(model), torch.randn(2, 5, 32)
    call = compiled(model, inner)
    if when == "after":
        call(x).sum().backward()
        model.zero_grad()
    before = [code.clone() for code in codes(model)] if prepared else None
    for own in (model, plain):
        CONVERSIONS[convert](own)
    x = x.to(model.base_model.model[0].lora_A["default"].weight.dtype)
    found = call(x)
    found.float().sum().backward()
    torch._dynamo.reset()
    expected = compiled(plain, inner)(x)
    expected.float().sum().backward()
    assert torch.equal(found, expected)
    grads = [[p.grad for p in own.parameters() if p.requires_grad] for own in (model, plain)]
    assert all_equal(*grads)
    assert before is None or all_equal(codes(model), before)


# -- code that reads the weight of a prepared layer ------------------------------------------------


def tiny_t5(targets: list[str]) -> nn.Module:
    """One layer each; width 64, so that FP8 takes all its linear layers but the tied head."""
    config = transformers.T5Config(
        vocab_size=64,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )
    model = transformers.T5ForConditionalGeneration(config).to(torch.bfloat16)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("targets", [["q", "v"], ["q", "v", "wo"]], ids=["", "wo adapted"])
def test_t5_asks_a_prepared_layer_for_the_dtype_of_its_weight(inner, targets, graphs):
    """So do mT5, LongT5, UMT5, Switch, Pix2Struct and UDOP. Prepared and unprepared are the same
    bit for bit: the same FP8 bytes, and the dtype that the weight had.
    """
    model, ids = tiny_t5(targets), torch.arange(12).view(2, 6)
    fill_b(model, 0.1)
    losses, grads = [], []
    for prepared in (False, True):
        own = copy.deepcopy(model)
        if prepared:
            report = falqon_fx.prepare(own, progress=False)
            assert sum(path.endswith(".wo") for path in report.prepared) == 2
            assert sum(path.endswith(".wo") for path in report.frozen) == 2 * (len(targets) == 2)
        torch._dynamo.reset()
        graphs.clear()
        loss = compiled(own, inner)(input_ids=ids, labels=ids).loss
        loss.backward()
        assert sum(len(graph.sites) for graph in graphs) == 18
        losses.append(loss.detach())
        grads.append([p.grad for p in own.parameters() if p.requires_grad])
    assert torch.equal(*losses)
    assert all_equal(*grads)
    assert all(g.abs().max() > 0 for g in grads[0])


class Reads(nn.Module):
    """A forward that multiplies with the values of its layers' weights, beside calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.call, self.direct = nn.Linear(64, 80), nn.Linear(64, 80, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.call.weight.float().norm(dim=1) * (self.call.weight.dtype == torch.float32)
        return self.call(x) + F.linear(x, self.direct.weight) + norm


@pytest.mark.parametrize("inner", ["eager", "aot_eager", slow("inductor")])
def test_values_of_a_prepared_weight_are_those_of_dq_w(inner):
    """What is called is multiplied in FP8; what reads ``weight`` gets dq(W)."""
    model = peft.get_peft_model(Reads(), peft.LoraConfig(r=4, target_modules=["call"]))
    fill_b(model, 0.1)
    report = falqon_fx.prepare(model, progress=False)
    assert len(report.prepared) == 2
    x = torch.randn(5, 64)
    plain = falqon_fx.restore(copy.deepcopy(model))
    inside = plain.get_base_model()
    exact, site = tol.Approx.exact, inside.call
    bound = tol.site_bounds(
        x,
        torch.randn(5, 80),
        tol.Parameters(
            site.base_layer.weight.detach(),
            site.lora_A["default"].weight.detach(),
            site.lora_B["default"].weight.detach(),
            site.scaling["default"],
            site.base_layer.bias.detach(),
        ),
    ).y
    called = tol.Approx(site.double()(x.double()).detach(), bound)
    direct = (exact(x) @ exact(inside.direct.weight.detach()).t()).rounded(torch.float32)
    norm = site.base_layer.weight.detach().double().norm(dim=1)
    norm = tol.Approx(norm, tol.gamma(64 + 2) * norm)
    wanted = ((called + direct).rounded(torch.float32) + norm).rounded(torch.float32)
    wanted.assert_holds(compiled(model, inner)(x).detach())


@INNER
def test_an_exported_prepared_model_goes_through_rewrite(inner):
    """`torch.export` lifts the bytes of prepared layers as it lifts parameters."""
    model, x = tiny_mlp(), torch.randn(5, 32)
    fill_b(model, 0.1)
    falqon_fx.prepare(model, progress=False)
    expected = compiled(copy.deepcopy(model), inner)(x)
    exported = torch.export.export(model.get_base_model(), (x,))
    result = falqon_fx.rewrite(exported.module(), [x])
    assert [site.path for site in result.report.sites] == ["0", "2"]
    assert torch.equal(result(x), expected)
