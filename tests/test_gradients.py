"""Gradients and memory: what gets a gradient, and what is kept for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import falqon_fx
from tests.models import (
    LoraLinear,
    Relu,
    compiled,
    fill_b,
    freeze_a,
    lora_b,
    made,
    tiny_mlp,
)
from tests.parameters import PREPARED_OR_NOT, each_value, slow
from tests.training import all_equal

ROWS = {"update": "rows"}


@each_value(inner=["eager", "aot_eager"], prepared=PREPARED_OR_NOT)
def test_what_requires_grad_gets_a_gradient_and_nothing_else(inner, prepared):
    model = tiny_mlp(lora_bias=True)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    torch.nn.init.normal_(lora_b(model)[0])  # or A would get zeros
    for frozen in ("", "lora_A", "lora_B.default.weight", "lora_B.default.bias"):
        torch._dynamo.reset()
        for name, parameter in model.named_parameters():
            adapter = "lora_" in name
            parameter.requires_grad_(adapter and not (frozen and frozen in name))
            parameter.grad = None
        compiled(model, inner)(torch.randn(2, 32)).sum().backward()
        found = {name for name, p in model.named_parameters() if p.grad is not None}
        assert found == {name for name, p in model.named_parameters() if p.requires_grad}
        assert len(found) == (6 if not frozen else 4)


def test_a_step_between_forward_and_backward_leaves_the_gradients_of_that_forward_pass():
    """Torch raises there, since its backward pass would read a changed B. Ours reads the cast that
    the forward pass made. With update="rows" it reads B itself, and raises.
    """
    model, x = Relu(), torch.randn(4, 6, 32)
    fill_b(model)
    backend, trained = compiled(model), [p for p in model.parameters() if p.requires_grad]
    backend(x).square().mean().backward()
    expected = [p.grad.clone() for p in trained]
    model.zero_grad()
    loss = backend(x).square().mean()
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1.0)
    backend(x)
    loss.backward()
    assert all_equal([p.grad for p in trained], expected)

    written = made(update="rows")
    fill_b(written)
    backend = compiled(written, **ROWS)
    loss = backend(x).square().mean()
    with torch.no_grad():
        lora_b(written)[1].add_(1.0)
    backend(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_two_forwards_before_two_backwards(inner):
    model, x = Relu(), torch.randn(4, 6, 32)
    fill_b(model)
    backend, trained = compiled(model, inner), [p for p in model.parameters() if p.requires_grad]
    single = []
    for part in x.split(2):
        model.zero_grad()
        backend(part).square().mean().backward()
        single.append([p.grad for p in trained])
    model.zero_grad()
    losses = [backend(part).square().mean() for part in x.split(2)]
    for loss in losses:
        loss.backward()
    assert len(trained) == 4
    assert all_equal([p.grad for p in trained], [a + b for a, b in zip(*single)])


def saved_by(run: nn.Module, x: Tensor) -> list[tuple[torch.dtype, int]]:
    """dtype and number of elements of all that a call keeps for backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = run(x)
    output.float().sum().backward()
    return [(t.dtype, t.numel()) for t in saved]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", slow("inductor")])
@pytest.mark.parametrize("trained", ["A and B", "B"])
def test_of_x_its_fp8_form_is_kept_where_a_trains_and_else_nothing(inner, trained):
    """And of W its FP8 form alone. x here is what a norm gives, so that nothing else needs it: of
    all that is kept, only the norm's own input and x̂ are as large as x.
    """
    layers = nn.Sequential(nn.RMSNorm(64, eps=1e-6), LoraLinear(64, 96, dtype=torch.bfloat16))
    model = layers.bfloat16()
    model[0].requires_grad_(False)
    if trained == "B":
        freeze_a(model)
    x = torch.randn(480, 64).bfloat16().requires_grad_()
    kept = saved_by(compiled(model, inner), x)
    size, fp8 = 480 * 64, (torch.float8_e4m3fn, torch.uint8)
    assert [dtype in fp8 for dtype, n in kept if n == 96 * 64] == [True]  # W
    of_x = [dtype for dtype, n in kept if n == size]
    assert [dtype for dtype in of_x if dtype in fp8] == [torch.float8_e4m3fn] * (trained != "B")
    if inner == "inductor":  # others keep what the norm's own backward pass reads as well
        assert len([dtype for dtype in of_x if dtype not in fp8]) == 1


def test_the_step_has_no_host_sync():
    model, x = Relu(), torch.randn(4, 6, 32)

    def run() -> None:
        compiled(model, "inductor")(x).sum().backward()

    _, codes = run_and_get_code(run)
    assert len(codes) == 2
    for code in codes:
        assert "falqon.merged_linear" in code
        assert "_local_scalar_dense" not in code
        assert "item()" not in code
