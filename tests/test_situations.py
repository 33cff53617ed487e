"""What belongs to which call: shared graphs, copies, adapters, recompiles, shared modules, threads.

Most run with inner="eager" or "aot_eager": which base a call gets is decided around the inner
compiler.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx.site import base as base_module
from falqon_fx.site import record
from tests.emulation import emulate
from tests.models import (
    Relu,
    Stack,
    fill_b,
    freeze_a,
    made,
    tiny_mlp,
    train,
)
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.situations import INNER, UPDATES, adapter, alone, codes, compiled, options
from tests.training import adam, all_equal


def pointers(model: nn.Module) -> list[int]:
    """Where they lie."""
    return [code.data_ptr() for code in codes(model)]


# -- graphs shared ---------------------------------------------------------------------------------


@each_value(update=["adapter", "rows"], inner=["eager", "aot_eager"])
def test_blocks_that_share_one_graph_train_as_the_whole_model_does(created, graphs, inner, update):
    model, x = made(Stack, update, blocks=3), torch.randn(2, 5, 32).requires_grad_()
    expected = alone(model, x, steps=4, inner=inner, update=update)
    created.clear()
    graphs.clear()
    for block in model.blocks:
        block.compile(backend="falqon", options=options(inner, update=update))
    train(model, adam(model), x, steps=4)
    assert len(graphs) == 1  # one graph of two sites serves three blocks
    assert len(created) == 6
    assert all_equal(adapter(model), expected)
    states = falqon_fx.adapters(model)
    assert list(states) == [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]
    for path, state in states.items():
        layer = model.get_submodule(path)
        if update == "rows":
            assert int(state.counters[record.STEP]) == 3
        else:
            ((a, b, _),) = state.adapters
            assert (a is layer.lora_A.weight, b is layer.lora_B.weight) == (True, True)


@UPDATES
def test_two_models_in_one_process_do_not_mix(created, graphs, update):
    models = [made(Relu, update), made(Relu, update)]
    xs = [torch.randn(2, 5, 32), torch.randn(2, 5, 32)]
    expected = [alone(model, x, steps=4, update=update) for model, x in zip(models, xs)]
    created.clear()
    graphs.clear()
    pairs = [(compiled(model, update=update), adam(model), x) for model, x in zip(models, xs)]
    for _ in range(4):
        for model, optimizer, x in pairs:
            train(model, optimizer, x, steps=1)
    assert len(created) == 4
    assert all_equal(adapter(models[0]), expected[0])
    assert all_equal(adapter(models[1]), expected[1])


@each_value(update=["adapter", "rows"], prepared=PREPARED_OR_NOT)
def test_a_deepcopy_of_a_compiled_model_has_fp8_weights_of_its_own(update, prepared):
    model, x = tiny_mlp(), torch.randn(2, 5, 32)
    config = falqon_fx.FalqonConfig(**options(update=update))
    if update == "rows":
        freeze_a(model)
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    first = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    train(first, adam(model), x, steps=3)
    second = copy.deepcopy(first)
    before, bytes_before = [p.clone() for p in adapter(model)], [c.clone() for c in codes(first)]
    train(second, adam(second), x, steps=3)
    assert not all_equal(adapter(second), before)
    assert all_equal(adapter(model), before)
    assert all_equal(codes(first), bytes_before)
    assert set(pointers(first)).isdisjoint(pointers(second))
    assert all_equal(codes(second), bytes_before) == (update == "adapter")


@UPDATES
def test_a_model_compiled_twice_has_one_fp8_weight(created, update):
    model, x = made(Relu, update), torch.randn(2, 5, 32)
    first, second = compiled(model, update=update), compiled(model, update=update)
    assert torch.equal(first(x), second(x))
    assert len(created) == 2


def test_options_that_leave_the_base_alone_share_it(created):
    """One cast for all of them; another granularity, kind of scale or dtype is another."""
    model, x = Relu(), torch.randn(2, 5, 32)
    fill_b(model)
    others = [{}, {"grad_dtype": "e4m3"}, {"siblings": False}, {"dropout": "ignore"}]
    found = [compiled(model, **each)(x) for each in others]
    at = pointers(model)
    assert all_equal(found, [found[0]] * 4)
    assert created == ["up", "down"]
    compiled(model, scale="amax")(x)
    compiled(model, granularity="tensor")(x)
    compiled(model, base_dtype="int8")(x)
    assert len(created) == 8
    assert torch.equal(compiled(model)(x), found[0])
    assert len(created) == 8
    assert at[0] in {
        base.code.data_ptr() for base in base_module.bases.of(model.up.base_layer.weight)
    }


def test_adapters_of_several_models_on_one_base_weight_share_its_fp8_form(created):
    """As two policies on one reference model."""
    first, x = Relu(), torch.randn(2, 5, 32)
    second = Relu()
    for name in ("up", "down"):
        second.get_submodule(name).base_layer = first.get_submodule(name).base_layer
    fill_b(first)
    fill_b(second, seed=1)
    results = [compiled(model)(x) for model in (first, second)]
    assert not torch.equal(*results)
    assert len(created) == 2
    assert pointers(first) == pointers(second)


@each_value(prepared=PREPARED_OR_NOT, inner=["eager", "aot_eager"])
def test_threads_share_one_base_and_compute_what_one_does(created, prepared, inner):
    """They meet at the first call, too: it makes the base."""
    model = tiny_mlp()
    fill_b(model, 0.1)
    xs = [torch.randn(4, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [compiled(copy.deepcopy(model), inner)(x).detach() for x in xs]
    created.clear()
    torch._dynamo.reset()
    if prepared:
        falqon_fx.prepare(model, progress=False)
    call, barrier = compiled(model, inner), threading.Barrier(4)
    found: list[list[Tensor]] = [[] for _ in xs]
    seen: list[list[int]] = []

    def work(i: int) -> None:
        barrier.wait()
        for _ in range(5):
            found[i].append(call(xs[i]).detach())
            seen.append(pointers(model))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, wanted in zip(found, expected, strict=True):
        assert len(results) == 5
        assert all_equal(results, [wanted] * 5)
    assert len(created) == (0 if prepared else 2)
    assert all(at == seen[0] for at in seen)


@each_value(prepared=PREPARED_OR_NOT, inner=["eager", "aot_eager", "inductor"])
def test_nothing_outlives_its_model(prepared, inner):
    """Once Dynamo has forgotten it: neither W nor its FP8 form nor an adapter."""
    model, x = tiny_mlp(), torch.randn(2, 5, 32)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    call = compiled(model, inner)
    train(call, adam(model), x, steps=2)
    tensors = [*model.parameters(), *codes(model)]
    memory = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    # Of two sites: A, B, bias and W, or what `prepare` makes of it; and the bytes once more.
    assert len(memory) == 2 * (3 + (3 if prepared else 1)) + 2
    assert all(ref() is not None for ref in memory)
    del model, call, tensors
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in memory] == [None] * len(memory)


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


@UPDATES
def test_recompiles_for_shapes_and_modes_cast_each_weight_once(created, graphs, update):
    model = made(Relu, update)
    fill_b(model)
    backend_model = compiled(model, update=update)
    for shape in ((2, 5, 32), (3, 7, 32)):
        x = torch.randn(shape)
        results = modes(model, backend_model, x)
        assert all(torch.equal(r, results[0]) for r in results)
    assert len(graphs) == 6  # one shape, then any; with gradients, without, inference tensors
    assert sorted(created) == ["down", "up"]


@UPDATES
def test_the_first_call_may_be_in_inference_mode(created, update):
    model, x = made(Relu, update), torch.randn(2, 5, 32)
    expected = alone(model, x, steps=3, update=update)
    created.clear()
    backend_model = compiled(model, update=update)
    with torch.inference_mode():
        backend_model(x)
    train(backend_model, adam(model), x, steps=3)
    assert len(created) == 2
    assert all_equal(adapter(model), expected)


@INNER
def test_dynamic_shapes_need_one_graph(created, graphs, inner):
    model = Relu()
    fill_b(model)
    xs = [torch.randn(*shape, 32) for shape in ((6, 9), (4, 7), (2, 3))]

    def run(call: nn.Module, x: Tensor) -> list[Tensor]:
        model.zero_grad()
        result = call(x)
        result.square().mean().backward()
        return [result.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    dynamic = torch.compile(model, backend="falqon", options=options(inner), dynamic=True)
    results = [run(dynamic, xs[0])]
    first = len(graphs)  # AOTAutograd has Dynamo start again once it sees that a float is fixed
    results += [run(dynamic, x) for x in xs[1:]]
    assert len(graphs) == first <= 2
    for x, result in zip(xs, results):
        torch._dynamo.reset()
        assert all_equal(result, run(compiled(model, inner), x))
    assert len(created) == 2


@each_value(dynamic=[None, True], update=["adapter", "rows"])
def test_another_scaling_compiles_anew(created, graphs, dynamic, update):
    """With dynamic=True Dynamo hands a float over as an input: a match pins it. The base stays;
    with update="rows" the scaling is in the FP8 weight, and another makes another.
    """
    model, x = made(Relu, update), torch.randn(2, 5, 32)
    fill_b(model)
    call = torch.compile(model, backend="falqon", options=options(update=update), dynamic=dynamic)
    call(x)
    model.up.scaling = 3.0
    changed = call(x)
    assert [site.scaling for report in graphs for site in report.sites] == [2.0, 2.0, 3.0, 2.0]
    assert created == (["up", "down"] if update == "adapter" else ["up", "down", "up"])
    torch._dynamo.reset()
    assert torch.equal(changed, compiled(copy.deepcopy(model), update=update)(x))


def test_a_float_outside_of_the_sites_stays_dynamic(graphs):
    class Scaled(Relu):
        factor: float

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    model, x = Scaled(), torch.randn(2, 5, 32)
    model.factor = 0.5
    call = torch.compile(model, backend="falqon", options=options(), dynamic=True)
    half = call(x)
    for factor in (2.0, 4.0, 8.0):
        model.factor = factor
        assert torch.equal(call(x), half * (2 * factor))
    assert len(graphs) == 1


@UPDATES
def test_a_graph_break_between_sites(created, graphs, update):
    class Broken(Relu):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.up(x))
            torch._dynamo.graph_break()
            return self.down(hidden)

    whole, x = made(Relu, update), torch.randn(2, 5, 32)
    expected = alone(whole, x, steps=4, update=update)
    broken = made(Broken, update)
    broken.load_state_dict(whole.state_dict())
    created.clear()
    graphs.clear()
    train(compiled(broken, update=update), adam(broken), x, steps=4)
    assert [len(report.sites) for report in graphs] == [1, 1]
    assert len(created) == 2
    assert all_equal(adapter(broken), expected)


def test_fullgraph(graphs):
    model = Stack()
    torch.compile(model, backend="falqon", options=options(), fullgraph=True)(torch.randn(2, 32))
    assert [len(report.sites) for report in graphs] == [4]


# -- adapters --------------------------------------------------------------------------------------


@UPDATES
def test_set_adapter_switches_between_adapters(created, update):
    """Each adapter computes as if it were alone, on one base; with update="rows" each has an FP8
    weight of its own, and coming back finds it again.
    """
    model, x = tiny_mlp(), torch.randn(2, 5, 32)
    model.add_adapter("other", model.peft_config["default"])
    fill_b(model)
    freeze_a(model)
    call = compiled(model, update=update)

    def run(name: str) -> Tensor:
        model.set_adapter(name)
        if update == "rows":
            freeze_a(model)
        result: Tensor = call(x)
        return result

    default, other = run("default"), run("other")
    assert not torch.equal(default, other)
    assert torch.equal(default, run("default"))
    assert torch.equal(other, run("other"))
    casts = 2 if update == "adapter" else 4
    assert len(created) == casts
    for name in ("default", "other"):  # alone, with the same base weights
        alone = copy.deepcopy(model)
        alone.set_adapter(name)
        if update == "rows":
            freeze_a(alone)
        torch._dynamo.reset()
        found = compiled(alone, update=update)(x)
        assert torch.equal(found, default if name == "default" else other)
    del created[casts:]

    torch._dynamo.reset()
    with torch.no_grad():
        for name, b in model.named_parameters():
            if "lora_B.default" in name:
                b.add_(torch.randn_like(b))
    assert not torch.equal(run("default"), default)
    assert torch.equal(run("other"), other)
    assert len(created) == casts


@UPDATES
def test_a_disabled_adapter_leaves_the_base_in_fp8(created, update):
    """A layer under an adapter is a site with it or without it, however small: the reference
    model's numbers do not depend on what runs beside it.
    """
    model, x = tiny_mlp(), torch.randn(2, 5, 32)
    fill_b(model)
    with model.disable_adapter():
        found = compiled(model, update=update)(x)
    assert len(created) == 2
    twin = emulate(copy.deepcopy(model), falqon_fx.adapters(compiled_once(model, x)))
    with twin.disable_adapter():
        assert torch.equal(found, twin(x))


def compiled_once(model: nn.Module, x: Tensor) -> nn.Module:
    """The model after a call with its adapters, so that `falqon_fx.adapters` knows them."""
    compiled(model)(x)
    return model
