"""base_dtype="int8": W, x and A in INT8, and where it is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.files import storage
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.ops.lowering import merged_linear_grad_x
from falqon_fx.site.agreement import check_options
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import INT8, amax_to_scale, decode_fp8, encode_fp8, round_to_fp8
from falqon_fx.site.spec import SiteSpec, parse_spec
from tests import sites
from tests.emulation import cast, emulate
from tests.models import Net, compiled, fill_b, tiny_mlp
from tests.sites import randn
from tests.strategies import SEEDS
from tests.tolerances import assert_within, fp8_cast_bound, gamma

CONFIG = FalqonConfig(base_dtype="int8", inner="eager")
SPEC = SiteSpec.from_config(CONFIG)


# -- numbers ---------------------------------------------------------------------------------------


def test_all_255_numbers_stay_and_what_lies_between_goes_to_the_nearest_even_one():
    numbers = torch.arange(-127, 128, dtype=torch.float32)
    assert torch.equal(round_to_fp8(numbers, INT8), numbers)
    assert torch.equal(encode_fp8(numbers, INT8), numbers.to(torch.int8))
    assert torch.equal(decode_fp8(encode_fp8(numbers, INT8), 2.0**-9, torch.float32), numbers / 512)
    for beside in (numbers[:-1] + 0.5, numbers.nextafter(torch.tensor(1e9)), numbers * 1.001):
        wanted = beside.clamp(-127, 127).round()
        assert torch.equal(round_to_fp8(beside, INT8), wanted)


def test_a_scale_is_the_smallest_power_of_two_that_covers_the_largest():
    """At and beside 127 times every power of two, where one float32 step decides."""
    edge = (127 * torch.arange(-110, 111, dtype=torch.float64).exp2()).float()
    beside = edge.view(torch.int32)[:, None] + torch.arange(-8, 9, dtype=torch.int32)
    amax = beside.view(torch.float32).flatten()
    scale = amax_to_scale(amax, INT8, "pow2")
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert (127 * scale.double() >= amax).all()
    assert (127 * scale.double() < 2 * amax.double()).all()


@given(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=40),
       st.sampled_from(["amax", "pow2"]))  # fmt: skip
def test_a_cast_is_off_by_half_a_step(numbers, mode):
    x = torch.tensor(numbers, dtype=torch.float32)
    scale = amax_to_scale(x.abs().amax(), INT8, mode)
    assert_within(round_to_fp8(x / scale, INT8) * scale, x, fp8_cast_bound(x, scale, INT8))


@given(SEEDS, st.sampled_from(["row", "tensor"]), st.sampled_from(["amax", "pow2"]))
def test_a_base_is_cast_as_by_torch(seed, granularity, scale):
    spec = SiteSpec(granularity, scale, "e5m2", base="int8")
    weight = randn(7, 33, seed=seed) * (randn(7, 1, seed=seed + 1) * 6).exp2()
    base = cast_base(weight, spec)
    codes, wanted = cast(weight, INT8, spec.per_row, scale == "pow2")
    assert base.code.dtype == base.weight.dtype == torch.int8
    assert torch.equal(base.code.float(), codes)
    assert torch.equal(base.scale, wanted)


def test_the_gradient_of_x_has_no_cast_of_the_gradient():
    """dL/dx is (dL/dO ⊙ s_W) · W in bfloat16: of numbers that it holds, the exact product."""
    grad, code = randn(5, 4).sign().bfloat16() * 3, torch.arange(-127, 127, 8).view(4, 8).char()
    scale = torch.tensor([[2.0], [0.5], [2.0**-9], [1.0]])
    found = merged_linear_grad_x([grad], [code], [scale], [], [], [], torch.float32, str(SPEC))
    wanted = grad.double() @ (code.double() * scale.double())
    assert_within(found, wanted, 2.0**-8 * wanted.abs())


# -- models ----------------------------------------------------------------------------------------


def test_all_that_compiled_code_runs_is_int8():
    """Layers with an adapter and without, prepared or not; nothing is E4M3."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net().requires_grad_(False), peft.LoraConfig(target_modules=["up"]))
    fill_b(model)
    x, ids = randn(6, 64), {}
    for prepared in (False, True):
        if prepared:
            falqon_fx.prepare(model, CONFIG, progress=False)
        run = compiled(model, base_dtype="int8")
        y = run(x)
        y.square().sum().backward()
        ids[prepared] = y
        report = falqon_fx.explain(model, x, config=CONFIG)
        assert len(report.sites) == 3
        assert {site.options["base_dtype"] for site in report.sites} == {"int8"}
        assert "cast to INT8 once" in str(report)
        assert "E4M3" not in str(report)
        assert falqon_fx.adapters(model)["base_model.model.up"].weight.dtype == torch.int8
    assert torch.equal(ids[True], ids[False])
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert len(layers) == 3
    assert {layer.code.dtype for layer in layers} == {torch.int8}
    twin = emulate(copy.deepcopy(model), falqon_fx.adapters(model), CONFIG, [
        "base_model.model.plain", "base_model.model.down",
    ])  # fmt: skip
    assert torch.equal(twin(x), ids[True])


