"""Stacked experts that PEFT adapts by ParamWrapper, beside layers that are merged."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import peft
import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx.integrations.peft import run_param_wrappers_eagerly
from tests import zoo
from tests.models import fill_b

STEPS = 30  # beyond Dynamo's limit of 8 compilations of one function


class Experts(nn.Module):
    """Stacked weights, as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 48, 32) / 6)
        self.down = nn.Parameter(torch.randn(3, 32, 48) / 7)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.relu(x @ self.up.transpose(1, 2)) @ self.down.transpose(1, 2)).mean(0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.experts = nn.Linear(32, 32), Experts()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(self.proj(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def adapted() -> nn.Module:
    torch.manual_seed(0)
    targets = ["experts.up", "experts.down"]
    config = peft.LoraConfig(r=4, target_modules=["proj"], target_parameters=targets)
    model = peft.get_peft_model(Blocks(), config)
    fill_b(model, 0.05)
    return model


@pytest.fixture
def one_thread() -> Iterator[None]:
    """GEMM libraries cut a sum by the threads that they find free: its last bits vary with them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(model: nn.Module, batch: dict[str, Tensor], steps: int) -> list[Tensor]:
    """The losses under backend="falqon", all adapters given to the optimizer."""
    call = torch.compile(model, backend="falqon", options={"inner": "eager"})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        output = call(**batch)
        loss = output.square().mean() if isinstance(output, Tensor) else output.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def merged_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]


def test_run_eagerly_nothing_compiles_after_the_first_step(graphs):
    model, batch = adapted(), {"x": torch.randn(5, 32)}
    wrapped = run_param_wrappers_eagerly(model)
    assert len(wrapped) == 4
    assert all("experts" in path for path in wrapped)
    train(model, batch, steps=1)
    first = list(graphs)
    train(model, batch, steps=3)
    assert graphs == first
    assert len(falqon_fx.adapters(model)) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_runs_its_own_weights(copied):
    model, x = adapted(), torch.randn(5, 32)
    run_param_wrappers_eagerly(model)
    twin = copied(model)
    expected = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(model(x), expected)


def test_a_model_without_param_wrappers_stays_as_it_is():
    model = zoo.build("gpt2")
    assert run_param_wrappers_eagerly(model) == []
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_refused_goes_by_its_whole_path_and_a_remedy():
    model, refused = adapted(), "left as it was: base_model.model.layers.0.experts.up: PEFT adapts"
    with pytest.warns(UserWarning, match=refused) as seen:
        torch.compile(model, backend="falqon", options={"inner": "eager"})(torch.randn(5, 32))
    texts = [str(item.message) for item in seen if "left as it was" in str(item.message)]
    assert all("base_model.model.layers." in text for text in texts)
    assert any("run_param_wrappers_eagerly(model)" in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("prepared", [False, True])
def test_experts_as_peft_makes_them_train_like_those_run_eagerly(
    name, prepared, graphs, one_thread
):
    """Dynamo compiles PEFT's parametrization until its limit and then leaves it alone: no layer
    that is merged gets lost by that, and no step.
    """
    batch = zoo.batch(name)
    eager = zoo.adapt(zoo.build(name))
    plain = zoo.adapt(zoo.build(name))
    for module in plain.modules():
        vars(module).pop("forward", None)  # as PEFT makes them
    for model in (eager, plain):
        fill_b(model, 0.05)
        if prepared:
            falqon_fx.prepare(model, progress=False)
    once = train(eager, batch, STEPS)
    few = len(graphs)
    torch._dynamo.reset()
    again = train(plain, batch, STEPS)
    assert len(graphs) > 2 * few
    assert torch.equal(torch.stack(again), torch.stack(once))
    assert again[-1] < again[0]
    for ours, theirs in zip(trained(plain), trained(eager), strict=True):
        assert torch.equal(ours, theirs)
    layers = merged_layers(plain)
    assert len(falqon_fx.adapters(plain)) == len(layers)
    for layer, start in zip(layers, merged_layers(zoo.adapt(zoo.build(name))), strict=True):
        for part in ("lora_A", "lora_B"):
            moved, first = (getattr(m, part)["default"].weight for m in (layer, start))
            assert not torch.equal(moved, first)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
