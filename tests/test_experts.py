"""Stacked experts that PEFT adapts by ParamWrapper, as code that compiles into one graph."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import accelerate
import peft
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, fx, nn

import falqon_fx
from falqon_fx.integrations.peft import (
    TracedParamWrapper,
    trace_param_wrappers,
    untrace_param_wrappers,
)
from falqon_fx.integrations.transformers import FalqonCallback
from tests import zoo
from tests.models import fill_b

_slow = pytest.mark.slow
CALLS = 12  # beyond Dynamo's limit of 8 compilations of one function


class Experts(nn.Module):
    """Stacked weights, as transformers keeps them, multiplied with all tokens."""

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


CONFIG: dict[str, Any] = {
    "target_modules": ["proj"],
    "target_parameters": ["experts.up", "experts.down"],
}


def adapted() -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(Blocks(), peft.LoraConfig(r=4, **CONFIG))
    fill_b(model, 0.05)
    return model


def counting(graphs: list[fx.GraphModule]) -> Callable[..., Any]:
    """A backend that compiles nothing."""

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    return backend


def check_one_graph(model: Any, batch: dict[str, Tensor]) -> None:
    """Over several calls: one graph for all, outputs and gradients as PEFT's bit for bit."""
    names, twin = list(model.state_dict()), copy.deepcopy(model)
    assert trace_param_wrappers(model)
    assert list(model.state_dict()) == names
    graphs: list[fx.GraphModule] = []
    call = torch.compile(model, backend=counting(graphs))
    for _ in range(CALLS):
        losses = []
        for run in (call, twin):
            output = run(**batch)
            loss = output.square().mean() if isinstance(output, Tensor) else output.loss
            loss.backward()
            losses.append(loss)
        assert torch.equal(*losses)
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), name
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    assert len(graphs) == 1


def test_one_graph_gives_what_peft_gives():
    check_one_graph(adapted(), {"x": torch.randn(5, 32)})


def test_several_active_adapters_are_one_graph():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, **CONFIG))
    model.base_model.set_adapter(["default", "other"])
    fill_b(model, 0.05)
    check_one_graph(model, {"x": torch.randn(5, 32)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=_slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=_slow) for n in ("qwen3_moe", "mixtral", "glm4_moe")]
)
def test_a_family_is_one_graph(name, dtype):
    """Routing changes from token to token, and the router of Mixtral is adapted, too."""
    model = peft_experts(name, dtype)
    check_one_graph(model, zoo.batch(name))


def peft_experts(name: str, dtype: torch.dtype) -> Any:
    model: Any = zoo.build(name).to(dtype)
    model.set_experts_implementation("grouped_mm")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = peft.get_peft_model(model, config)
    fill_b(model, 0.05)
    return model


def test_autocast_leaves_the_sum_in_the_dtype_of_the_weight():
    model, x = adapted(), torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        trace_param_wrappers(model)
        assert torch.equal(model(x), expected)
        assert torch.equal(torch.compile(model, backend="eager")(x), expected)


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
def test_a_copy_runs_its_own_weights(copied):
    model, x = adapted(), torch.randn(5, 32)
    trace_param_wrappers(model)
    twin = copied(model)
    expected = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(model(x), expected)


def test_what_is_outside_of_a_call_sees_the_parameters():
    model, x = adapted(), torch.randn(5, 32)
    experts = model.base_model.model.layers[0].experts.get_base_layer()
    expected, weight = model(x), experts.up
    trace_param_wrappers(model)
    assert trace_param_wrappers(model)  # again
    assert experts.up is weight
    assert isinstance(experts, Experts)
    with model.disable_adapter():
        bare = model(x)
    assert not torch.equal(bare, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)  # PEFT's sum, then its product: two roundings
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(x), expected)


def test_it_can_be_taken_back():
    model, x = adapted(), torch.randn(5, 32)
    before = {path: type(module) for path, module in model.named_modules()}
    fields = {path: set(vars(module)) for path, module in model.named_modules()}
    expected = model(x)
    trace_param_wrappers(model)
    untrace_param_wrappers(model)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert {path: set(vars(module)) for path, module in model.named_modules()} == fields
    assert torch.equal(model(x), expected)


def test_the_callback_of_a_trainer_makes_the_call():
    model: Any = adapted()
    accelerate.Accelerator(cpu=True)  # as a trainer does first
    args: Any = SimpleNamespace(torch_compile=False, world_size=1)
    state: Any = None
    FalqonCallback().on_init_end(args, state, state, model=model)
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert {type(m) for m in wrappers} == {TracedParamWrapper}


def test_an_error_inside_leaves_the_parameters_as_they_were():
    model = adapted()
    trace_param_wrappers(model)
    experts = model.base_model.model.layers[0].experts.get_base_layer()
    with pytest.raises(RuntimeError, match="size"):
        model.base_model.model.layers[0].experts(torch.randn(5, 31))
    assert isinstance(experts.up, nn.Parameter)


def test_a_model_without_param_wrappers_stays_as_it_is():
    model = zoo.build("gpt2")
    before = [type(module) for module in model.modules()]
    assert trace_param_wrappers(model) == []
    assert [type(module) for module in model.modules()] == before


def test_what_is_refused_goes_by_its_whole_path_and_a_remedy():
    model, refused = adapted(), "left as it was: base_model.model.layers.0.experts.up: PEFT adapts"
    with pytest.warns(UserWarning, match=refused) as seen:
        torch.compile(model, backend="falqon", options={"inner": "eager"})(torch.randn(5, 32))
    texts = [str(item.message) for item in seen if "left as it was" in str(item.message)]
    assert all("base_model.model.layers." in text for text in texts)
    assert any("trace_param_wrappers(model)" in text for text in texts)


def test_layers_beside_experts_are_merged(graphs):
    model, x = adapted(), torch.randn(5, 32)
    trace_param_wrappers(model)
    call = torch.compile(model, backend="falqon", options={"inner": "eager"})
    for _ in range(CALLS):
        call(x).sum().backward()
    assert len(graphs) == 1
    assert len(falqon_fx.adapters(model)) == 2
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert all(m.lora_A["default"].weight.grad is not None for m in wrappers)
