"""base_dtype="nvfp4": W in four bits, x and A in FP8, and where it is refused."""

from __future__ import annotations

import copy
import gc
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.cost.cards import find
from falqon_fx.cost.model import moved, shape_of
from falqon_fx.cost.variants import merged
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.site import nvfp4
from falqon_fx.site.agreement import check_options
from falqon_fx.site.base import cast_base
from falqon_fx.site.spec import SiteSpec, parse_spec
from tests.emulation import cast_nvfp4, codes_of, emulate
from tests.folders import BF16, IDS, WIDE, dense_model, lora
from tests.models import Net, compiled, fill_b, tiny_mlp
from tests.parameters import slow
from tests.sites import randn
from tests.tolerances import assert_within

CONFIG = FalqonConfig(base_dtype="nvfp4", inner="eager")
SPEC = SiteSpec.from_config(CONFIG)


def net() -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(Net().requires_grad_(False), peft.LoraConfig(target_modules=["up"]))
    fill_b(model)
    return model


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["pow2", "amax"])
def test_a_base_is_cast_as_by_the_definition(scale):
    spec = SiteSpec.from_config(replace(CONFIG, scale=scale))
    weight = randn(70, 64) * (randn(70, 1, seed=1) * 6).exp2()  # cast in several pieces
    base = cast_base(weight, spec)
    codes, wanted = cast_nvfp4(weight, scale == "pow2")
    assert base.code.shape == (70, 9, 4)
    assert base.nbytes == 70 * 64 * 9 // 16 + 4
    assert torch.equal(base.scale, wanted)
    assert torch.equal(codes_of(base.code), codes)


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["pow2", slow("amax")])
def test_all_that_compiled_code_runs_is_nvfp4(scale):
    """Layers with an adapter and without, prepared or not: bit for bit what was written apart."""
    config = replace(CONFIG, scale=scale)
    model, x, found = net(), randn(6, 64), {}
    for prepared in (False, True):
        if prepared:
            falqon_fx.prepare(model, config, progress=False)
        run = compiled(model, base_dtype="nvfp4", scale=scale)
        found[prepared] = step(run, x)
        report = falqon_fx.explain(model, x, config=config)
        assert len(report.sites) == 3
        assert {site.options["base_dtype"] for site in report.sites} == {"nvfp4"}
        assert [s.memory.state for s in report.sites if s.memory] == [64 * 64 * 9 // 16 + 4] * 3
        assert "cast to NVFP4 once" in str(report)
        assert "NVFP4 costs: W is 9.5% off" in str(report)
        assert "FP8 costs: x and A are 2.6% off" in str(report)
    assert all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert [tuple(layer.code.shape) for layer in layers] == [(64, 9, 4)] * 3
    twin = copy.deepcopy(model)
    emulate(twin, falqon_fx.adapters(model), config, [f"base_model.model.{n}" for n in FROZEN])
    assert all(torch.equal(a, b) for a, b in zip(step(twin, x), found[True], strict=True))


FROZEN = ("plain", "down")


def test_a_prepared_layer_reads_as_its_weight():
    torch.manual_seed(0)
    model = tiny_mlp()
    weight = model.base_model.model[0].base_layer.weight.clone()
    falqon_fx.prepare(model, CONFIG, progress=False)
    layer = model.base_model.model[0].base_layer
    codes, scale = cast_nvfp4(weight, pow2=True)
    assert torch.equal(layer.weight, codes * scale)
    assert torch.equal(falqon_fx.adapters(model)["base_model.model.0"].base(), codes * scale)
    assert torch.equal(layer.to(torch.bfloat16).code, layer.code)
    x, bias = randn(5, 32), layer.bias
    # A layer that is not compiled has the products of the plain one.
    assert torch.equal(layer(x.bfloat16()), nn.functional.linear(
        x.bfloat16(), (codes * scale).bfloat16(), bias
    ))  # fmt: skip
    falqon_fx.restore(model)
    assert torch.equal(model.base_model.model[0].base_layer.weight, codes * scale)


def test_rows_that_are_no_multiple_of_16_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 24))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"]))
    fill_b(model)
    x = randn(5, 40)
    report = falqon_fx.explain(model, x, config=CONFIG)
    assert [site.path for site in report.sites] == ["base_model.model.2"]
    assert [r.site for r in report.rejected] == ["base_model.model.0"]
    assert report.rejected[0].reason == "a row has 40 weights, and of NVFP4 16 share a scale"
    prepared = falqon_fx.prepare(model, CONFIG, progress=False)
    assert prepared.prepared == ("base_model.model.2",)
    assert "16 share a scale" in prepared.skipped["base_model.model.0"]
    run = compiled(model, base_dtype="nvfp4")
    assert [site.path for site in falqon_fx.explain(model, x, config=CONFIG).sites] == [
        "base_model.model.2"
    ]
    twin = emulate(copy.deepcopy(model), falqon_fx.adapters(model), CONFIG)
    assert torch.equal(run(x), twin(x))  # the first layer as it is, the other cast


