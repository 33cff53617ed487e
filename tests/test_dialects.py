"""LoRA as libraries and people write it, matched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora import config as options
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from torch.nn import functional as F

from tests import tolerances as tol
from tests.dialects import Layer, base_model, lora
from tests.models import fill_b
from tests.passes.test_match import One, check_peft, layer_of, one
from tests.sites import randn
from tests.spellings import Passes, check_site

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
    "added to the weight, by name": lambda m, x: F.linear(
        x, bias=None, weight=m.base.weight + 2 * (m.b.weight @ m.a.weight)
    ),
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


def orthogonal() -> nn.Module:
    return peft.get_peft_model(base_model(), lora(init_lora_weights="orthogonal"))


def qalora() -> nn.Module:
    """Its own arithmetic is for quantized layers alone; on nn.Linear the graph is plain LoRA."""
    return peft.get_peft_model(base_model(), lora(use_qalora=True, qalora_group_size=4))


def eva() -> nn.Module:
    config = lora(init_lora_weights="eva", eva_config=peft.EvaConfig())
    model = peft.get_peft_model(base_model(), config)
    batches = [{"x": randn(8, 24, seed=i)} for i in range(8)]
    peft.initialize_lora_eva_weights(
        model,
        batches,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0],
        show_progress_bar=False,
    )
    return model


def corda() -> nn.Module:
    model, parts = base_model(), options.CordaConfig(corda_method="kpm")
    config = lora(init_lora_weights="corda", corda_config=parts)
    preprocess_corda(model, config, lambda: [model(randn(16, 24, seed=i)) for i in range(4)])
    return peft.get_peft_model(model, config)


def lora_ga() -> nn.Module:
    model = base_model()
    config = lora(init_lora_weights="lora_ga", lora_ga_config=options.LoraGAConfig())
    preprocess_loraga(model, config, lambda: model(randn(16, 24)).square().mean().backward())
    return peft.get_peft_model(model, config)


def loftq() -> nn.Module:
    """PEFT's own (peft/utils/loftq_utils.py, `loftq_init`) needs a GPU. The same by hand, with its
    8 bits: W := dq(q(W)), and the largest singular parts of what that lost become B · A.
    """
    model = peft.get_peft_model(base_model(), lora())
    layer = layer_of(model)
    weight, scaling = layer.base_layer.weight, layer.scaling["default"]
    step = weight.detach().abs().amax(1, keepdim=True) / 127
    quantized = (weight.detach() / step).round() * step
    u, s, v = torch.linalg.svd(weight.detach() - quantized, full_matrices=False)
    with torch.no_grad():
        weight.copy_(quantized)
        layer.lora_B["default"].weight.copy_(u[:, :4] * s[:4].sqrt() / scaling)
        layer.lora_A["default"].weight.copy_(s[:4, None].sqrt() * v[:4])
    return model


# Whether B is away from zero at the start.
INITS = {orthogonal: True, qalora: False, eva: False, corda: True, lora_ga: True, loftq: True}


@pytest.mark.parametrize("make", INITS, ids=lambda make: make.__name__)
def test_initializations_are_one_site_within_the_fp8_bound(make):
    model = make()
    assert bool(layer_of(model).lora_B["default"].weight.any()) == INITS[make]
    if not INITS[make]:
        fill_b(model, size=0.1)
    check_peft(model, randn(2, 3, 24))


def trained_with(
    make: Callable[[nn.Module], torch.optim.Optimizer], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """A and B after three steps, and what the model then computes."""
    model, x = one(), randn(5, 24)
    optimizer = make(model)
    call = torch.compile(model, backend="falqon", options={"inner": "eager", **options})
    for _ in range(3):
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
    layer = layer_of(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return a.detach(), b.detach(), call(x).detach()


def start() -> tuple[Tensor, Tensor]:
    layer = layer_of(one())
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.mark.parametrize("options", [{}, {"update": "rows", "topk": "all"}], ids=str)
def test_lora_fa(options):
    """PEFT's optimizer freezes A; what it does to B counts in the next call."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)

    (a, b, y), (first_a, first_b) = trained_with(make, **options), start()
    assert torch.equal(a, first_a)
    assert not torch.equal(b, first_b)
    model, x = one(), randn(5, 24)
    with torch.no_grad():
        layer_of(model).lora_B["default"].weight.copy_(b)
    assert F.cosine_similarity(y.flatten(), model(x).flatten(), dim=0) > 0.99


def test_lora_plus_is_the_learning_rate_of_b():
    def plus(model: nn.Module) -> torch.optim.Optimizer:
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        layer = layer_of(model)
        groups = [
            {"params": [layer.lora_A["default"].weight], "lr": 1e-3},
            {"params": [layer.lora_B["default"].weight], "lr": 16e-3},
        ]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    found, expected = trained_with(plus), trained_with(plain)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    for moved, first in zip(found, start(), strict=False):
        assert not torch.equal(moved, first)


def test_mica_trains_a_on_a_frozen_b():
    """Its B is the smallest singular vectors of W."""
    model = one(init_lora_weights="mica")
    assert not layer_of(model).lora_B["default"].weight.requires_grad
    passes = check_peft(model, randn(2, 5, 24))
    (site,) = passes.sites
    assert (site.train_a, site.train_b) == (True, False)
    by_rows = Passes(frozen="leave", update="rows")
    by_rows.run(model, randn(2, 5, 24))
    assert not by_rows.sites
    assert "lora_B is frozen" in by_rows.rejected[0].reason


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
