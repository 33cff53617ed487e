from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import tolerances as tol
from tests.models import fill_b
from tests.sites import randn
from tests.spellings import (
    ADDS,
    LINEARS,
    SCALES,
    HandWritten,
    Passes,
    Spelling,
    check_site,
    dropped,
)

BF16 = torch.bfloat16
FUSED = torch.ops.falqon.merged_linear.default


class One(nn.Module):
    """A model of one linear layer; ``wrap`` stands around its call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer
        self.wrap: Any = lambda layer, x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.wrap(self.proj, x)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 36), nn.Linear(36, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def adapt(
    model: nn.Module, *, autocast_adapter_dtype: bool = True, targets: str = ".*", **lora: Any
) -> nn.Module:
    """PEFT's LoRA with B away from zero; base weights are random bits of their dtype."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **lora})
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    fill_b(adapted, size=0.1)
    return adapted.train()


def one(dtype: torch.dtype = torch.float32, *, bias: bool = False, **lora: Any) -> nn.Module:
    torch.manual_seed(0)
    return adapt(One(nn.Linear(24, 20, bias=bias, dtype=dtype)), targets="proj", **lora)


def layer_of(model: nn.Module) -> Any:
    return next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))


def peft_parameters(model: nn.Module) -> tol.Parameters:
    layer = layer_of(model)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    base = layer.base_layer
    return tol.Parameters(
        base.weight, a.weight, b.weight, float(layer.scaling["default"]), base.bias, b.bias
    )


def check_peft(model: nn.Module, x: Tensor, mask: Tensor | None = None, **options: Any) -> Passes:
    """One site, within the FP8 bound of the original."""
    torch._dynamo.reset()
    passes = Passes(**options)
    parameters = replace(peft_parameters(model), mask=mask)
    check_site(torch.compile(model, backend=passes), model, x, parameters)
    assert len(passes.sites) == 1
    assert not passes.rejected
    return passes


