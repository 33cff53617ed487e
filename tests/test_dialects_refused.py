"""LoRA in forms that are refused, with a reason that a user can act on."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora import config as options
from peft.tuners.lora.arrow import create_arrow_model
from torch import Tensor, nn
from torch.nn import functional as F

from tests.dialects import Layer, base_model, lora
from tests.models import fill_b
from tests.passes.test_match import One, adapt, one
from tests.sites import randn
from tests.spellings import Passes


def refused(model: nn.Module, x: Tensor, reason: str) -> None:
    """No site; each refusal says why, where, and what to do."""
    passes = Passes(frozen="leave")
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
    "KaSA": ({"kasa_config": options.KasaConfig()}, BY_NAME),
    "MonteCLoRA": ({"monteclora_config": options.MontecloraConfig()}, BY_NAME),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "a graph break, or a variant of LoRA"),
}


@pytest.mark.parametrize(("lora", "reason"), VARIANTS.values(), ids=VARIANTS)
def test_peft_variants_are_refused(lora, reason):
    refused(one(**lora), randn(2, 5, 24), reason)


@pytest.mark.parametrize("name", ["BD-LoRA", "KaSA"])
def test_the_base_layer_of_a_variant_runs_in_fp8(name):
    """Where Dynamo has both in one graph, as it has not of the others: they break it at the
    adapter. What is not lora.Linear's own algebra runs as it was, with its gradients.
    """
    model, x, passes = one(**VARIANTS[name][0]), randn(2, 5, 24), Passes()
    torch.manual_seed(1)
    ours = passes.run(model, x)
    gradients = torch.autograd.grad(ours.sum(), trained := trainable(model))
    torch.manual_seed(1)
    eager = model(x)
    wanted = torch.autograd.grad(eager.sum(), trained)
    assert {site.adapters for site in passes.sites} == {0}
    assert passes.rejected
    assert not torch.equal(ours, eager)
    # Within the casts: the cosine that tests/test_zoo.py asks of whole models.
    for found, other in zip((ours, *gradients), (eager, *wanted), strict=True):
        assert F.cosine_similarity(found.flatten(), other.flatten(), dim=0) > 0.9


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


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
            m.base(x)
            + F.conv1d(m.a(x).transpose(1, 2), m.b.weight.clone()[..., None]).transpose(1, 2)
        ),
        "computed by conv1d",
    ),
}


@pytest.mark.parametrize(("function", "reason"), SPELLED_OTHERWISE.values(), ids=SPELLED_OTHERWISE)
def test_what_can_not_be_read_is_reported(function, reason):
    refused(Layer(function), randn(2, 5, 24), reason)


def test_a_b_that_is_computed_is_no_adapter_of_a_weight():
    model = Layer(lambda m, x: F.linear(x, m.base.weight + m.b.weight.relu() @ m.a.weight))
    passes, x = Passes(frozen="leave"), randn(2, 5, 24)
    assert torch.equal(passes.run(model, x), model(x))
    assert not passes.sites


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


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(3, 20, 24), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight.transpose(1, 2))


def test_a_param_wrapper_is_refused():
    """PEFT's own, on stacked weights of experts."""
    targets = {"target_modules": [], "target_parameters": ["proj.weight"]}
    model = peft.get_peft_model(One(Grouped()), peft.LoraConfig(r=4, **targets))
    fill_b(model, 0.1)
    refused(model, randn(3, 5, 24), BY_NAME)


def test_arrow_is_refused(tmp_path):
    """Frozen adapters that a router mixes token by token; nothing in it is trained."""
    for i in range(2):
        model = peft.get_peft_model(base_model(), lora())
        fill_b(model, 0.1, seed=i)
        model.save_pretrained(tmp_path / str(i))
    paths = [str(tmp_path / str(i)) for i in range(2)]
    refused(
        create_arrow_model(base_model(), paths, options.ArrowConfig(top_k=1)),
        randn(2, 5, 24),
        BY_NAME,
    )


def test_mixed_batches_of_adapters_are_refused():
    model = one()
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules="proj"))
    model.eval()
    passes = Passes()
    torch.compile(model, backend=passes)(randn(2, 24), adapter_names=["default", "other"])
    assert not [site for site in passes.sites if site.adapters]
    assert passes.rejected


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_no_adapter_in_the_graph_a_frozen_layer_and_nothing_to_report(state):
    model, passes, x = one(), Passes(), randn(5, 24)
    if state == "merged":
        model.merge_adapter()
        passes.run(model, x)
    else:
        with model.disable_adapter():
            passes.run(model, x)
    assert [site.adapters for site in passes.sites] == [0]
    assert not passes.rejected
    assert not passes.left


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
