"""LoRA as libraries and people write it: a site, or a refusal that a user can act on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import config as options
from torch import Tensor, nn
from torch.nn import functional as F

from tests import tolerances as tol
from tests.models import fill_b
from tests.passes.test_match import One, adapt, one
from tests.sites import randn
from tests.spellings import Passes, check_site


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Layer(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.base = nn.Linear(24, 20).requires_grad_(False)
        self.a, self.b = nn.Linear(24, 4, bias=False), nn.Linear(4, 20, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# -- matched ---------------------------------------------------------------------------------------

SPELLED = {
    # litgpt's LoRALinear (litgpt/lora.py), torchtitan's (components/lora.py)
    "litgpt": lambda m, x: (
        F.linear(x, m.base.weight)
        + (x @ m.a.weight.transpose(0, 1) @ m.b.weight.transpose(0, 1)) * 2.0
    ),
    "torchtitan": lambda m, x: F.linear(x, m.base.weight) + 2.0 * m.b(m.a(x)),
    "einsum": lambda m, x: (
        torch.einsum("bti,oi->bto", x, m.base.weight)
        + 2 * torch.einsum("btr,or->bto", torch.einsum("bti,ri->btr", x, m.a.weight), m.b.weight)
    ),
    "einsum, weight first": lambda m, x: (
        F.linear(x, m.base.weight)
        + 2
        * torch.einsum("or, ...r -> ...o", m.b.weight, torch.einsum("ri,...i->...r", m.a.weight, x))
    ),
    "added to the weight": lambda m, x: F.linear(x, m.base.weight + 2 * (m.b.weight @ m.a.weight)),
    "added to the weight, first": lambda m, x: (
        x @ torch.add(m.b.weight @ m.a.weight * 2, m.base.weight).T
    ),
    "added to the weight, scaled B": lambda m, x: (
        x @ (m.base.weight + torch.matmul(m.b.weight, m.a.weight).mul(2)).t()
    ),
}


@pytest.mark.parametrize("function", SPELLED.values(), ids=SPELLED)
def test_other_spellings_are_one_site_within_the_fp8_bound(function):
    model, passes = Layer(function), Passes()
    parameters = tol.Parameters(model.base.weight, model.a.weight, model.b.weight, 2.0)
    check_site(torch.compile(model, backend=passes), model, randn(2, 3, 24), parameters)
    assert len(passes.sites) == 1
    assert not passes.rejected


def test_a_parametrized_weight():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(randn(4, 24)), nn.Parameter(randn(20, 4))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + 0.5 * self.b @ self.a

    model, x, passes = One(nn.Linear(24, 20).requires_grad_(False)), randn(5, 24), Passes()
    expected = F.linear(x, model.proj.weight, model.proj.bias)
    nn.utils.parametrize.register_parametrization(model.proj, "weight", Added())
    result = passes.run(model, x)
    (site,) = passes.sites
    assert site.scaling == 0.5
    assert site.path.startswith("proj.parametrizations")
    added = model.proj.parametrizations.weight[0]
    expected = expected + 0.5 * x @ added.a.T @ added.b.T
    assert F.cosine_similarity(result.flatten(), expected.flatten(), dim=0) > 0.99
    result.sum().backward()
    assert added.b.grad is not None


INITS = {
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "EVA": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "LoRA-GA": {"init_lora_weights": True},
    # Its own arithmetic is for quantized layers alone; on nn.Linear the graph is plain LoRA.
    "QA-LoRA on an unquantized layer": {"use_qalora": True, "qalora_group_size": 4},
}


@pytest.mark.parametrize("lora", INITS.values(), ids=INITS)
def test_initializations_change_no_graph(lora):
    passes = Passes()
    passes.run(one(**lora), randn(5, 24))
    assert len(passes.sites) == 1
    assert not passes.rejected


def test_lora_fa():
    """A frozen: the same graph."""
    model, passes = one(), Passes()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    passes.run(model, randn(5, 24)).sum().backward()
    assert len(passes.sites) == 1


def test_diffusers_attention():
    attention = pytest.importorskip("diffusers.models.attention_processor")
    block = attention.Attention(query_dim=32, heads=2, dim_head=16)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model = peft.get_peft_model(block, peft.LoraConfig(r=4, target_modules=targets))
    fill_b(model)
    passes = Passes()
    passes.run(model, randn(2, 5, 32))
    assert sorted(site.path.split(".", 2)[-1] for site in passes.sites) == sorted(targets)
    assert not passes.rejected


# -- refused ---------------------------------------------------------------------------------------


def refused(model: nn.Module, x: Tensor, reason: str) -> None:
    """No site; each refusal says why, where, and what to do."""
    passes = Passes()
    torch.manual_seed(1)
    passes.run(model, x)
    assert not passes.sites
    assert passes.rejected
    assert any(reason in item.reason for item in passes.rejected), passes.rejected
    for item in passes.rejected:
        assert item.site
        assert item.remedy


UNREADABLE = "in a way that is not base(x) + s·B(A(x))"
BY_NAME = "but not as base(x) + s·B(A(x))"

VARIANTS = {
    "DoRA": ({"use_dora": True}, "not added to a linear's output"),
    "VeLoRA": ({"velora_config": options.VeloraConfig(num_groups=4)}, BY_NAME),
    "BD-LoRA": (
        {
            "use_bdlora": options.BdLoraConfig(
                target_modules_bd_a=["proj"], nblocks=2, match_strict=False
            )
        },
        UNREADABLE,
    ),
    "MiCA": ({"init_lora_weights": "mica"}, "lora_B is frozen"),
    "KaSA": ({"kasa_config": options.KasaConfig()}, BY_NAME),
    "MonteCLoRA": ({"monteclora_config": options.MontecloraConfig()}, BY_NAME),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "a graph break, or a variant of LoRA"),
}


@pytest.mark.parametrize(("lora", "reason"), VARIANTS.values(), ids=VARIANTS)
def test_peft_variants_are_refused(lora, reason):
    refused(one(**lora), randn(2, 5, 24), reason)


SPELLED_OTHERWISE = {
    "one einsum of three": (
        lambda m, x: m.base(x) + torch.einsum("...i,ri,or->...o", x, m.a.weight, m.b.weight),
        "computed by einsum",
    ),
    "dropout on the product": (
        lambda m, x: F.linear(x, m.base.weight + F.dropout(m.b.weight @ m.a.weight, 0.5)),
        "a dropout on B · A",
    ),
    # litgpt's LoRAQKVLinear (litgpt/lora.py): each part of q, k, v has its own A and B.
    "a convolution for B": (
        lambda m, x: (
            m.base(x) + F.conv1d(m.a(x).transpose(1, 2), m.b.weight[..., None]).transpose(1, 2)
        ),
        "computed by conv1d",
    ),
}


@pytest.mark.parametrize(("function", "reason"), SPELLED_OTHERWISE.values(), ids=SPELLED_OTHERWISE)
def test_what_can_not_be_read_is_reported(function, reason):
    refused(Layer(function), randn(2, 5, 24), reason)


def test_experts_are_refused():
    """PEFT's ParamWrapper: stacked weights, and the product is added to them."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(randn(3, 20, 24), requires_grad=False)
            self.a, self.b = nn.Parameter(randn(3, 4, 24)), nn.Parameter(randn(3, 20, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, (self.weight + torch.bmm(self.b, self.a)).transpose(1, 2))

    refused(Experts(), randn(3, 5, 24), "stacked weights, such as those of experts")


def test_mixed_batches_of_adapters_are_refused():
    model = one()
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules="proj"))
    model.eval()
    passes = Passes()
    torch.compile(model, backend=passes)(randn(2, 24), adapter_names=["default", "other"])
    assert not passes.sites
    assert passes.rejected


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_no_adapter_in_the_graph_no_site_and_nothing_to_report(state):
    model, passes, x = one(), Passes(), randn(5, 24)
    if state == "merged":
        model.merge_adapter()
        passes.run(model, x)
    else:
        with model.disable_adapter():
            passes.run(model, x)
    assert not passes.sites
    assert not passes.rejected


def test_a_bitsandbytes_base_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    layer = Layer(lambda m, x: m.base(x) + m.b(m.a(x)))
    quantized = bnb.nn.Linear8bitLt(24, 20, bias=False, has_fp16_weights=False)
    layer.base = quantized.requires_grad_(False)
    passes = Passes()
    passes.run(layer, randn(5, 24))
    assert not passes.sites
    assert passes.rejected


def test_adapted_convolution_is_refused():
    model = adapt(One(nn.Conv2d(3, 8, 3)), targets="proj")
    refused(model, randn(1, 3, 6, 6), "a convolution, not a linear")