class Layer(nn.Module):
    """``function(layer, x)`` of a base and the two linears of an adapter."""

    def __init__(self, function: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(24, 20, dtype=dtype).requires_grad_(False)
        self.a, self.b = nn.Linear(24, 4, bias=False), nn.Linear(4, 20, bias=False)
        self.other = nn.Linear(24, 20, bias=False).requires_grad_(False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# -- other packages --------------------------------------------------------------------------------


def masked(x: Tensor, dropout: float) -> Tensor | None:
    return dropped(x) if dropout else None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_loralib_linear(bias, dropout):
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(0)
    layer = loralib.Linear(24, 20, r=4, lora_alpha=8, lora_dropout=dropout, bias=bias)
    if bias:
        layer.bias.requires_grad_(False)
    nn.init.normal_(layer.lora_B, std=0.1)
    x = randn(2, 3, 24)
    parameters = tol.Parameters(
        layer.weight, layer.lora_A, layer.lora_B, 2.0, layer.bias, mask=masked(x, dropout)
    )
    torch._dynamo.reset()
    passes = Passes()
    check_site(torch.compile(layer, backend=passes), layer, x, parameters)
    assert len(passes.sites) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_torchtune_linear(dropout):
    torchtune = pytest.importorskip("torchtune.modules.peft")
    torch.manual_seed(0)
    layer = torchtune.LoRALinear(24, 20, rank=4, alpha=8, dropout=dropout, use_bias=True)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    nn.init.normal_(layer.lora_b.weight, std=0.1)
    a, b = layer.lora_a.weight, layer.lora_b.weight
    x = randn(2, 3, 24)
    parameters = tol.Parameters(layer.weight, a, b, 2.0, layer.bias, mask=masked(x, dropout))
    torch._dynamo.reset()
    passes = Passes()
    check_site(torch.compile(layer, backend=passes), layer, x, parameters)
    assert len(passes.sites) == 1


# -- hand-written ----------------------------------------------------------------------------------

SPELLINGS = [
    *(Spelling(base=how, bias=bias) for how in LINEARS for bias in (False, True)),
    *(Spelling(adapter=how, lora_bias=bias) for how in LINEARS for bias in (False, True)),
    *(Spelling(scale=how, lora_bias=bias) for how in SCALES for bias in (False, True)),
    *(Spelling(add=how, bias=True) for how in ADDS[:-1]),
    *(Spelling(add="addmm", scale=how) for how in ("absent", "x", "a", "alpha")),
    *(Spelling(dropout=how) for how in ("functional", "module", "identity")),
    *(Spelling(leading=shape) for shape in ((), (2, 3), (2, 2, 2), (0,))),
    Spelling(scaling=1.0),
    Spelling(scaling=3),
    Spelling(dtype=BF16, adapter="matmul", add="+="),
    Spelling(dtype=BF16, adapter_dtype=BF16, add=".add_", scale="multiply_"),
]


def changed(spelling: Spelling) -> str:
    plain = vars(Spelling())
    return " ".join(f"{k}={v}" for k, v in vars(spelling).items() if v != plain[k]) or "plain"


@pytest.mark.parametrize("spelling", SPELLINGS, ids=changed)
def test_hand_written_lora_is_one_site_within_the_fp8_bound(spelling):
    model = HandWritten(spelling)
    scaling = 1.0 if spelling.scale == "absent" else float(spelling.scaling)
    parameters = tol.Parameters(
        model.base.weight,
        model.lora_a.weight,
        model.lora_b.weight,
        scaling,
        model.base.bias,
        model.lora_b.bias,
    )
    torch._dynamo.reset()
    passes = Passes()
    x = randn(*spelling.leading, 24, seed=7).to(spelling.dtype)
    check_site(torch.compile(model, backend=passes), model, x, parameters)
    assert [site.scaling for site in passes.sites] == [scaling]
    (after,) = passes.after
    extra = {"merged_linear.default": 1, "getitem": 1 + 3, "proxy_update.default": 1}
    lora_bias = {"mul", "add", "to"} if spelling.lora_bias else set()
    views = {"getattr", "t", "transpose"}  # of W, A and B; they cost nothing
    assert {n: c for n, c in after.items() if n not in views | lora_bias} == extra


@pytest.mark.parametrize("scale", SCALES)
def test_a_bias_of_b_is_scaled_only_by_what_follows_b(scale):
    """With all weights zero the result is the bias term alone, and exact."""
    model = HandWritten(Spelling(scale=scale, lora_bias=True))
    with torch.no_grad():
        for layer in (model.base, model.lora_a, model.lora_b):
            layer.weight.zero_()
    x = randn(5, 24)
    passes = Passes()
    assert torch.equal(passes.run(model, x), model(x))
    assert len(passes.sites) == 1


def scaled_before(layer: Any, x: Tensor) -> Tensor:
    x = 3 * x
    return layer.base(x) + layer.b(layer.a(x))


def dropped_before(layer: Any, x: Tensor) -> Tensor:
    x = F.dropout(x, 0.25)
    return layer.base(x) + layer.b(layer.a(F.dropout(x, 0.5)))


def written_before(layer: Any, x: Tensor) -> Tensor:
    x = x.relu()
    x.add_(1)
    return layer.base(x) + layer.b(layer.a(x))


def written_after(layer: Any, x: Tensor) -> Tensor:
    x = x.relu()
    y = layer.base(x) + layer.b(layer.a(x))
    x += y.sum()
    return x + y.mean()


@pytest.mark.parametrize(
    ("function", "outside"),
    [
        (scaled_before, {"mul": 1}),
        (dropped_before, {"dropout": 2}),
        (written_before, {"relu": 1, "add_": 1}),
        (written_after, {"relu": 1, "sum": 1, "iadd": 1, "mean": 1, "add": 1}),
    ],
)
def test_what_made_the_input_of_both_stays_outside_the_site(function, outside):
    passes = Passes()
    passes.run(Layer(function), randn(5, 24))
    (site,) = passes.sites
    assert site.scaling == 1.0
    assert site.dropout == (0.5 if function is dropped_before else 0.0)
    inside = {"merged_linear.default": 1, "getitem": 1 + 3, "proxy_update.default": 1}
    assert dict(passes.after[0]) == inside | outside
