"""Frozen linear layers without an adapter run in FP8 beside the adapted ones."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests import tolerances as tol
from tests.models import LoraLinear, fill_b
from tests.parameters import each_value
from tests.passes.frozen import WIDTH, Attention, Frozen, fused
from tests.sites import randn
from tests.spellings import Passes, check_site, targets


def parameters(layer: nn.Linear) -> tol.Parameters:
    """With an adapter of rank 0, which is none."""
    out, features = layer.weight.shape
    none_a, none_b = torch.empty(0, features), torch.empty(out, 0)
    return tol.Parameters(layer.weight, none_a, none_b, 1.0, layer.bias)


def test_frozen_layers_are_siblings_of_adapted_ones():
    model, x, passes = Attention(), randn(5, WIDTH), Passes()
    passes.run(model, x)
    (result,) = passes.results
    together, last = fused(result.gm)
    assert len(together.args[1]) == 3
    k, q, v = (node.name for node in together.args[1])
    assert [k, q, v] == [f"falqon_base_{i}_weight" for i in range(3)]
    assert together.args[12] == [1, 2]  # which site each adapter belongs to
    assert together.args[13] == [2.0, 0.5]
    assert [len(column) for column in last.args[4:14]] == [0] * 10
    assert (together.args[14], last.args[14]) == (True, False)  # whether x is kept
    (given,) = (n for n in result.gm.graph.find_nodes(op="placeholder") if n.name == "l_x_")
    assert list(given.users) == [together]  # one op casts x, once
    sites = {site.path: (site.adapters, site.group) for site in passes.sites}
    assert sites == {"k": (0, 0), "q": (1, 0), "v": (1, 0), "o": (0, 1)}
    assert targets(result.gm)["linear"] == 0
    assert not passes.left
    assert not passes.rejected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_computes_what_its_sites_compute_alone(dtype):
    """Each O is a product of its own either way; dL/dx is added up in one or in three."""
    model, x = Attention(dtype), randn(5, WIDTH).to(dtype)
    layers = [model.q, model.k, model.v]
    grads = [randn(5, n, seed=i).to(dtype) for i, n in enumerate((WIDTH, 2 * WIDTH, WIDTH))]
    results = []
    for siblings in (True, False):
        torch._dynamo.reset()
        passes, given = Passes(siblings=siblings), x.clone().requires_grad_()
        call = torch.compile(lambda x: [layer(x) for layer in layers], backend=passes)
        ys = call(given)
        torch.autograd.backward(ys, grads)
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        results.append((given.grad, *ys, *trained))
        model.zero_grad()
        assert len(fused(passes.results[0].gm)) == (1 if siblings else 3)
    together, apart = results
    for ours, theirs in zip(together[1:], apart[1:], strict=True):
        assert torch.equal(ours, theirs)
    # Both add the same products, of operands that are off by 1/9 and 1/17 at most: in one sum of
    # all, or in a sum each, rounded to dtype and added up with a rounding more.
    sizes = torch.zeros(5, WIDTH, dtype=torch.float64)
    for layer, grad in zip(layers, grads, strict=True):
        base = layer if layer is model.k else layer.base_layer
        through: list[Any] = [(grad, base.weight)]
        if layer is not model.k:
            a, b = layer.lora_A.weight.double(), layer.lora_B.weight.double()
            through.append((layer.scaling * grad.double().abs() @ b.abs(), a))
        products = [left.double().abs() @ right.double().abs() for left, right in through]
        sizes += torch.stack(products).sum(0) * 1.2
    inner = 4 * WIDTH + 8
    bound = sizes * (2 * tol.gamma(inner) + 5 * tol.UNIT_ROUNDOFF[dtype])
    tol.assert_within(together[0], apart[0], bound)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
def test_a_frozen_layer_is_within_the_fp8_bound(leading, dtype, bias):
    model, passes = Frozen(bias=bias, dtype=dtype), Passes()
    x = randn(*leading, 72).to(dtype)
    check_site(torch.compile(model, backend=passes), model, x, parameters(model.proj))
    (site,) = passes.sites
    assert (site.path, site.adapters, site.rank) == ("proj", 0, 0)
    assert (site.train_a, site.train_b) == (False, False)


class Cast(nn.Module):
    """What PEFT makes of a layer whose adapter is another one than the active: its result, cast."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.first(x).to(x.dtype))


@each_value(
    behind=[LoraLinear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH).requires_grad_(False)],
)
def test_a_layer_reads_the_result_of_a_frozen_one_behind_a_cast(behind):
    torch.manual_seed(0)
    model, passes, x = Cast(behind), Passes(), randn(5, WIDTH)
    fill_b(model, 0.1)
    found = torch.compile(model, backend=passes)(x)
    assert len(passes.sites) == 2
    for layer in (model.first, behind):
        torch._dynamo.reset()
        x = torch.compile(layer, backend=Passes())(x)
    assert torch.equal(found, x)