@pytest.mark.slow
def test_memory_is_that_of_four_bits():
    """What the process really holds: 9 / 32 = 0.281 of bfloat16, of three large layers."""
    falqon_fx.prepare(nn.Sequential(nn.Linear(64, 64)), CONFIG, progress=False)  # loads the code
    gc.collect()
    before = own_memory()
    model = nn.Sequential(*(nn.Linear(4096, 4096, False, "meta", BF16) for _ in range(3)))
    for layer in model:
        weight = torch.empty(4096, 4096, dtype=BF16).fill_(0.02)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    del layer, weight
    dense = own_memory() - before
    assert dense > 0.99 * 3 * 2 * 4096**2
    report = falqon_fx.prepare(model, CONFIG, progress=False)
    gc.collect()
    assert report.bytes_after <= 0.2813 * report.bytes_before
    assert own_memory() - before <= 0.30 * dense


def own_memory() -> int:
    """The bytes of this process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


# -- files -----------------------------------------------------------------------------------------


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    """Prepared anew from the same weights, or in FP8 before."""

    def steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    def start(base_dtype: Any) -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = peft.get_peft_model(dense_model(num_hidden_layers=1, **WIDE), lora())
        falqon_fx.prepare(model, replace(CONFIG, base_dtype=base_dtype), progress=False)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, 0.01)

    model, optimizer = start("nvfp4")
    code = model.get_parameter(f"{UP}.code").clone()
    run = compiled(model, base_dtype="nvfp4")
    first = steps(run, optimizer, 5)
    falqon_fx.save_checkpoint(model, tmp_path / "kept", optimizer=optimizer)
    wanted = steps(run, optimizer, 3)
    assert wanted[-1] < first[0]
    assert torch.equal(model.get_parameter(f"{UP}.code"), code)
    for base_dtype in ("nvfp4", "fp8"):
        other, of_other = start(base_dtype)
        falqon_fx.load_checkpoint(other, tmp_path / "kept", optimizer=of_other)
        assert steps(compiled(other, base_dtype="nvfp4"), of_other, 3) == wanted


UP = "base_model.model.model.layers.0.mlp.up_proj.base_layer"


# -- refused ---------------------------------------------------------------------------------------


def test_explain_names_the_kernel_of_a_card():
    """For a card a generated kernel, where one takes rows of so many weights."""
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64)).requires_grad_(False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "1"]))
    model, x = model.bfloat16(), randn(5, 256).bfloat16()
    report = falqon_fx.explain(model, x, config=replace(CONFIG, card="H100"))
    wide, narrow = report.sites
    assert re.fullmatch(r"triton:gemm_e4m3_float16_row_tensor_.*_nvfp4_.*", wide.kernel)
    assert "the library's of decoded weights" in wide.kernel_reason
    assert narrow.kernel == "aten"
    # A W of 256 x 128 is read once each way; of products in 16 bits an H100 makes half as many.
    shape = shape_of(wide, find("H100"))
    costs = [merged(replace(shape, width=w)) for w in (9 / 16, 1)]
    assert shape.width == 9 / 16
    assert moved(costs[1]) - moved(costs[0]) == 2 * 256 * 128 * 7 / 16
    assert {k.dtype for k in costs[0] if k.name == "x·Wᵀ + s·O_A·Bᵀ"} == {"bfloat16"}


def test_bytes_that_were_averaged_are_noticed():
    torch.manual_seed(0)
    model = tiny_mlp()
    falqon_fx.prepare(model, CONFIG, progress=False)
    layer = model.base_model.model[0].base_layer
    for place in ((3, 2, 1), (3, 8, 1)):  # a code, a block's scale
        with torch.no_grad():
            layer.code[place] += 1
        with pytest.raises(FalqonError, match="averaged or overwritten"):
            compiled(model, base_dtype="nvfp4")(randn(3, 32))
        with torch.no_grad():
            layer.code[place] -= 1
    compiled(model, base_dtype="nvfp4")(randn(3, 32))


def test_weights_that_are_cut_over_processes_are_refused():
    with pytest.raises(FalqonError, match='"nvfp4" is not built for base weights that are cut'):
        check_options("a layer", CONFIG)


def test_a_text_of_a_spec_names_it():
    assert parse_spec(str(SPEC)) == SPEC
    assert " nvfp4 #" in str(SPEC)


def test_what_is_decoded_is_exact_in_bfloat16():
    """So a product in bfloat16 of it and of FP8 rounds its result alone."""
    weight = randn(64, 64) * (randn(64, 4, seed=1) * 4).exp2().repeat_interleave(16, 1)
    base = cast_base(weight, SPEC)
    wide, narrow = (nvfp4.decode(base.code, base.scale, t) for t in (torch.float32, BF16))
    assert_within(narrow, wide, torch.zeros(64, 64, dtype=torch.float64))
