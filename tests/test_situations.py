"""The state of update="rows", looked up per call: shared graphs, copies, adapters, recompiles,
shared modules, autocast.

All run with inner="eager" or "aot_eager": which state a call gets is decided around the inner
compiler.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx.rows import state as merged
from falqon_fx.rows.update import STEP
from tests import models as plain
from tests.emulation import emulate
from tests.models import fill_b, lora_b, train


def with_frozen_a(make):
    """update="rows" needs a frozen A."""

    def made(*args, **kwargs):
        model = make(*args, **kwargs)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        return model

    return made


LoraLinear, Relu, Stack, tiny_llama, tiny_mlp = map(
    with_frozen_a,
    (plain.LoraLinear, plain.Relu, plain.Stack, plain.tiny_llama, plain.tiny_mlp),
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def created(monkeypatch):
    """The path of each site whose weight gets quantized, as it happens."""
    paths: list[str] = []
    create = merged.create

    def counting(path: str, *args: object) -> merged.MergedAdapter:
        paths.append(path)
        return create(path, *args)

    monkeypatch.setattr(merged, "create", counting)
    return paths


def options(inner: str = "eager", **others: object) -> dict[str, object]:
    """Rows of nearest rounding are the same whatever the site is called."""
    return {"update": "rows", "inner": inner, "rounding": "nearest", **others}


def compiled(model: nn.Module, inner: str = "eager", **others: object) -> nn.Module:
    return torch.compile(model, backend="falqon", options=options(inner, **others))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lora_b(model), lr=1e-2)


def alone(model: nn.Module, x: Tensor, steps: int, **others: object) -> list[Tensor]:
    """B after training a copy of a model with nothing else around it."""
    torch._dynamo.reset()
    own = copy.deepcopy(model)
    train(compiled(own, **others), adam(own), x, steps)
    torch._dynamo.reset()
    return [b.detach() for b in lora_b(own)]


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


# -- graphs shared ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_blocks_that_share_one_graph_train_as_the_whole_model_does(created, graphs, inner):
    model, x = Stack(blocks=3), torch.randn(2, 5, 32).requires_grad_()
    expected = alone(model, x, steps=4, inner=inner)
    created.clear()
    graphs.clear()
    for block in model.blocks:
        block.compile(backend="falqon", options=options(inner))
    train(model, adam(model), x, steps=4)
    assert len(graphs) == 1  # one graph of two sites serves three blocks
    assert len(created) == 6
    assert all_equal(lora_b(model), expected)
    states = falqon_fx.adapters(model)
    assert list(states) == [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]
    assert [int(state.counters[STEP]) for state in states.values()] == [3] * 6


def test_two_models_in_one_process_do_not_mix(created, graphs):
    models = [Relu(), Relu()]
    xs = [torch.randn(2, 5, 32), torch.randn(2, 5, 32)]
    expected = [alone(model, x, steps=4) for model, x in zip(models, xs)]
    created.clear()
    graphs.clear()
    pairs = [(compiled(model), adam(model), x) for model, x in zip(models, xs)]
    for _ in range(4):
        for model, optimizer, x in pairs:
            train(model, optimizer, x, steps=1)
    assert len(created) == 4
    assert all_equal(lora_b(models[0]), expected[0])
    assert all_equal(lora_b(models[1]), expected[1])


def test_a_deepcopy_of_a_compiled_model_has_a_state_of_its_own(created):
    model, x = Relu(), torch.randn(2, 5, 32)
    first = compiled(model)
    train(first, adam(model), x, steps=3)
    second = copy.deepcopy(first)
    created.clear()
    before = [b.detach().clone() for b in lora_b(model)]
    weights = [state.code.clone() for state in falqon_fx.adapters(first).values()]
    train(second, adam(second), x, steps=3)
    assert sorted(created) == ["down", "up"]
    assert not all_equal(lora_b(second), before)
    assert all_equal(lora_b(model), before)
    assert all_equal([state.code for state in falqon_fx.adapters(first).values()], weights)


def test_a_model_compiled_twice_has_one_state(created):
    model, x = Relu(), torch.randn(2, 5, 32)
    first, second = compiled(model), compiled(model)
    assert torch.equal(first(x), second(x))
    assert len(created) == 2


# -- recompiles ------------------------------------------------------------------------------------


def modes(model: nn.Module, call: nn.Module, x: Tensor) -> list[Tensor]:
    model.train()
    train_mode = call(x)
    model.eval()
    eval_mode = call(x)
    with torch.no_grad():
        no_grad = call(x)
    with torch.inference_mode():
        inference = call(x).clone()
    return [train_mode.detach(), eval_mode.detach(), no_grad, inference]


def test_recompiles_for_shapes_and_modes_quantize_each_weight_once(created, graphs):
    model = Relu()
    fill_b(model)
    backend_model = compiled(model)
    for shape in ((2, 5, 32), (3, 7, 32)):
        x = torch.randn(shape)
        results = modes(model, backend_model, x)
        assert all(torch.equal(r, results[0]) for r in results)
    assert len(graphs) == 6  # one shape, then any; with gradients, without, inference tensors
    assert sorted(created) == ["down", "up"]


def test_the_first_call_may_be_in_inference_mode(created):
    model, x = Relu(), torch.randn(2, 5, 32)
    expected = alone(model, x, steps=3)
    created.clear()
    backend_model = compiled(model)
    with torch.inference_mode():
        backend_model(x)
    train(backend_model, adam(model), x, steps=3)
    assert len(created) == 2
    assert all_equal(lora_b(model), expected)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_dynamic_shapes_need_one_graph(created, graphs, inner):
    model = Relu()
    fill_b(model)
    xs = [torch.randn(*shape, 32) for shape in ((6, 9), (4, 7), (2, 3))]

    def run(call: nn.Module, x: Tensor) -> list[Tensor]:
        model.zero_grad()
        result = call(x)
        result.square().mean().backward()
        return [result.detach(), *(b.grad for b in lora_b(model))]

    dynamic = torch.compile(model, backend="falqon", options=options(inner), dynamic=True)
    results = [run(dynamic, xs[0])]
    first = len(graphs)  # AOTAutograd has Dynamo start again once it sees that a float is fixed
    results += [run(dynamic, x) for x in xs[1:]]
    assert len(graphs) == first <= 2
    for x, result in zip(xs, results):
        torch._dynamo.reset()
        assert all_equal(result, run(compiled(model, inner), x))
    assert len(created) == 2


@pytest.mark.parametrize("dynamic", [None, True])
def test_another_scaling_compiles_anew_and_has_a_state_of_its_own(created, graphs, dynamic):
    """With dynamic=True Dynamo hands a float over as an input: a match pins it."""
    model, x = Relu(), torch.randn(2, 5, 32)
    fill_b(model)
    call = torch.compile(model, backend="falqon", options=options(), dynamic=dynamic)
    call(x)
    model.up.scaling = 3.0
    changed = call(x)
    assert [site.scaling for report in graphs for site in report.sites] == [2.0, 2.0, 3.0, 2.0]
    assert created == ["up", "down", "up"]
    torch._dynamo.reset()
    assert torch.equal(changed, compiled(copy.deepcopy(model))(x))


def test_a_float_outside_of_the_sites_stays_dynamic(graphs):
    class Scaled(plain.Relu):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    model, x = with_frozen_a(Scaled)(), torch.randn(2, 5, 32)
    model.factor = 0.5
    call = torch.compile(model, backend="falqon", options=options(), dynamic=True)
    half = call(x)
    for factor in (2.0, 4.0, 8.0):
        model.factor = factor
        assert torch.equal(call(x), half * (2 * factor))
    assert len(graphs) == 1


def test_a_graph_break_between_sites(created, graphs):
    class Broken(plain.Relu):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.up(x))
            torch._dynamo.graph_break()
            return self.down(hidden)

    whole, x = Relu(), torch.randn(2, 5, 32)
    expected = alone(whole, x, steps=4)
    broken = with_frozen_a(Broken)()
    broken.load_state_dict(whole.state_dict())
    created.clear()
    graphs.clear()
    train(compiled(broken), adam(broken), x, steps=4)
    assert [len(report.sites) for report in graphs] == [1, 1]
    assert len(created) == 2
    assert all_equal(lora_b(broken), expected)


def test_fullgraph(graphs):
    model = Stack()
    torch.compile(model, backend="falqon", options=options(), fullgraph=True)(torch.randn(2, 32))
    assert [len(report.sites) for report in graphs] == [4]


# -- adapters --------------------------------------------------------------------------------------


def test_set_adapter_switches_between_two_states(created):
    """Each adapter trains as if it were alone; coming back finds its state again."""
    model, x = tiny_mlp(), torch.randn(2, 5, 32)
    model.add_adapter("other", model.peft_config["default"])
    fill_b(model)
    call = compiled(model)

    def activate(model: nn.Module, name: str) -> None:
        model.set_adapter(name)  # which sets requires_grad, too
        with_frozen_a(lambda: model)()

    def run(name: str) -> Tensor:
        activate(model, name)
        result: Tensor = call(x)
        return result

    default, other = run("default"), run("other")
    assert not torch.equal(default, other)
    assert torch.equal(default, run("default"))
    assert torch.equal(other, run("other"))
    assert len(created) == 4
    for name in ("default", "other"):  # alone, with the same base weights
        alone = copy.deepcopy(model)
        activate(alone, name)
        torch._dynamo.reset()
        assert torch.equal(compiled(alone)(x), default if name == "default" else other)
    del created[4:]

    torch._dynamo.reset()
    with torch.no_grad():
        for name, b in model.named_parameters():
            if "lora_B.default" in name:
                b.add_(torch.randn_like(b))
    assert not torch.equal(run("default"), default)
    assert torch.equal(run("other"), other)
    assert len(created) == 4


def test_a_disabled_adapter_leaves_a_plain_linear(created):
    model, x = tiny_mlp(), torch.randn(2, 5, 32)
    fill_b(model)
    with model.disable_adapter(), pytest.warns(UserWarning, match="no LoRA layer"):
        assert torch.equal(compiled(model, frozen="leave")(x), model(x))
    assert not created


# -- parameters that change ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base_layer", "lora_A"])
def test_a_changed_w_or_a_rebuilds_the_state(created, name):
    model, x = Relu(), torch.randn(2, 5, 32)
    fill_b(model)
    call = compiled(model)
    call(x)
    with torch.no_grad():
        getattr(model.up, name).weight.mul_(2.0)
    changed = call(x)
    torch._dynamo.reset()
    assert torch.equal(changed, compiled(copy.deepcopy(model))(x))
    assert created[:3] == ["up", "down", "up"]


@pytest.mark.parametrize("name", ["base_layer", "lora_A"])
def test_a_w_or_a_changed_through_data_rebuilds_the_state(name):
    model, x = Relu(), torch.randn(2, 5, 32)
    fill_b(model)
    call = compiled(model)
    call(x)
    getattr(model.up, name).weight.data.mul_(2.0)
    changed = call(x)
    torch._dynamo.reset()
    assert torch.equal(changed, compiled(copy.deepcopy(model))(x))


def test_load_state_dict_gives_the_loaded_models_results():
    model, other, x = Relu(), Relu(), torch.randn(2, 5, 32)
    fill_b(other)
    call = compiled(model)
    train(call, adam(model), x, steps=2)
    model.load_state_dict(other.state_dict())
    loaded = call(x)
    torch._dynamo.reset()
    assert torch.equal(loaded, compiled(other)(x))


def test_weight_decay_on_b_is_a_change_like_any_other():
    model, x = Relu(), torch.randn(2, 5, 32)
    fill_b(model)
    call = compiled(model, topk="all", pending="hold")
    call(x)
    for b in lora_b(model):
        b.grad = torch.zeros_like(b)
    torch.optim.AdamW(lora_b(model), lr=0.1, weight_decay=0.5).step()
    call(x)
    for state in falqon_fx.adapters(model).values():
        assert torch.equal(state.applied, state.lora_b())
        assert state.counters[STEP] == 1


def test_a_dtype_cast_after_compile_starts_a_new_state(created):
    model, x = Relu(), torch.randn(2, 5, 32)
    fill_b(model)
    call = compiled(model)
    call(x)
    model.to(torch.bfloat16)
    half = call(x.bfloat16())
    torch._dynamo.reset()
    assert torch.equal(half, compiled(copy.deepcopy(model))(x.bfloat16()))


# -- modules used twice, special inputs ------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
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
    gradients = [part.lora_B.weight.grad for part in (apart.first, apart.second)]
    layer.lora_B.weight.grad = None
    torch._dynamo.reset()
    created.clear()
    graphs.clear()

    result = compiled(Twice(layer, layer), inner)(x)
    result.sum().backward()
    assert torch.equal(result, expected)
    assert torch.equal(layer.lora_B.weight.grad, gradients[0] + gradients[1])
    assert len(graphs[0].sites) == 2
    assert created == []  # found again: the same W, A and B as before


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
    assert all(b.grad is None or b.grad.dtype == b.dtype for b in lora_b(model))


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
    assert all_equal(lora_b(model), expected)


def test_generate_with_a_kv_cache_gives_the_tokens_of_the_emulation(graphs):
    model = tiny_llama(target_modules=["q_proj", "v_proj", "down_proj"]).eval()
    fill_b(model, size=1.0)
    ids = torch.randint(0, 64, (1, 6))
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    model.base_model.model.model.layers[0].compile(backend="falqon", options=options())
    model.base_model.model.model.layers[1].compile(backend="falqon", options=options())
    tokens = model.generate(input_ids=ids, **settings)
    assert all(len(report.sites) == 3 for report in graphs)
    states = falqon_fx.adapters(model)
    assert len(states) == 6
    twin = emulate(copy.deepcopy(model), states)
    torch._dynamo.reset()
    for layer in twin.base_model.model.model.layers:
        layer._compiled_call_impl = None
    assert torch.equal(tokens, twin.generate(input_ids=ids, **settings))
