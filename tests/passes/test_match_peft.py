"""PEFT's layers: which are one site, and what stays as it is."""

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
from tests.passes.test_match import (
    BF16,
    FUSED,
    Layer,
    Two,
    adapt,
    check_peft,
    layer_of,
    one,
    peft_parameters,
)
from tests.passes.test_match_refused import refused
from tests.sites import randn
from tests.spellings import (
    Passes,
    check_site,
    dropped,
)

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
    (reads,) = op.args[11]
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
    assert len({op.args[11][0] for op in ops}) == 3
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
    assert op.args[14] == site.train_a  # keep_x


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
    assert op.args[12] == [0] * len(ranks)  # owner
    assert op.args[13] == [float(layer_of(model).scaling[n]) for n in model.active_adapters]


def test_of_several_adapters_each_has_the_dropout_that_eager_draws():
    """The first drops x, the second reads it as it is."""
    model, x, passes = several(torch.float32, (4, 2), lora_dropout=0.5), randn(5, 24), Passes()
    layer_of(model).lora_dropout["further_0"].p = 0.0
    torch._dynamo.reset()
    parameters = replace(several_parameters(model), mask=dropped(x))
    check_site(torch.compile(model, backend=passes), model, x, parameters)
    (op,) = passes.results[0].gm.graph.find_nodes(op="call_function", target=FUSED)
    first, second = op.args[11]
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
