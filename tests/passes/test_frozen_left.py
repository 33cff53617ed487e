"""Frozen linear layers that stay out of FP8, and why."""

from __future__ import annotations

import operator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from falqon_fx import rewrite
from falqon_fx.ops import lowering, wide_linear
from falqon_fx.passes.match.frozen import why_left
from tests import tolerances as tol
from tests.models import LoraLinear
from tests.passes.frozen import WIDTH, Attention, Frozen, Lm, fused
from tests.sites import randn
from tests.spellings import Passes, targets

# -- left ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "out", "features", "tied", "reason"),
    [
        ("model.lm_head", 32000, 4096, False, "it is an output head"),
        ("score", 64, 4096, False, "it is an output head"),
        ("model.decoder.unembedding", 50000, 768, False, "it is an output head"),
        ("output", 32000, 4096, False, "it is an output head"),
        ("model.lm_head", 32000, 4096, True, "its weight is tied to an embedding"),
        ("model.layers.0.mlp.gate", 64, 4096, False, "it is a router"),
        ("model.layers.0.mlp.gate", 11008, 4096, False, None),
        ("model.layers.0.mlp.gate_proj", 11008, 4096, False, None),
        ("model.layers.0.mlp.up", 63, 4096, False, "it is too small to gain (63 x 4096)"),
        ("model.layers.0.mlp.up", 4096, 32, False, "it is too small to gain (4096 x 32)"),
        ("model.layers.0.mlp.up", 64, 64, False, None),
        ("model.layers.0.mlp.up", 49152, 8192, False, None),
        ("model.lm_head.base_layer", 32000, 4096, True, None),
        ("model.layers.0.mlp.up.base_layer", 24, 16, False, None),
    ],
)
def test_why_a_layer_is_left(path, out, features, tied, reason):
    assert why_left(path, out, features, tied) == reason


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("frontend", ["Dynamo", "export", "symbolic_trace"])
def test_heads_tied_weights_routers_and_small_layers_are_left_with_the_reason(frontend, tie):
    model, tokens = Lm(tie), torch.randint(96, (2, 5))
    if frontend == "Dynamo":
        passes = Passes()
        ours = passes.run(model, tokens)
        (result,) = passes.results
    else:
        traced = fx.symbolic_trace(model)
        gm = traced if frontend != "export" else torch.export.export(model, (tokens,)).module()
        result = rewrite(gm, [tokens])
        ours = result(tokens)
    left = {item.site.split(".")[-1]: item.reason for item in result.report.left}
    tied = {"to_logits": "its weight is tied to an embedding"} if tie else {}
    assert left == {
        "small": "it is too small to gain (32 x 64)",
        "gate": "it is a router",
        "lm_head": "it is an output head",
        **tied,
    }
    assert all(item.remedy for item in result.report.left)
    done = [site.path for site in result.report.sites]
    assert done == (["proj"] if tie else ["proj", "to_logits"])
    for y, eager in zip(ours, model(tokens), strict=True):
        assert F.cosine_similarity(y.flatten(), eager.flatten(), dim=0) > 0.99


def test_frozen_layers_can_be_left():
    model, passes = Attention(), Passes(frozen="leave")
    passes.run(model, randn(5, WIDTH))
    assert [site.path for site in passes.sites] == ["q", "v"]
    assert passes.after[0]["linear"] == 2
    assert not passes.left


@pytest.mark.parametrize(
    ("options", "sites"),
    [
        ({"include": "k"}, ["k"]),
        ({"include": ["q", "o"]}, ["q", "o"]),
        ({"exclude": ["k", "v"]}, ["q", "o"]),
        ({"include": "?", "exclude": "o"}, ["k", "q", "v"]),
    ],
)
def test_include_and_exclude_hold_for_frozen_layers(options, sites):
    passes = Passes(**options)
    passes.run(Attention(), randn(5, WIDTH))
    assert [site.path for site in passes.sites] == sites


@pytest.mark.parametrize(("option", "done"), [("include", True), ("exclude", False)])
def test_a_pattern_that_names_a_lora_layer_names_its_base_without_the_adapter_too(option, done):
    model = peft.get_peft_model(Frozen(), peft.LoraConfig(target_modules="proj", r=4))
    model.base_model.disable_adapter_layers()
    passes = Passes(**{option: "*.proj"})
    passes.run(model, randn(5, 72))
    assert len(passes.sites) == done


def writes_x(layer: Any, x: Tensor) -> Tensor:
    x = x * 2
    y = layer.proj(x)
    x.add_(1)
    return y.to(torch.bfloat16) + x.sum()


