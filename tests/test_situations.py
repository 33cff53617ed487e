"""What belongs to which call: shared graphs, copies, adapters, recompiles, shared modules, threads.

Most run with inner="eager" or "aot_eager": which base a call gets is decided around the inner
compiler.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import falqon_fx
from falqon_fx.rows import state as rows_state
from falqon_fx.site import base as base_module
from falqon_fx.site import record
from tests import tolerances as tol
from tests.emulation import emulate
from tests.models import (
    LoraLinear,
    Relu,
    Stack,
    fill_b,
    freeze_a,
    tiny_llama,
    tiny_mlp,
    train,
)
from tests.parameters import PREPARED_OR_NOT, each_value, slow
from tests.training import adam, all_equal

INNER = pytest.mark.parametrize("inner", ["eager", "aot_eager"])
PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
UPDATES = pytest.mark.parametrize("update", ["adapter", "rows"])


@pytest.fixture
def created(monkeypatch):
    """The path of each site whose weight is cast to FP8, as it happens."""
    paths: list[str] = []
    make, create = base_module.Bases._make, rows_state.create

    def making(self: Any, site: base_module.BaseParameter, spec: Any) -> Any:
        paths.append(site.path)
        return make(self, site, spec)

    def creating(path: str, *args: Any) -> rows_state.MergedAdapter:
        paths.append(path)
        return create(path, *args)

    monkeypatch.setattr(base_module.Bases, "_make", making)
    monkeypatch.setattr(rows_state, "create", creating)
    return paths


def options(inner: str = "eager", **others: Any) -> dict[str, Any]:
    """Rows of nearest rounding are the same whatever the site is called."""
    rows = {"rounding": "nearest"} if others.get("update") == "rows" else {}
    return {"inner": inner, **rows, **others}


def compiled(model: nn.Module, inner: str = "eager", **others: Any) -> Any:
    return torch.compile(model, backend="falqon", options=options(inner, **others))


def made(kind: type[nn.Module], update: str, **sizes: int) -> nn.Module:
    """A model, with A frozen where rows are written."""
    model = kind(**sizes)
    return freeze_a(model) if update == "rows" else model


def adapter(model: nn.Module) -> list[Tensor]:
    """A and B of every site."""
    return [p.detach() for name, p in model.named_parameters() if "lora_" in name]


def codes(model: nn.Module) -> list[Tensor]:
    """The FP8 bytes of every site."""
    return [state.weight.view(torch.uint8) for state in falqon_fx.adapters(model).values()]


def pointers(model: nn.Module) -> list[int]:
    """Where they lie."""
    return [code.data_ptr() for code in codes(model)]


def alone(model: nn.Module, x: Tensor, steps: int, **others: object) -> list[Tensor]:
    """A and B after training a copy of a model with nothing else around it."""
    torch._dynamo.reset()
    own = copy.deepcopy(model)
    train(compiled(own, **others), adam(own), x, steps)
    torch._dynamo.reset()
    return adapter(own)


# -- graphs shared ---------------------------------------------------------------------------------


@UPDATES
@INNER
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


@UPDATES
@PREPARED
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
    """One cast for all of them; another granularity or kind of scale is another."""
    model, x = Relu(), torch.randn(2, 5, 32)
    fill_b(model)
    others = [{}, {"grad_dtype": "e4m3"}, {"siblings": False}, {"dropout": "ignore"}]
    found = [compiled(model, **each)(x) for each in others]
    at = pointers(model)
    assert all_equal(found, [found[0]] * 4)
    assert created == ["up", "down"]
    compiled(model, scale="amax")(x)
    compiled(model, granularity="tensor")(x)
    assert len(created) == 6
    assert torch.equal(compiled(model)(x), found[0])
    assert len(created) == 6
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


@UPDATES
@pytest.mark.parametrize("dynamic", [None, True])
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


# -- parameters that change ------------------------------------------------------------------------


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2.0)


def through_data(weight: nn.Parameter) -> None:
    """No version counter sees it; on a CPU the contents are looked at."""
    weight.data.mul_(2.0)


def other_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2.0


CHANGES = pytest.mark.parametrize("change", [in_place, through_data, other_data])


@each_value(name=["base_layer", "lora_A", "lora_B"], change=[in_place, through_data, other_data])
def test_a_changed_parameter_is_seen(created, name, change):
    """W makes a new base, of that layer alone, in the place of the old one; A and B none."""
    model, x = Relu(), torch.randn(2, 5, 32)
    fill_b(model)
    call = compiled(model)
    first = call(x).detach()
    old = weakref.ref(falqon_fx.adapters(model)["up"].weight.untyped_storage())
    change(getattr(model.up, name).weight)
    changed = call(x).detach()
    assert created == ["up", "down", *(["up"] if name == "base_layer" else [])]
    gc.collect()
    assert (old() is None) == (name == "base_layer")
    torch._dynamo.reset()
    assert torch.equal(changed, compiled(copy.deepcopy(model))(x))
    assert not torch.equal(changed, first)


@CHANGES
@pytest.mark.parametrize("name", ["base_layer", "lora_A"])
def test_a_changed_w_or_a_rebuilds_the_weight_of_update_rows(name, change):
    """Both are in it."""
    model, x = made(Relu, "rows"), torch.randn(2, 5, 32)
    fill_b(model)
    call = compiled(model, update="rows")
    call(x)
    change(getattr(model.up, name).weight)
    changed = call(x)
    torch._dynamo.reset()
    assert torch.equal(changed, compiled(copy.deepcopy(model), update="rows")(x))


@PREPARED
def test_load_state_dict_gives_the_loaded_models_results(prepared):
    def one(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = tiny_mlp()
        fill_b(model, 0.1, seed)
        if prepared:
            falqon_fx.prepare(model, progress=False)
        return model

    model, other, x = one(0), one(1), torch.randn(2, 5, 32)
    call = compiled(model)
    train(call, adam(model), x, steps=2)
    model.load_state_dict(other.state_dict())
    loaded = call(x)
    torch._dynamo.reset()
    assert torch.equal(loaded, compiled(other)(x))


def test_a_dtype_cast_after_compile_casts_the_base_anew(created):
    model, x = Relu(), torch.randn(2, 5, 32)
    fill_b(model)
    call = compiled(model)
    call(x)
    model.to(torch.bfloat16)
    half = call(x.bfloat16())
    assert created == ["up", "down"] * 2
    torch._dynamo.reset()
    assert torch.equal(half, compiled(copy.deepcopy(model))(x.bfloat16()))


@pytest.fixture
def swapped() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


CONVERSIONS = {
    "to": lambda model: model.to(torch.bfloat16),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ),
}


@each_value(
    inner=["eager", "inductor"],
    prepared=PREPARED_OR_NOT,
    when=["before", "after"],
    convert=list(CONVERSIONS),
)
def test_parameters_that_are_swapped(swapped, convert, when, prepared, inner):
    """torch.__future__.set_swap_module_params_on_conversion asks that nothing holds a weak
    reference to a parameter.
    """
    model = tiny_mlp()
    fill_b(model, 0.1)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    plain, x = copy.deepcopy(model), torch.randn(2, 5, 32)
    call = compiled(model, inner)
    if when == "after":
        call(x).sum().backward()
        model.zero_grad()
    before = [code.clone() for code in codes(model)] if prepared else None
    for own in (model, plain):
        CONVERSIONS[convert](own)
    x = x.to(model.base_model.model[0].lora_A["default"].weight.dtype)
    found = call(x)
    found.float().sum().backward()
    torch._dynamo.reset()
    expected = compiled(plain, inner)(x)
    expected.float().sum().backward()
    assert torch.equal(found, expected)
    grads = [[p.grad for p in own.parameters() if p.requires_grad] for own in (model, plain)]
    assert all_equal(*grads)
    assert before is None or all_equal(codes(model), before)


# -- code that reads the weight of a prepared layer ------------------------------------------------


def tiny_t5(targets: list[str]) -> nn.Module:
    """One layer each; width 64, so that FP8 takes all its linear layers but the tied head."""
    config = transformers.T5Config(
        vocab_size=64,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )
    model = transformers.T5ForConditionalGeneration(config).to(torch.bfloat16)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))


@pytest.mark.parametrize("inner", ["aot_eager", slow("eager"), slow("inductor")])
@pytest.mark.parametrize("targets", [["q", "v"], slow(["q", "v", "wo"], id="wo adapted")])
def test_t5_asks_a_prepared_layer_for_the_dtype_of_its_weight(inner, targets, graphs):
    """So do mT5, LongT5, UMT5, Switch, Pix2Struct and UDOP. Prepared and unprepared are the same
    bit for bit: the same FP8 bytes, and the dtype that the weight had.
    """
    model, ids = tiny_t5(targets), torch.arange(12).view(2, 6)
    fill_b(model, 0.1)
    losses, grads = [], []
    for prepared in (False, True):
        own = copy.deepcopy(model)
        if prepared:
            report = falqon_fx.prepare(own, progress=False)
            assert sum(path.endswith(".wo") for path in report.prepared) == 2
            assert sum(path.endswith(".wo") for path in report.frozen) == 2 * (len(targets) == 2)
        torch._dynamo.reset()
        graphs.clear()
        loss = compiled(own, inner)(input_ids=ids, labels=ids).loss
        loss.backward()
        assert sum(len(graph.sites) for graph in graphs) == 18
        losses.append(loss.detach())
        grads.append([p.grad for p in own.parameters() if p.requires_grad])
    assert torch.equal(*losses)
    assert all_equal(*grads)
    assert all(g.abs().max() > 0 for g in grads[0])


class Reads(nn.Module):
    """A forward that multiplies with the values of its layers' weights, beside calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.call, self.direct = nn.Linear(64, 80), nn.Linear(64, 80, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.call.weight.float().norm(dim=1) * (self.call.weight.dtype == torch.float32)
        return self.call(x) + F.linear(x, self.direct.weight) + norm


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_values_of_a_prepared_weight_are_those_of_dq_w(inner):
    """What is called is multiplied in FP8; what reads ``weight`` gets dq(W)."""
    model = peft.get_peft_model(Reads(), peft.LoraConfig(r=4, target_modules=["call"]))
    fill_b(model, 0.1)
    report = falqon_fx.prepare(model, progress=False)
    assert len(report.prepared) == 2
    x = torch.randn(5, 64)
    plain = falqon_fx.restore(copy.deepcopy(model))
    inside = plain.get_base_model()
    exact, site = tol.Approx.exact, inside.call
    bound = tol.site_bounds(
        x,
        torch.randn(5, 80),
        tol.Parameters(
            site.base_layer.weight.detach(),
            site.lora_A["default"].weight.detach(),
            site.lora_B["default"].weight.detach(),
            site.scaling["default"],
            site.base_layer.bias.detach(),
        ),
    ).y
    called = tol.Approx(site.double()(x.double()).detach(), bound)
    direct = (exact(x) @ exact(inside.direct.weight.detach()).t()).rounded(torch.float32)
    norm = site.base_layer.weight.detach().double().norm(dim=1)
    norm = tol.Approx(norm, tol.gamma(64 + 2) * norm)
    wanted = ((called + direct).rounded(torch.float32) + norm).rounded(torch.float32)
    wanted.assert_holds(compiled(model, inner)(x).detach())


@INNER
def test_an_exported_prepared_model_goes_through_rewrite(inner):
    """`torch.export` lifts the bytes of prepared layers as it lifts parameters."""
    model, x = tiny_mlp(), torch.randn(5, 32)
    fill_b(model, 0.1)
    falqon_fx.prepare(model, progress=False)
    expected = compiled(copy.deepcopy(model), inner)(x)
    exported = torch.export.export(model.get_base_model(), (x,))
    result = falqon_fx.rewrite(exported.module(), [x])
    assert [site.path for site in result.report.sites] == ["0", "2"]
    assert torch.equal(result(x), expected)


# -- modules used twice, special inputs ------------------------------------------------------------


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


@UPDATES
def test_generate_with_a_kv_cache_gives_the_tokens_of_the_emulation(graphs, update):
    model = tiny_llama(target_modules=["q_proj", "v_proj", "down_proj"]).eval()
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
    assert len(states) == 6
    twin = emulate(copy.deepcopy(model), states)
    torch._dynamo.reset()
    for layer in twin.base_model.model.model.layers:
        layer._compiled_call_impl = None
    assert torch.equal(tokens, twin.generate(input_ids=ids, **settings))
