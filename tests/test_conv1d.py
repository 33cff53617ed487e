"""LoRA on GPT-2's Conv1D, which stores its weight [in, out] and flattens its input."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import cosine_similarity
from transformers.pytorch_utils import Conv1D

import falqon_fx
from falqon_fx import FalqonConfig, rewrite
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.rows.prepared import MergedBaseLinear
from falqon_fx.site.base import bases
from tests import tolerances as tol
from tests.models import fill_b, freeze_a, lora_b
from tests.parameters import each_value
from tests.sites import randn
from tests.spellings import Passes, check_site

KEEP = FalqonConfig()
ROWS = FalqonConfig(update="rows", topk=1)
UPDATES = pytest.mark.parametrize("config", [KEEP, ROWS], ids=["adapter", "rows"])
BF16 = torch.bfloat16


class One(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj = Conv1D(20, 24).to(dtype)  # 24 in, 20 out
        nn.init.normal_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def one(dtype: torch.dtype = torch.float32, **lora: Any) -> nn.Module:
    options = {"r": 4, "lora_alpha": 8, "target_modules": "proj", "fan_in_fan_out": True, **lora}
    model = peft.get_peft_model(One(dtype), peft.LoraConfig(**options))
    fill_b(model, 0.1)
    return model.train()


def layer_of(model: nn.Module) -> Any:
    return model.base_model.model.proj


def parameters(model: nn.Module) -> tol.Parameters:
    layer = layer_of(model)
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    return tol.Parameters(base.weight.t(), a.weight, b.weight, 2.0, base.bias, b.bias)


@each_value(
    lora={"": {}, "bias": {"lora_bias": True}, "rslora": {"use_rslora": True, "lora_alpha": 4}},
    dtype=[torch.float32, BF16],
    shape=[(24,), (5, 24), (2, 3, 24), (2, 1, 3, 24)],
)
def test_a_conv1d_is_one_site_within_the_fp8_bound(shape, dtype, lora):
    model, passes = one(dtype, **lora), Passes()
    run = torch.compile(model, backend=passes)
    check_site(run, model, randn(*shape).to(dtype), parameters(model))
    (site,) = passes.sites
    assert (site.path, site.out_features, site.in_features) == ("base_model.model.proj", 20, 24)
    assert not passes.rejected
    inside = {"addmm", "view", "linear"}
    assert not inside & set(passes.after[0])


def test_any_number_of_tokens_with_one_graph():
    model, passes = one(), Passes()
    run = torch.compile(model, backend=passes, dynamic=True)
    for shape in ((2, 3, 24), (4, 7, 24), (3, 5, 24)):
        model.zero_grad()
        check_site(run, model, randn(*shape), parameters(model))
    assert len(passes.results) == 1


class HandWritten(nn.Module):
    """PEFT's layer can't be traced symbolically: it asks for the dtype of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Conv1D(20, 24).requires_grad_(False)
        self.a, self.b = nn.Linear(24, 4, bias=False), nn.Linear(4, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.b(self.a(x))


@pytest.mark.parametrize("frontend", ["symbolic_trace", "export"])
def test_other_frontends(frontend):
    model, x = HandWritten(), randn(2, 3, 24)
    if frontend == "export":
        gm = torch.export.export(model, (x,)).module()
    else:
        gm = fx.symbolic_trace(model)
    result = rewrite(gm, [x], KEEP)
    assert len(result.report.sites) == 1, result.report.rejected
    base, a, b = model.base, model.a.weight, model.b.weight
    check_site(result, model, x, tol.Parameters(base.weight.t(), a, b, 2.0, base.bias))


def test_the_base_is_laid_out_once():
    """[out, in] from the start, and the same bytes in all steps."""
    model, x = one(), randn(4, 24)
    call = torch.compile(model, backend="falqon", options={"inner": "eager"})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    call(x)
    (base,) = bases.of(layer_of(model).base_layer.weight)
    assert base.code.shape == (20, 24)
    assert base.code.is_contiguous()
    before = base.code.clone()
    for _ in range(2):
        call(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    call(x)
    (again,) = bases.of(layer_of(model).base_layer.weight)
    assert again is base
    assert torch.equal(base.code, before)
    (site,) = falqon_fx.adapters(model).values()
    assert torch.equal(site.weight.view(torch.uint8), before)


def test_with_rows_the_weight_is_laid_out_once():
    """The state is [out + r, in] from the start."""
    model, x = freeze_a(one()), randn(4, 24)
    options = {"inner": "eager", "update": "rows", "topk": "all"}
    call = torch.compile(model, backend="falqon", options=options)
    optimizer = torch.optim.SGD(lora_b(model), lr=0.1)
    call(x)
    (state,) = falqon_fx.adapters(model).values()
    place = state.code.data_ptr()
    for _ in range(2):
        call(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    call(x)
    (again,) = falqon_fx.adapters(model).values()
    assert (again.code.data_ptr(), tuple(again.code.shape)) == (place, (24, 24))
    assert again.code.is_contiguous()
    assert int(again.writes.sum()) == 2 * 20
    assert torch.equal(again.applied, lora_b(model)[0].detach())


@UPDATES
def test_a_changed_base_weight_is_seen(config):
    options = {"inner": "eager", "config": config}
    model, x = freeze_a(one()), randn(4, 24)
    call = torch.compile(model, backend="falqon", options=options)
    call(x)
    layer_of(model).base_layer.weight.data.mul_(2.0)
    changed = call(x)
    torch._dynamo.reset()
    other = copy.deepcopy(model)
    assert torch.equal(changed, torch.compile(other, backend="falqon", options=options)(x))


def test_one_weight_read_both_ways_has_two_bases():
    """x @ W and x @ W.T of a square W are two layers."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(randn(24, 24), requires_grad=False)
            self.a, self.b = nn.Linear(24, 4, bias=False), nn.Linear(4, 24, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.weight + self.b(self.a(x)), x @ self.weight.T + self.b(self.a(x))

    model, x, passes = Both(), randn(5, 24), Passes()
    for result, expected in zip(passes.run(model, x), model(x), strict=True):
        assert cosine_similarity(result.flatten(), expected.flatten(), dim=0) > 0.99
    assert len(passes.sites) == 2
    one, other = bases.of(model.weight)
    assert not torch.equal(one.code, other.code)


# -- prepare and restore ---------------------------------------------------------------------------


@UPDATES
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_prepare_casts_a_conv1d_and_restore_brings_it_back(dtype, config):
    model, x = freeze_a(one(dtype)), randn(2, 3, 24).to(dtype)
    original, bias = (p.detach() for p in layer_of(model).base_layer.parameters())
    options = {"update": "rows", "topk": 1} if config.update == "rows" else {}
    unprepared = Passes(**options).run(model, x)
    report = falqon_fx.prepare(model, config, progress=False)
    assert report.prepared == ("base_model.model.proj",)
    base = layer_of(model).base_layer
    assert isinstance(base, Fp8Linear if config.update == "adapter" else MergedBaseLinear)
    assert base.code.shape == ((20, 24) if config.update == "adapter" else (24, 24))
    assert base.weight.shape == original.shape  # as PEFT reads it, [in, out]
    passes = Passes(**options)
    assert torch.equal(passes.run(model, x), unprepared)
    assert len(passes.sites) == 1
    (site,) = falqon_fx.adapters(model).values()
    falqon_fx.restore(model)
    base = layer_of(model).base_layer
    assert type(base) is Conv1D
    assert (base.nf, base.nx) == (20, 24)
    assert torch.equal(base.bias, bias)
    assert base.weight.dtype == dtype
    assert not base.weight.requires_grad
    # Exactly what the site says, rounded to the layer's dtype; and that is near the original.
    assert torch.equal(base.weight.t(), site.base().to(dtype))
    if config.update == "adapter":
        cast = tol.fp8_cast_bound(original.t().float(), site.scale.double(), torch.float8_e4m3fn)
        bound = tol.rounded_bound(original.t(), cast, dtype)
        tol.assert_within(base.weight.t(), original.t(), bound)


@UPDATES
def test_the_eager_forward_of_a_prepared_conv1d_is_the_restored_ones(config):
    model, x = one(), randn(2, 3, 24)
    falqon_fx.prepare(model, config, progress=False)
    prepared = model(x)
    falqon_fx.restore(model)
    # The same products, summed as addmm(bias, x, W) instead of linear(x, W) + bias.
    p = parameters(model)
    largest = x.abs().reshape(-1, 24) @ p.base.abs().t() + p.bias.abs()
    bound = 2 * tol.gamma(24 + 2) * largest.reshape(prepared.shape).double()
    # Each gets the same adapter's part added, one more rounding.
    tol.assert_within(prepared, model(x), bound + tol.gamma(3) * prepared.abs().double())


def test_a_conv1d_without_an_adapter_runs_in_fp8():
    """Within the cast of x and W, and the float32 product."""

    class Two(One):
        def __init__(self) -> None:
            super().__init__(torch.float32)
            self.wide = Conv1D(64, 96)
            nn.init.normal_(self.wide.bias)

        def forward(self, x: Tensor) -> Any:
            return self.proj(x[:, :24]), self.wide(x)

    options = {"r": 4, "target_modules": ["proj"], "fan_in_fan_out": True}
    model = peft.get_peft_model(Two(), peft.LoraConfig(**options))
    wide, x, passes = model.base_model.model.wide, randn(5, 96), Passes()
    _, y = passes.run(model, x)
    assert {site.path for site in passes.sites} >= {"base_model.model.wide"}
    weight = wide.weight.detach().t()
    cast_x, cast_w = (
        tol.Approx(
            value.double(),
            tol.fp8_cast_bound(
                value, 2 * value.abs().amax(1, keepdim=True).double() / 448, torch.float8_e4m3fn
            ),
        )
        for value in (x, weight)
    )
    exact = (cast_x @ cast_w.t() + tol.Approx.exact(wide.bias.detach())).rounded(torch.float32)
    exact.assert_holds(y)
    report = falqon_fx.prepare(model, progress=False)
    assert report.frozen == ("base_model.model.wide",)
    again = Passes()
    assert torch.equal(again.run(model, x)[1], y)


@UPDATES
def test_merging_a_prepared_conv1d_with_peft(config):
    model, x = one(), randn(2, 3, 24)
    falqon_fx.prepare(model, config, progress=False)
    falqon_fx.restore(model)
    expected = model(x)
    merged = model.merge_and_unload()
    assert type(merged.proj) is Conv1D
    # PEFT's merge adds B·A to W, in float32, before the product instead of behind it.
    torch.testing.assert_close(merged(x), expected)
