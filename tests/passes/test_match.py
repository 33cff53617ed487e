from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests import tolerances as tol
from tests.models import fill_b, tiny_llama
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


# -- PEFT ------------------------------------------------------------------------------------------

ARRANGEMENTS = {
    "float32": {},
    "float32 adapter in a bfloat16 model": {"dtype": BF16},
    "float32 adapter in a float16 model": {"dtype": torch.float16},
    "bfloat16 adapter": {"dtype": BF16, "autocast_adapter_dtype": False},
    "bias": {"bias": True},
    "bias in bfloat16": {"bias": True, "dtype": BF16},
    "lora_bias": {"bias": True, "lora_bias": True},
    "lora_bias, bfloat16 model": {"dtype": BF16, "bias": True, "lora_bias": True},
    "rank 1": {"r": 1},
    "rank above out": {"r": 32},
    "gaussian": {"init_lora_weights": "gaussian"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("lora", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_peft_linear_is_one_site_within_the_fp8_bound(lora):
    model = one(**lora)
    passes = check_peft(model, randn(2, 3, 24).to(lora.get("dtype", torch.float32)))
    (site,) = passes.sites
    assert (site.out_features, site.in_features, site.rank) == (20, 24, lora.get("r", 4))
    assert (site.adapters, site.train_a, site.train_b) == (1, True, True)
    assert site.path == "base_model.model.proj"


@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (2, 3, 24), (2, 1, 3, 24), (0, 24)])
def test_peft_linear_takes_any_number_of_dimensions(shape):
    check_peft(one(), randn(*shape))


def test_rslora_scales_by_the_root_of_the_rank():
    (site,) = check_peft(one(use_rslora=True, r=9, lora_alpha=6), randn(5, 24)).sites
    assert site.scaling == 6 / 3


def test_rank_and_alpha_patterns_give_each_site_its_own():
    model = adapt(Two(), targets=".*(up|down)", rank_pattern={"up": 2}, alpha_pattern={"up": 16})
    passes = Passes()
    passes.run(model, randn(5, 24))
    found = {site.path.split(".")[-1]: (site.rank, site.scaling) for site in passes.sites}
    assert found == {"up": (2, 8.0), "down": (4, 2.0)}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_an_adapter_reads_the_dropped_x_its_base_layer_x_itself(dtype):
    """With the mask that eager draws, against float64."""
    model, x = one(dtype, lora_dropout=0.5, bias=True), randn(5, 24).to(dtype)
    passes = check_peft(model, x, mask=dropped(x.float()))  # what PEFT casts x to
    assert passes.sites[0].dropout == 0.5
    assert passes.before[0]["dropout"] == passes.after[0]["dropout"] == 1
    (op,) = passes.results[0].gm.graph.find_nodes(op="call_function", target=FUSED)
    (reads,) = op.args[10]
    assert reads.target is F.dropout
    assert op.args[0].op == "placeholder"


def test_dropout_draws_the_numbers_that_eager_draws():
    """Whatever is random behind a site is, too: its dropout draws as many numbers as eager does."""

    class Noisy(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return torch.cat([x, torch.rand(5, 24)], 1)

    model, x = adapt(Noisy(), targets=".*(up|down)", lora_dropout=0.25), randn(5, 24)
    torch.manual_seed(3)
    ours = Passes().run(model, x)
    torch.manual_seed(3)
    assert torch.equal(ours[:, 24:], model(x)[:, 24:])


def test_siblings_behind_a_dropout_each_keep_their_own():
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(24, 20) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x) + self.v(x)

    torch.manual_seed(0)
    model, passes = adapt(Three(), targets=".*(q|k|v)", lora_dropout=0.5), Passes()
    passes.run(model, randn(5, 24))
    ops = passes.results[0].gm.graph.find_nodes(op="call_function", target=FUSED)
    assert [len(op.args[1]) for op in ops] == [1, 1, 1]
    assert len({op.args[10][0] for op in ops}) == 3
    assert len({op.args[0] for op in ops}) == 1


def test_adapter_dropout_is_ignored_where_asked():
    """Against the original without dropout: `check_site` sets p = 0 there."""
    passes = check_peft(one(lora_dropout=0.5), randn(5, 24), dropout="ignore")
    assert passes.sites[0].dropout == 0.5
    assert passes.before[0]["dropout"] == 1
    assert passes.after[0]["dropout"] == 0


def test_adapter_dropout_is_rejected_where_asked():
    passes = refused(one(lora_dropout=0.5), randn(5, 24), "adapter dropout p=0.5", dropout="reject")
    assert passes.before[0]["dropout"] == 1


@pytest.mark.parametrize("dropout", ["exact", "reject"])
def test_no_dropout_is_left_in_evaluation(dropout):
    passes = check_peft(one(lora_dropout=0.5).eval(), randn(5, 24), dropout=dropout)
    assert passes.sites[0].dropout == 0
    assert passes.after[0]["dropout"] == 0


@pytest.mark.parametrize("frozen", [("lora_A",), ("lora_B",), ("lora_A", "lora_B")], ids="+".join)
def test_what_requires_no_gradient_gets_none_and_the_rest_its_own(frozen):
    model, x = one(bias=True), randn(5, 24)
    for part in frozen:
        getattr(layer_of(model), part).requires_grad_(False)
    passes = check_peft(model, x)
    (site,) = passes.sites
    assert (site.train_a, site.train_b) == ("lora_A" not in frozen, "lora_B" not in frozen)
    (op,) = passes.results[0].gm.graph.find_nodes(op="call_function", target=FUSED)
    assert op.args[13] == site.train_a  # keep_x


def several(dtype: torch.dtype, ranks: Sequence[int], **lora: Any) -> nn.Module:
    """A layer with adapters of these ranks, the last of them in ``dtype``, the others in float32;
    each with a scaling of its own.
    """
    model = one(dtype, bias=True, r=ranks[0], **lora)
    names = ["default"]
    for i, rank in enumerate(ranks[1:]):
        names.append(f"further_{i}")
        config = peft.LoraConfig(r=rank, lora_alpha=3 * rank + i, target_modules="proj", **lora)
        model.add_adapter(names[-1], config)
    model.base_model.set_adapter(names)
    layer = layer_of(model)
    for part in (layer.lora_A, layer.lora_B):
        part[names[-1]].to(dtype)
    fill_b(model, size=0.1)
    return model


def several_parameters(model: nn.Module) -> tol.Parameters:
    layer, first = layer_of(model), peft_parameters(model)
    others = [
        (layer.lora_A[n].weight, layer.lora_B[n].weight, float(layer.scaling[n]))
        for n in layer.active_adapters[1:]
    ]
    return replace(first, others=tuple(others))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("ranks", [(4, 2), (4, 1, 9)])
def test_several_active_adapters_of_one_layer_are_one_site(ranks, dtype):
    model, x, passes = several(dtype, ranks), randn(2, 3, 24).to(dtype), Passes()
    torch._dynamo.reset()
    check_site(torch.compile(model, backend=passes), model, x, several_parameters(model))
    (site,) = passes.sites
    assert (site.adapters, site.rank) == (len(ranks), sum(ranks))
    assert not passes.rejected
    (after,) = passes.after
    assert after["linear"] == 0
    assert after["proxy_update.default"] == after["merged_linear.default"] == 1
    (op,) = passes.results[0].gm.graph.find_nodes(op="call_function", target=FUSED)
    assert op.args[11] == [0] * len(ranks)  # owner
    assert op.args[12] == [float(layer_of(model).scaling[n]) for n in model.active_adapters]


def test_of_several_adapters_each_has_the_dropout_that_eager_draws():
    """The first drops x, the second reads it as it is."""
    model, x, passes = several(torch.float32, (4, 2), lora_dropout=0.5), randn(5, 24), Passes()
    layer_of(model).lora_dropout["further_0"].p = 0.0
    torch._dynamo.reset()
    parameters = replace(several_parameters(model), mask=dropped(x))
    check_site(torch.compile(model, backend=passes), model, x, parameters)
    (op,) = passes.results[0].gm.graph.find_nodes(op="call_function", target=FUSED)
    first, second = op.args[10]
    assert first.target is F.dropout
    assert second is op.args[0]


def test_an_adapter_that_is_no_site_leaves_the_others_one():
    """The second reads another input."""

    def function(layer: Any, x: Tensor) -> Tensor:
        first = layer.base(x) + layer.b(layer.a(x))
        return first + layer.b(layer.a(x.relu()))

    model, x, passes = Layer(function), randn(5, 24), Passes()
    result = passes.run(model, x)
    assert [site.adapters for site in passes.sites] == [1]
    assert [item.reason for item in passes.rejected] == [
        "lora_A reads another input than the base layer"
    ]
    assert F.cosine_similarity(result.flatten(), model(x).flatten(), dim=0) > 0.99


def test_a_sum_of_adapters_that_is_scaled_in_between_keeps_the_first():
    model = Layer(lambda m, x: (m.base(x) + m.b(m.a(x))) * 3 + m.b(m.a(x)))
    passes = Passes()
    passes.run(model, randn(5, 24))
    assert [site.adapters for site in passes.sites] == [1]
    assert [item.reason for item in passes.rejected] == [
        "the output is scaled between two adapters"
    ]


def between(layer: Any, x: Tensor) -> Tensor:
    return layer.base(x) + layer.b(F.dropout(layer.a(x), 0.5))


def test_a_dropout_between_a_and_b_is_refused():
    refused(Layer(between), randn(5, 24), "a dropout stands between lora_A and lora_B")
    refused(Layer(between), randn(5, 24), "adapter dropout p=0.5", dropout="reject")
    passes = Passes(dropout="ignore")
    passes.run(Layer(between), randn(5, 24))
    assert [site.dropout for site in passes.sites] == [0.5]


@pytest.mark.parametrize("reentrant", [True, False])
def test_site_in_a_checkpoint_body(reentrant):
    model = one(BF16, bias=True, lora_bias=True)
    model.base_model.model.wrap = functools.partial(checkpoint, use_reentrant=reentrant)
    passes = check_peft(model, randn(2, 3, 24).to(BF16))
    assert passes.before[0]["tag_activation_checkpoint"] == 1
    assert passes.after[0]["tag_activation_checkpoint"] == 1
    assert passes.after[0]["merged_linear.default"] == 1


def test_a_lora_model_rewrites_every_site_and_nothing_else():
    passes = Passes()
    passes.run(tiny_llama(), torch.randint(64, (2, 8)))
    (before,), (after,) = passes.before, passes.after
    assert len(passes.sites) == 14
    assert not passes.rejected
    names = ["merged_linear.default", "proxy_update.default", "getitem"]
    names += ["linear", "mul", "add", "to"]
    change = {name: after[name] - before[name] for name in names}
    # Per site a linear for W, A and B, the scaling, the sum and its cast become one result of an
    # op; a block has one op for q/k/v, one for gate/up, and two for o and down. The casts of an
    # adapter are three results of one op for all.
    assert change == {
        "merged_linear.default": 8,
        "proxy_update.default": 1,
        "getitem": 14 + 3 * 14,
        "linear": -3 * 14,
        "mul": -14,
        "add": -14,
        "to": -14,
    }
    assert {n: c for n, c in (after - before).items() if n not in names} == {}
    assert {n: c for n, c in (before - after).items() if n not in names} == {}
    assert [(item.site, item.reason) for item in passes.left] == [
        ("base_model.model.lm_head", "it is an output head")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_lora_model_rewrites_every_site(reentrant):
    model = tiny_llama(lora_dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    passes = Passes()
    tokens = torch.randint(64, (2, 8))
    torch._dynamo.reset()
    torch.compile(model, backend=passes)(input_ids=tokens, labels=tokens).loss.backward()
    assert len(passes.sites) == 14
    assert not passes.rejected
    assert sum(count["tag_activation_checkpoint"] for count in passes.after) == 2
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_autocast_leaves_the_sites_found():
    passes = Passes()
    with torch.autocast("cpu", torch.bfloat16):
        y = passes.run(one(bias=True), randn(5, 24))
    assert y.dtype == BF16
    assert [site.out_dtype for site in passes.sites] == ["bfloat16"]


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


# -- refused ---------------------------------------------------------------------------------------


def refused(model: nn.Module, x: Tensor, reason: str, **options: Any) -> Passes:
    """No site, the reason told, the graph and its result as they were."""
    passes = Passes(frozen="leave", **options)
    torch.manual_seed(1)
    result = passes.run(model, x)
    torch.manual_seed(1)
    assert torch.equal(result, model(x))
    assert not passes.sites
    assert passes.rejected
    for item in passes.rejected:
        assert reason in item.reason
        assert item.remedy
        assert item.site
    for gm, rewritten in zip(passes.given, passes.results, strict=True):
        assert str(gm.graph) == str(rewritten.gm.graph)
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


def uses_down_elsewhere(layer: Layer, x: Tensor) -> Tensor:
    down = layer.a(x)
    return layer.base(x) + layer.b(down) + down.sum()


def uses_base_elsewhere(layer: Layer, x: Tensor) -> Tensor:
    base = layer.base(x)
    return (base + layer.b(layer.a(x))) * base


def uses_adapter_elsewhere(layer: Layer, x: Tensor) -> Tensor:
    up = layer.b(layer.a(x))
    return layer.base(x) + up + up.relu()


def writes_x(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    base = layer.base(x)
    x.add_(1)
    return base + layer.b(layer.a(x))


def writes_x_after_reading(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    base, up = layer.base(x), layer.b(layer.a(x))
    x.zero_()
    return base + up


def scales_x_in_place(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    total = layer.base(x) + layer.b(layer.a(x.mul_(3)))
    return total + x.sum()


def writes_a_view_of_x(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    base = layer.base(x)
    x.view(-1)[3:].add_(1)
    return base + layer.b(layer.a(x))


def writes_x_after_its_cast(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    y = x.double().float()
    x.add_(1)
    return layer.base(y) + layer.b(layer.a(y))


def writes_x_as_out(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    base = layer.base(x)
    torch.neg(x.detach(), out=x)
    return base + layer.b(layer.a(x))


def writes_the_bias(layer: Layer, x: Tensor) -> Tensor:
    base = layer.base(x)
    with torch.no_grad():
        layer.base.bias.add_(0.0)
    return base + layer.b(layer.a(x))


REFUSED = {
    "base scaled": (
        lambda m, x: 2 * m.base(x) + m.b(m.a(x)),
        "the base output is scaled",
    ),
    "base scaled by alpha": (
        lambda m, x: torch.add(m.b(m.a(x)), m.base(x), alpha=2),
        "the base output is scaled",
    ),
    "base scaled by beta": (
        lambda m, x: torch.addmm(m.base(x), m.a(x), m.b.weight.t(), beta=2),
        "the base output is scaled",
    ),
    "base dropped": (
        lambda m, x: F.dropout(m.base(x), 0.5) + m.b(m.a(x)),
        "the base output is scaled or dropped",
    ),
    "A's output is used elsewhere": (uses_down_elsewhere, "also used by"),
    "the base output is used elsewhere": (uses_base_elsewhere, "also used by"),
    "B's output is used elsewhere": (uses_adapter_elsewhere, "not added to a linear's output"),
    "dropout after B": (
        lambda m, x: m.base(x) + F.dropout(m.b(m.a(x)), 0.5),
        "a dropout follows lora_B",
    ),
    "A reads another input": (
        lambda m, x: m.base(x) + m.b(m.a(x.relu())),
        "reads another input",
    ),
    "gated by a tensor": (
        lambda m, x: m.base(x) + m.b(m.a(x)) * x.mean(),
        "not added to a linear's output",
    ),
    "no base": (lambda m, x: m.b(m.a(x)).relu(), "not added to a linear's output"),
    "added to no linear": (lambda m, x: x[:, :20] + m.b(m.a(x)), "not to a linear"),
    "two adapters, added first": (
        lambda m, x: m.base(x) + (m.b(m.a(x)) + m.b(m.a(x)) * 2),
        "added to another adapter before the base layer's output",
    ),
    "base stored [in, out]": (
        lambda m, x: x @ m.other.weight.view(24, 20) + m.b(m.a(x)),
        "not to a linear on a parameter",
    ),
    "x written between": (writes_x, "written in place"),
    "x written before the sum": (writes_x_after_reading, "written in place"),
    "x scaled in place": (scales_x_in_place, "written in place"),
    "x written through a view": (writes_a_view_of_x, "written in place"),
    "x written after its cast": (writes_x_after_its_cast, "written in place"),
    "x written by out=": (writes_x_as_out, "written in place"),
    "the bias written between": (writes_the_bias, "written in place"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_lora_is_refused_and_left_as_it_was(function, reason):
    refused(Layer(function), randn(5, 24), reason)


def test_a_bias_of_a_is_refused():
    layer = Layer(lambda m, x: m.base(x) + m.b(m.a(x)))
    layer.a.bias = nn.Parameter(torch.ones(4))
    refused(layer, randn(5, 24), "lora_A has a bias")


def test_adapters_stored_transposed_are_refused():
    layer = Layer(lambda m, x: m.base(x) + x @ m.a.weight @ m.b.weight)
    layer.a.weight, layer.b.weight = nn.Parameter(randn(24, 4)), nn.Parameter(randn(4, 20))
    refused(layer, randn(5, 24), "stored transposed")


def test_dora_is_refused():
    passes = refused(one(use_dora=True), randn(5, 24), "not added to a linear's output")
    # Where PEFT's DoRA breaks the graph, its adapter is compiled apart, in a helper's frame.
    paths = {"lora_A.weight", "base_model.model.proj"}
    assert {item.site for item in passes.rejected} <= paths


def test_the_active_one_of_two_peft_adapters_is_matched():
    model = one()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="proj"))
    model.set_adapter("second")
    passes = Passes()
    passes.run(model, randn(5, 24))
    assert [site.rank for site in passes.sites] == [2]
    assert not passes.rejected


def test_a_trained_base_weight_is_refused():
    model = one()
    layer_of(model).base_layer.weight.requires_grad_(True)
    passes = refused(model, randn(5, 24), "the base weight is trained too")
    assert "requires_grad_(False)" in passes.rejected[0].remedy


def test_a_quantized_base_is_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model: Any = One(nn.Linear(32, 32, dtype=BF16))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    layer = Layer(lambda m, x: m.base(x) + m.b(m.a(x.float())))
    layer.base = model.proj
    layer.a, layer.b = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
    refused(layer, randn(5, 32).to(BF16), "base weight is a")


def test_an_fp8_base_is_refused():
    """Stored in FP8 and decoded in each forward pass, as FP8 checkpoints are run."""
    layer = Layer(lambda m, x: F.linear(x, m.code.to(x.dtype) * m.scale) + m.b(m.a(x)))
    layer.code = nn.Parameter(randn(20, 24).to(torch.float8_e4m3fn), requires_grad=False)
    layer.scale = nn.Parameter(torch.ones(20, 1), requires_grad=False)
    passes = refused(layer, randn(5, 24), "not to a linear on a parameter")
    assert "quantized" in passes.rejected[0].reason


def test_lora_on_an_embedding_is_refused():
    model = adapt(One(nn.Embedding(50, 24)), targets="proj")
    nn.init.normal_(model.base_model.model.proj.lora_embedding_B["default"])
    refused(model, torch.randint(50, (2, 5)), "an embedding, not a linear")


def test_lora_on_a_convolution_is_refused():
    model = adapt(One(nn.Conv2d(6, 8, 3)), targets="proj")
    refused(model, randn(2, 6, 7, 7), "a convolution, not a linear")


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_a_peft_layer_without_its_adapter_is_a_plain_linear(state):
    model, x = one(bias=True), randn(5, 24)
    if state == "merged":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    untouched(model, x)


def test_a_merged_loralib_layer_is_a_plain_linear():
    loralib = pytest.importorskip("loralib")
    layer = loralib.Linear(24, 20, r=4)
    layer.eval()
    untouched(layer, randn(5, 24))


def test_two_linears_in_a_row_are_no_adapter():
    untouched(nn.Sequential(nn.Linear(24, 36), nn.Linear(36, 24)), randn(5, 24))


def untouched(model: nn.Module, x: Tensor) -> None:
    passes = Passes(frozen="leave")
    assert torch.equal(passes.run(model, x), model(x))
    assert not passes.sites
    assert not passes.rejected
    for gm, rewritten in zip(passes.given, passes.results, strict=True):
        assert str(gm.graph) == str(rewritten.gm.graph)


class Beside(nn.Module):
    """Two trained linears beside a frozen one, on no account named as LoRA."""

    def __init__(self, rank: int, features: int = 96, out: int = 80) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fixed = nn.Linear(features, out).requires_grad_(False)
        self.down = nn.Linear(features, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fixed(x) + self.up(self.down(x))


def gradients(call: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    call(x).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("rank", [40, 79, 80, 120])  # half of 80, below it, and above
def test_two_trained_linears_beside_a_frozen_one_are_no_adapter(rank):
    model, x, leave = Beside(rank), randn(5, 96), Passes(frozen="leave")
    torch._dynamo.reset()
    ours = gradients(torch.compile(model, backend=leave), model, x)
    assert not leave.sites
    for grad, eager in zip(ours, gradients(model, model, x), strict=True):
        assert torch.equal(grad, eager)
    passes = Passes()
    torch._dynamo.reset()
    ours = gradients(torch.compile(model, backend=passes), model, x)
    assert [(site.path, site.adapters) for site in passes.sites] == [("fixed", 0)]
    assert len(ours) == 2
    reasons = ["its rank is not below half of its width, and nothing names it LoRA"]
    assert [r.reason for r in passes.rejected] == (reasons if rank < 80 else [])


def test_a_low_rank_or_a_name_makes_two_linears_an_adapter():
    passes = Passes()
    passes.run(Beside(39), randn(5, 96))
    assert [site.adapters for site in passes.sites] == [1]
    check_peft(one(r=20), randn(5, 24))  # as wide as the layer, and named


def test_a_refused_layer_does_not_keep_others_from_being_rewritten():
    model = adapt(Two(), targets=".*(up|down)")
    up = next(m for n, m in model.named_modules() if n.endswith(".up"))
    up.base_layer.weight.requires_grad_(True)
    passes = Passes()
    passes.run(model, randn(5, 24))
    assert [site.path.split(".")[-1] for site in passes.sites] == ["down"]
    assert [item.site.split(".")[-1] for item in passes.rejected] == ["up"]


def test_a_bottleneck_behind_a_lora_layer_does_not_count_as_its_second_adapter():
    class Houlsby(Layer):
        def __init__(self) -> None:
            super().__init__(None)
            self.down, self.up = nn.Linear(20, 4, bias=False), nn.Linear(4, 20, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.base(x) + self.b(self.a(x))
            return h + self.up(self.down(h))

    passes = Passes()
    passes.run(Houlsby(), randn(5, 24))
    assert len(passes.sites) == 1
    assert [item.reason for item in passes.rejected] == [
        "lora_A reads another input than the base layer"
    ]


def test_the_sum_of_two_lora_layers_on_one_input_is_two_sites():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = HandWritten(Spelling()), HandWritten(Spelling(), seed=20)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + self.gate(x)

    passes = Passes()
    passes.run(Gate(), randn(5, 24))
    assert [site.path for site in passes.sites] == ["up", "gate"]
