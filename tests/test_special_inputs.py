"""Modules used twice, empty and strided inputs, autocast, compiled autograd, a cache of keys."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from tests.emulation import emulate
from tests.models import (
    LoraLinear,
    Relu,
    fill_b,
    freeze_a,
    tiny_llama,
    train,
)
from tests.parameters import slow
from tests.situations import INNER, adapter, alone, compiled, options
from tests.training import adam, all_equal


@INNER
def test_a_module_used_twice_in_one_forward_is_one_site_with_the_sum_of_both_gradients(
    created, graphs, inner
):
    """The sum in autograd's own order, by which a second module of equal weights would differ."""

    class Twice(nn.Module):
        def __init__(self, first: LoraLinear, second: LoraLinear) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    layer, x = LoraLinear(32, 32), torch.randn(2, 5, 32)
    nn.init.normal_(layer.lora_B.weight, std=0.02)
    apart = Twice(layer, copy.deepcopy(layer))
    expected = compiled(apart, inner)(x)
    expected.sum().backward()
    parts = [[p.grad for p in part.parameters() if p.requires_grad] for part in apart.children()]
    layer.zero_grad()
    torch._dynamo.reset()
    created.clear()
    graphs.clear()

    result = compiled(Twice(layer, layer), inner)(x)
    result.sum().backward()
    assert torch.equal(result, expected)
    found = [p.grad for p in layer.parameters() if p.requires_grad]
    assert len(found) == 2
    assert all_equal(found, [a + b for a, b in zip(*parts)])
    assert len(graphs[0].sites) == 2
    assert created == []  # found again: the same W as before


def test_zero_tokens_and_strided_inputs():
    model = Relu()
    fill_b(model)
    call, x = compiled(model), torch.randn(32, 6)
    assert call(torch.empty(0, 32)).shape == (0, 32)
    assert call(torch.empty(2, 0, 32)).shape == (2, 0, 32)
    assert torch.equal(call(x.t()), call(x.t().contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The merged op takes its dtype from the layer that it replaces."""
    model, x = Relu(), torch.randn(2, 5, 32)
    with torch.autocast("cpu", dtype):
        eager = model(x)
    call = compiled(model, "aot_eager")
    with torch.autocast("cpu", dtype):
        losses = train(call, adam(model), x, steps=5)
        result = call(x)
    assert result.dtype == eager.dtype
    assert losses[-1] < losses[0]
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


def test_compiled_autograd():
    model, x = Relu(), torch.randn(2, 5, 32)
    expected = alone(model, x, steps=3, inner="aot_eager")
    call, optimizer = compiled(model, "aot_eager"), adam(model)
    with torch._dynamo.config.patch(compiled_autograd=True):
        for _ in range(3):
            loss = (call(x) - x / 2).float().square().mean()
            torch.compile(lambda loss=loss: loss.backward(), backend="eager")()
            optimizer.step()
            optimizer.zero_grad()
    assert all_equal(adapter(model), expected)


@pytest.mark.parametrize("update", ["adapter", slow("rows")])
def test_generate_with_a_kv_cache_gives_the_tokens_of_the_emulation(graphs, update):
    model = tiny_llama(layers=1, target_modules=["q_proj", "v_proj", "down_proj"]).eval()
    fill_b(model, size=1.0)
    if update == "rows":
        freeze_a(model)
    ids = torch.randint(0, 64, (1, 6))
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="falqon", options=options(update=update))
    tokens = model.generate(input_ids=ids, **settings)
    assert all(len(report.sites) == 3 for report in graphs)
    states = falqon_fx.adapters(model)
    assert len(states) == 3
    twin = emulate(copy.deepcopy(model), states)
    torch._dynamo.reset()
    for layer in twin.base_model.model.model.layers:
        layer._compiled_call_impl = None
    assert torch.equal(tokens, twin.generate(input_ids=ids, **settings))