def writes_the_bias(layer: Any, x: Tensor) -> Tensor:
    y = layer.proj(x)
    layer.proj.bias.add_(1)
    return y.to(torch.bfloat16)


UNTOUCHED = {
    "a computed weight": lambda m, x: F.linear(x, m.proj.weight * 2),
    "a view of the weight": lambda m, x: F.linear(x, m.proj.weight[:64]),
    "x written before the cast": writes_x,
    "a bias written before the cast": writes_the_bias,
    "the weight on the left": lambda m, x: (m.proj.weight @ x.T).T,
}


@pytest.mark.parametrize("function", UNTOUCHED.values(), ids=UNTOUCHED)
def test_what_is_no_linear_on_a_frozen_parameter_stays_as_it_was(function):
    model, x, passes = Frozen(function), randn(5, 72), Passes()
    ours = passes.run(model, x)
    if function is writes_the_bias:
        with torch.no_grad():
            model.proj.bias.sub_(1)
    assert torch.equal(ours, model(x))
    assert not passes.sites


def test_a_trained_layer_stays_as_it_was():
    model, x, passes = Frozen(), randn(5, 72), Passes()
    model.proj.weight.requires_grad_(True)
    ours = passes.run(model, x)
    assert torch.equal(ours, model(x))
    assert not passes.sites
    assert not passes.left


@pytest.mark.parametrize("frontend", ["Dynamo", "export", "symbolic_trace"])
def test_a_buffer_is_no_frozen_layer(frontend):
    """A bank of filters, as of mel frequencies."""

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bank", randn(80, 72))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.bank)

    model, x = Bank(), randn(5, 72)
    if frontend == "Dynamo":
        passes = Passes()
        passes.run(model, x)
        (result,) = passes.results
    else:
        traced = fx.symbolic_trace(model)
        result = rewrite(
            traced if frontend != "export" else torch.export.export(model, (x,)).module(), [x]
        )
    assert not result.report.sites
    assert not result.report.left


def test_a_frozen_bottleneck_is_two_frozen_layers_and_no_refused_adapter():
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(256, 64, bias=False), nn.Linear(64, 256)
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x)).relu()

    passes = Passes()
    passes.run(Bottleneck(), randn(5, 256))
    assert [site.path for site in passes.sites] == ["down", "up"]
    assert not passes.rejected


def test_with_rows_frozen_layers_run_in_fp8_beside_the_written_ones():
    model, x = Attention(), randn(5, WIDTH)
    for layer in (model.q, model.v):
        layer.lora_A.requires_grad_(False)
    passes = Passes(update="rows", topk=2)
    passes.run(model, x)
    together, last = fused(passes.results[0].gm)
    assert (len(together.args[1]), together.args[12]) == (3, [1, 2])
    assert len(last.args[1]) == 1
    assert targets(passes.results[0].gm)["linear"] == 0


def test_the_ops_of_frozen_layers_keep_their_place_in_the_model():
    passes = Passes()
    passes.run(Attention(), randn(5, WIDTH))
    (result,) = passes.results
    for op in fused(result.gm):
        items = [n for n in op.users if n.target is operator.getitem]
        assert all("nn_module_stack" in n.meta for n in (op, *items))


# -- what stays out of FP8 on a CPU without bfloat16 -----------------------------------------------


class BiasedHead(nn.Module):
    def __init__(self, spelling: str = "module") -> None:
        super().__init__()
        self.proj, self.lm_head = LoraLinear(64, 64), nn.Linear(64, 96)
        self.lm_head.requires_grad_(False)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if self.spelling == "keywords":
            return F.linear(weight=self.lm_head.weight, input=x, bias=self.lm_head.bias)
        return self.lm_head(x)