SPELLED = {
    "functional": lambda m, x: F.linear(x, m.proj.weight, m.proj.bias),
    "x @ W.T": lambda m, x: x @ m.proj.weight.T + m.proj.bias,
    "addmm": lambda m, x: torch.addmm(m.proj.bias, x, m.proj.weight.t()),
    "between views": lambda m, x: m.proj(x.view(1, 5, 72)).view(5, 80),
    "einsum": lambda m, x: torch.einsum("ti,oi->to", x, m.proj.weight) + m.proj.bias,
}


@pytest.mark.parametrize("function", SPELLED.values(), ids=SPELLED)
def test_any_spelling_of_a_frozen_layer_is_one_op(function):
    model, passes = Frozen(function), Passes()
    check_site(torch.compile(model, backend=passes), model, randn(5, 72), parameters(model.proj))
    assert len(passes.sites) == 1
    (after,) = passes.after
    assert after["merged_linear.default"] == 1
    assert not {"linear", "matmul", "addmm", "einsum"} & after.keys()


def test_a_weight_stored_in_out_is_laid_out_once():
    """GPT-2's Conv1D."""

    def function(layer: Any, x: Tensor) -> Tensor:
        return torch.addmm(layer.proj.bias, x, layer.across)

    model, passes = Frozen(function), Passes()
    model.across = nn.Parameter(model.proj.weight.t().contiguous(), requires_grad=False)
    plain = Frozen()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = randn(5, 72)
    ours = passes.run(model, x)
    assert [(s.out_features, s.in_features) for s in passes.sites] == [(80, 72)]
    assert torch.equal(ours, Passes().run(plain, x))


def test_a_trained_bias_of_a_frozen_layer_gets_its_gradient():
    model, x = Frozen(), randn(5, 72)
    model.proj.bias.requires_grad_(True)
    y = Passes().run(model, x)
    grad = randn(5, 80, seed=1)
    y.backward(grad)
    # A sum of five in float32, in whatever order.
    bound = tol.dot_bound(torch.ones(1, 5), grad)[0]
    tol.assert_within(model.proj.bias.grad, grad.double().sum(0), bound)


def test_a_layer_that_reads_x_through_a_cast_is_a_sibling_of_those_that_read_it_directly():
    """Gemma's norm ends in a cast, from which every projection reads."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = LoraLinear(WIDTH, WIDTH, dtype=torch.bfloat16)
            self.k = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
            self.k.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = (x.float() * 1.5).relu().type_as(x)
            return self.q(x) * self.k(x)

    passes = Passes()
    passes.run(Cast(), randn(5, WIDTH).bfloat16())
    (op,) = fused(passes.results[0].gm)
    assert len(op.args[1]) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_frozen_layers_in_a_checkpoint_body(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model, passes, x = Checkpointed(), Passes(), randn(5, WIDTH).requires_grad_()
    passes.run(model, x).sum().backward()
    assert len(passes.sites) == 4
    (result,) = passes.results
    assert targets(result.gm)["merged_linear.default"] == 2
    assert targets(result.gm)["linear"] == 0
    assert x.grad is not None


def test_a_disabled_adapter_leaves_the_numbers_of_b_at_zero():
    """A reference model, as DPO has it: the base that the adapter is trained on, to the bit,
    however small the layer, and an output head too.
    """

    class Lm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.lm_head = nn.Linear(24, 16), nn.Linear(16, 40, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(self.proj(x).relu())

    model = peft.get_peft_model(Lm(), peft.LoraConfig(target_modules=["proj", "lm_head"], r=4))
    x, passes = randn(5, 24), Passes(include=["*model.proj", "*lm_head"])
    policy = passes.run(model, x)
    with model.disable_adapter():
        reference = torch.compile(model, backend=passes)(x)
    assert [site.adapters for site in passes.sites] == [1, 1, 0, 0]
    assert torch.equal(reference, policy)


def test_the_base_of_an_adapter_that_can_not_be_merged_runs_in_fp8():
    """Here one whose B is followed by a gate."""

    class Gated(LoraLinear):
        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x)) * x.mean()

    model, passes = Gated(72, 80), Passes()
    fill_b(model, 0.1)
    passes.run(model, randn(5, 72)).sum().backward()
    assert [(site.path, site.adapters) for site in passes.sites] == [("base_layer", 0)]
    assert len(passes.rejected) == 1
    assert passes.after[0]["linear"] == 2
    assert model.lora_A.weight.grad is not None