def test_a_prepared_layer_reads_as_its_weight_within_the_cast():
    torch.manual_seed(0)
    model = tiny_mlp()
    before = model.base_model.model[0].base_layer.weight.clone()
    falqon_fx.prepare(model, CONFIG, progress=False)
    layer = model.base_model.model[0].base_layer
    bound = fp8_cast_bound(before, layer.base().scale, INT8)
    assert_within(layer.weight.detach(), before, bound)
    assert_within(falqon_fx.adapters(model)["base_model.model.0"].base(), before, bound)
    falqon_fx.restore(model)
    assert_within(model.base_model.model[0].base_layer.weight.detach(), before, bound)


@pytest.mark.parametrize("channels", [0, 4])
def test_large_channels_of_x_cost_the_others_nothing_after_a_calibration(channels):
    """The output and dL/dA get these channels in full, and of the others what they get where the
    large ones are zeros. Without a calibration the step of all is that of the large ones, a hundred
    times too wide. (dL/dB has A's own cast in it.)

    Both results are sums in float32 of 64 products of the base, 4 of the channels, 64 and 4 of the
    adapter, and dL/dA of 48 and 200; a scale, s and the sums of these parts have a few more.
    """
    torch.manual_seed(0)
    x, grad, large = randn(200, 64), randn(200, 48, seed=1), slice(5, None, 16)
    x[:, large] *= 100.0
    rest = x.clone()
    rest[:, large] = 0.0
    weight = randn(48, 64, seed=2).bfloat16().float()
    model: nn.Module = nn.Sequential(nn.Linear(64, 48, bias=False))
    model.load_state_dict({"0.weight": weight})
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    fill_b(model)
    given: dict[str, Any] = {"outliers": channels, "compensate": 0, "calibration": [x]}
    falqon_fx.prepare(model, CONFIG, progress=False, **(given if channels else {}))
    lora: Any = model.base_model.model[0]
    layer, scaling = lora.get_base_layer(), lora.scaling["default"]
    lora_a, lora_b = lora.lora_A.default.weight, lora.lora_B.default.weight
    call = torch.compile(model, backend="falqon", options=dict[str, Any](config=CONFIG))
    found = []
    for each in (x, rest):
        lora_a.grad = None
        y = call(each)
        y.backward(grad)
        found.append([y.detach().double(), lora_a.grad.double()])

    only, read = (x - rest).double(), sites.cast(rest, INT8, SPEC)
    a, b = sites.cast(lora_a.detach(), INT8, SPEC), lora_b.detach().double() * scaling
    d, wide, base = grad.double() @ b, weight.double(), layer.base().dequantize().double()
    wanted = [only @ (wide + b @ a).t(), d.t() @ only]
    terms = [read.abs() @ base.abs().t(), only.abs() @ wide.abs().t()]
    terms.append((read.abs() + only.abs()) @ a.abs().t() @ b.abs().t())
    gauges = [sum(terms), (grad.double().abs() @ b.abs()).t() @ (read.abs() + only.abs())]
    for pair, own, gauge, roundings in zip(zip(*found), wanted, gauges, (136, 248), strict=True):
        bound = 2 * gamma(roundings + 16) * gauge  # a difference of two
        off = (pair[0] - pair[1] - own).abs()
        assert bool((off <= bound).all()) is bool(channels), float((off / bound).max())


# -- files -----------------------------------------------------------------------------------------


def test_a_checkpoint_that_names_no_base_dtype_is_of_fp8(tmp_path):
    """As all were before there was a choice."""
    torch.manual_seed(0)
    model = tiny_mlp()
    falqon_fx.prepare(model, progress=False)
    falqon_fx.save_checkpoint(model, tmp_path)
    content = json.loads((tmp_path / "checkpoint.json").read_text())
    for site in content["sites"]:
        assert site["spec"].pop("base") == "fp8"
    content.pop("checksum", None)
    storage.write_manifest(tmp_path / "checkpoint.json", content)
    other = tiny_mlp()
    falqon_fx.prepare(other, progress=False)
    falqon_fx.load_checkpoint(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_a_checkpoint_of_the_other_dtype_brings_it_and_compiled_code_is_told(tmp_path):
    torch.manual_seed(0)
    model, other = tiny_mlp(), tiny_mlp()
    falqon_fx.prepare(model, CONFIG, progress=False)
    falqon_fx.prepare(other, progress=False)
    falqon_fx.save_checkpoint(model, tmp_path)
    falqon_fx.load_checkpoint(other, tmp_path)
    assert other.base_model.model[0].base_layer.code.dtype == torch.int8
    x = randn(3, 32)
    assert torch.equal(compiled(other, base_dtype="int8")(x), compiled(model, base_dtype="int8")(x))
    with pytest.raises(BackendCompilerFailed, match=r"prepare\(\) used base_dtype='int8', gran"):
        compiled(other)(x)


# -- refused ---------------------------------------------------------------------------------------


def test_weights_that_are_cut_over_processes_are_refused():
    with pytest.raises(FalqonError, match='"int8" is not built for base weights that are cut'):
        check_options("a layer", CONFIG)


def test_a_text_of_a_spec_names_it():
    """One that does not is older, and of FP8."""
    assert parse_spec(str(SPEC)) == SPEC
    assert parse_spec(str(SPEC).replace(" int8 ", " ")) == replace(SPEC, base="fp8")
    with pytest.raises(ValueError, match="base='int4': expected one of fp8, int8"):
        parse_spec(str(SPEC).replace(" int8 ", " int4 "))
