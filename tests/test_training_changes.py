"""Training where adapters change between steps, with checkpoints and with dropout."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import falqon_fx
from tests import tolerances as tol
from tests.emulation import emulate
from tests.loops import Bases, parameters, values
from tests.models import compiled, fill_b, tiny_mlp
from tests.parameters import PREPARED_OR_NOT, each_value, slow
from tests.test_training import Call
from tests.training import all_equal

# -- adapters changed between steps ----------------------------------------------------------------


def two_adapters() -> Any:
    """PEFT's "default" and "other", of another rank and scaling, on both layers of an MLP."""
    import peft

    model: Any = tiny_mlp()
    further = peft.LoraConfig(r=6, lora_alpha=6, target_modules=["0", "2"])
    model.add_adapter("other", further)
    fill_b(model, 0.1)
    return model


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A")]


def scale_layers(model: Any, factor: float) -> None:
    for layer in layers(model):
        layer.scale_layer(factor)


def unscale_layers(model: Any) -> None:
    for layer in layers(model):
        layer.unscale_layer()


def set_scales(model: Any, factor: float) -> None:
    for layer in layers(model):
        layer.set_scale("default", factor)


# What happens to a model between steps.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "scale_layer": lambda model: scale_layers(model, 0.5),
    "unscale_layer": unscale_layers,
    "set_scale": lambda model: set_scales(model, 3.0),
    "other": lambda model: model.set_adapter("other"),
    "both": lambda model: model.base_model.set_adapter(["default", "other"]),
    "default": lambda model: model.set_adapter("default"),
}


@pytest.mark.parametrize("inner", ["eager", slow("aot_eager")])
@pytest.mark.parametrize("prepared", [False, True], ids=PREPARED_OR_NOT)
@torch._dynamo.config.patch(recompile_limit=32)  # each scaling and choice is a graph
def test_what_changes_between_steps_is_seen_and_makes_no_new_base(inner, prepared):
    """Scaling and choice of adapters: the numbers of the emulated ops, bit for bit, as is what
    disabled adapters give, which stays the same from first to last.
    """
    model, x = two_adapters(), torch.randn(5, 32)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    call = compiled(model, inner)
    call(x)
    bases, states = Bases.of(model), falqon_fx.adapters(model)
    twin: Any = emulate(copy.deepcopy(model), states)
    with model.disable_adapter():
        reference = call(x).detach()
    for name, change in CHANGES.items():
        change(model)
        change(twin)
        for _ in range(2):
            found = []
            for m, run in ((model, call), (twin, twin)):
                optimizer = torch.optim.SGD(parameters(m), lr=0.1)
                loss = (run(x) - x / 2).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append([loss.detach(), *values(list(m.parameters()))[-8:]])
            assert all_equal(*found), name
        states = falqon_fx.adapters(model)
        for layer, state in zip(layers(model), states.values(), strict=True):
            active = layer.active_adapters
            assert len(state.adapters) == len(active)
            delta = sum(layer.get_delta_weight(adapter) for adapter in active)
            # At most 6 roundings in a product of rank 6, one for the scaling, two in the sums.
            terms = state.base().double().abs() + sum(magnitude(layer, name) for name in active)
            bound = 2 * tol.gamma(9) * terms
            tol.assert_within(state.merged(), state.base() + delta, bound)
        with model.disable_adapter():
            assert torch.equal(call(x), reference), name
        bases.assert_still(model)


def magnitude(layer: Any, adapter: str) -> Tensor:
    """What an adapter's s·B·A adds up, without signs."""
    a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    return layer.scaling[adapter] * b.double().abs() @ a.double().abs()


# -- checkpoints and dropout -----------------------------------------------------------------------


class Block(nn.Module):
    """Two layers to adapt around one that stays frozen, wide enough for FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(64, 96), nn.Linear(96, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.mid(torch.relu(self.up(x)))))


class Deep(nn.Module):
    """``call`` wraps each call of a block, as a checkpoint does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.call: Callable[..., Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x


def deep(dropout: float, prepared: bool) -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], lora_dropout=dropout)
    model = peft.get_peft_model(Deep(), config)
    fill_b(model, 0.1)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    return model


def recorded(call: Call, model: nn.Module) -> list[Tensor]:
    """Two steps: losses, dL/dx and the gradients of all A and B, then A and B."""
    torch.manual_seed(3)
    x, optimizer = torch.randn(6, 64), torch.optim.AdamW(parameters(model), lr=1e-2)
    found: list[Any] = []
    for _ in range(2):
        own = x.clone().requires_grad_()
        loss = call(own).square().mean()
        loss.backward()
        found += [loss.detach(), own.grad, *(p.grad.clone() for p in parameters(model))]
        optimizer.step()
        optimizer.zero_grad()
    return found + values(parameters(model))


@pytest.mark.parametrize("inner", [slow("eager"), "aot_eager", slow("inductor")])
@each_value(reentrant={"": False, "reentrant": True}, prepared=PREPARED_OR_NOT)
@pytest.mark.parametrize("dropout", [slow(0.0), 0.3])
def test_checkpoints_inside_a_graph_change_no_number(graphs, reentrant, dropout, prepared, inner):
    """Losses, all gradients and two steps of A and B, bit for bit: what backward computes anew has
    the casts and the dropout's masks of the forward pass.
    """
    model = deep(dropout, prepared)
    expected = recorded(compiled(model, inner), model)
    torch._dynamo.reset()
    saving = deep(dropout, prepared)
    saving.get_base_model().call = functools.partial(checkpoint, use_reentrant=reentrant)
    graphs.clear()
    assert all_equal(recorded(compiled(saving, inner), saving), expected)
    (graph,) = graphs
    assert len(graph.sites) == 6  # the frozen ones among them


@each_value(inner=["eager", "aot_eager"], reentrant={"": False, "reentrant": True})
@pytest.mark.parametrize("dropout", [slow(0.0), 0.3])
def test_checkpoints_around_compiled_blocks_change_no_number(reentrant, dropout, inner):
    """Each block is a graph of its own, called again in backward."""
    found = []
    for call in (None, functools.partial(checkpoint, use_reentrant=reentrant)):
        torch._dynamo.reset()
        model = deep(dropout, prepared=True)
        inside = model.get_base_model()
        for block in inside.blocks:
            block.compile(backend="falqon", options={"inner": inner})
        inside.call = call or inside.call
        found.append(recorded(model, model))
    assert all_equal(*found)


@each_value(inner=["eager", "aot_eager"], prepared=PREPARED_OR_NOT)
def test_a_dropout_drops_what_eager_drops(inner, prepared):
    """The same random numbers: the emulated ops behind PEFT's own dropout, bit for bit."""
    model, plain = deep(0.3, prepared), deep(0.3, False)
    call = compiled(model, inner)
    call(torch.randn(2, 64))
    frozen = [f"base_model.model.blocks.{i}.mid" for i in range(2)]
    twin = emulate(plain, falqon_fx.adapters(model), frozen=frozen)
    assert all_equal(recorded(call, model), recorded(twin, twin))
