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
from falqon_fx.prepare import MergedBaseLinear
from tests import tolerances as tol
from tests.models import fill_b, lora_b
from tests.sites import randn
from tests.spellings import Passes, check_site
from tests.test_prepare import base_off

KEEP = FalqonConfig(init="keep", topk=1)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


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


@pytest.mark.parametrize(
    "lora", [{}, {"lora_bias": True}, {"use_rslora": True, "lora_alpha": 4}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (2, 1, 3, 24)])
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


def test_the_weight_is_laid_out_once():
    """The state is [out + r, in] from the start; a step reads samples of the base weight alone."""
    model, x = one(), randn(4, 24)
    call = torch.compile(model, backend="falqon", options={"inner": "eager", "topk": "all"})
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


def test_a_changed_base_weight_is_seen():
    model, x = one(), randn(4, 24)
    call = torch.compile(model, backend="falqon", options={"inner": "eager"})
    call(x)
    layer_of(model).base_layer.weight.data.mul_(2.0)
    changed = call(x)
    torch._dynamo.reset()
    other = copy.deepcopy(model)
    assert torch.equal(
        changed, torch.compile(other, backend="falqon", options={"inner": "eager"})(x)
    )


def test_one_weight_read_both_ways_has_two_states():
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
    assert len(passes.results[0].slots) == 2


# -- prepare and restore ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_prepare_merges_a_conv1d_and_restore_brings_it_back(dtype):
    model, x = one(dtype), randn(2, 3, 24).to(dtype)
    original, bias = (p.detach() for p in layer_of(model).base_layer.parameters())
    unprepared = Passes().run(model, x)
    report = falqon_fx.prepare(model, KEEP, progress=False)
    assert report.prepared == ("base_model.model.proj",)
    base = layer_of(model).base_layer
    assert isinstance(base, MergedBaseLinear)
    assert base.code.shape == (24, 24)
    assert base.weight.shape == original.shape  # as PEFT reads it, [in, out]
    passes = Passes()
    assert torch.equal(passes.run(model, x), unprepared)
    assert len(passes.sites) == 1
    (state,) = falqon_fx.adapters(model).values()
    falqon_fx.restore(model)
    base = layer_of(model).base_layer
    assert type(base) is Conv1D
    assert (base.nf, base.nx) == (20, 24)
    assert torch.equal(base.bias, bias)
    assert base.weight.dtype == dtype
    assert not base.weight.requires_grad
    bound = tol.rounded_bound(original.t(), base_off(state, original.t()), dtype)
    tol.assert_within(base.weight.t(), original.t(), bound)


def test_the_eager_forward_of_a_prepared_conv1d_is_the_restored_ones():
    model, x = one(), randn(2, 3, 24)
    falqon_fx.prepare(model, KEEP, progress=False)
    prepared = model(x)
    falqon_fx.restore(model)
    # The same products, summed as addmm(bias, x, W) instead of linear(x, W) + bias.
    p = parameters(model)
    largest = x.abs().reshape(-1, 24) @ p.base.abs().t() + p.bias.abs()
    bound = 2 * tol.gamma(24 + 2) * largest.reshape(prepared.shape).double()
    tol.assert_within(prepared, model(x), bound + 2.0**-20)


def test_merging_a_prepared_conv1d_with_peft():
    model, x = one(), randn(2, 3, 24)
    falqon_fx.prepare(model, KEEP, progress=False)
    falqon_fx.restore(model)
    expected = model(x)
    merged = model.merge_and_unload()
    assert type(merged.proj) is Conv1D
    torch.testing.assert_close(merged(x), expected)