@pytest.mark.parametrize("spelling", ["module", "keywords"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_in_bfloat16_is_multiplied_in_float32(spelling, bias, monkeypatch):
    monkeypatch.setattr(lowering, "native_bf16", lambda: False)
    model, passes = BiasedHead(spelling).bfloat16(), Passes()
    if not bias:
        model.lm_head.register_parameter("bias", None)
    x = randn(5, 64).bfloat16().requires_grad_()
    y = passes.run(model, x)
    (result,) = passes.results
    assert targets(result.gm)["wide_linear.default"] == 1
    assert targets(result.gm)["linear"] == 0
    (left,) = passes.left
    assert left.remedy.startswith("It is multiplied in float32")

    site = torch.compile(model.proj, backend=Passes())(x)
    exact = [t.detach().double() for t in (site, model.lm_head.weight)]
    wanted, sizes = exact[0] @ exact[1].t(), exact[0].abs() @ exact[1].abs().t()
    if bias:
        wanted, sizes = wanted + model.lm_head.bias.double(), sizes + model.lm_head.bias.abs()
    # A sum of 65 terms in float32, then one rounding to bfloat16.
    tol.assert_within(y, wanted, tol.rounded_bound(wanted, tol.gamma(65) * sizes, torch.bfloat16))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [96, 40])  # at once: all, and with fewer in the last part
def test_gradients_of_a_product_in_float32(bias, rows, monkeypatch):
    monkeypatch.setattr(wide_linear, "ROWS", rows)
    x, weight = randn(2, 3, 64).bfloat16().requires_grad_(), randn(96, 64, seed=1).bfloat16()
    added = randn(96, seed=3).bfloat16() if bias else None
    y = torch.ops.falqon.wide_linear(x, weight, added)
    wanted, sizes = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    if added is not None:
        wanted, sizes = wanted + added.double(), sizes + added.double().abs()
    # A sum of 65 terms in float32, then one rounding to bfloat16.
    tol.assert_within(y, wanted, tol.rounded_bound(wanted, tol.gamma(65) * sizes, torch.bfloat16))
    grad = randn(2, 3, 96, seed=2).bfloat16()
    (found,) = torch.autograd.grad(y, x, grad)
    wanted = grad.double() @ weight.double()
    bound = tol.gamma(96) * (grad.double().abs() @ weight.double().abs())
    tol.assert_within(found, wanted, tol.rounded_bound(wanted, bound, torch.bfloat16))
    given = (x, weight, None)
    torch.library.opcheck(
        torch.ops.falqon.wide_linear_grad_x.default, (grad.requires_grad_(), weight)
    )
    torch.library.opcheck(torch.ops.falqon.wide_linear.default, given)


def test_a_head_stays_as_it_is_where_it_is_not_slow(monkeypatch):
    x = randn(5, 64)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(lowering, "native_bf16", lambda native=native: native)
        passes = Passes()
        passes.run(BiasedHead().to(dtype), x.to(dtype))
        assert targets(passes.results[0].gm)["wide_linear.default"] == 0
        assert passes.left[0].remedy.startswith("It runs as it was")


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q, self.options = LoraLinear(64, 64), options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, kv = self.q(x).view(2, 5, 4, 16).transpose(1, 2), x.view(2, 5, 4, 16).transpose(1, 2)
        return F.scaled_dot_product_attention(q, kv, value=kv, attn_mask=mask, **self.options)


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float"])
def test_attention_in_bfloat16_is_computed_in_float32(kind, monkeypatch):
    monkeypatch.setattr(lowering, "native_bf16", lambda: False)
    masks = {"bool": randn(5, 5) > -1, "float": randn(5, 5).bfloat16()}
    model, passes = Attends(is_causal=kind == "causal", scale=0.3).bfloat16(), Passes()
    x = randn(2, 5, 64).bfloat16().requires_grad_()
    y = passes.run(model, x, masks.get(kind))
    (result,) = passes.results
    assert targets(result.gm)["wide_attention"] == 1
    assert targets(result.gm)["scaled_dot_product_attention"] == 0

    def in_float32(x: Tensor) -> Tensor:
        q, kv = (
            t.view(2, 5, 4, 16).transpose(1, 2)
            for t in (torch.compile(model.q, backend=Passes())(x), x)
        )
        mask = masks.get(kind)
        wide = mask.float() if kind == "float" else mask
        given = (q.float(), kv.float(), kv.float(), wide)
        out = F.scaled_dot_product_attention(*given, is_causal=kind == "causal", scale=0.3)
        return out.bfloat16()

    wanted, grad = in_float32(x), randn(2, 4, 5, 16, seed=1).bfloat16()
    assert torch.equal(y, wanted)
    found, expected = (torch.autograd.grad(t, x, grad)[0] for t in (y, wanted))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("native", [True, False])
def test_other_attention_stays_as_it_is(native, monkeypatch):
    """That is not slow, or that autocast casts."""
    monkeypatch.setattr(lowering, "native_bf16", lambda: native)
    passes, x = Passes(), randn(2, 5, 64)
    if native:
        passes.run(Attends().bfloat16(), x.bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            passes.run(Attends(), x)
        passes.run(Attends(), x)
    assert len(passes.results) == 2 - native
    for result in passes.results:
        assert targets(result.gm)["scaled_dot_product_attention"] == 1
