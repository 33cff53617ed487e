"""Training loops as people write them: precision, shapes, frozen and shared parameters, copies.

Each gives the numbers of the same ops run eagerly, or of exact arithmetic within the bounds of
tests/tolerances.py. The base never changes; with update="rows" each step of B is written once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from tests.either_update import UPDATES, each_update, of_update
from tests.emulation import emulate
from tests.models import LoraLinear, Relu, compiled, fill_b, tiny_llama, tiny_mlp, train
from tests.parameters import each_value
from tests.sites import randn
from tests.training import adam, all_equal, pickled, steps, trained, weights


def base_bytes(model: nn.Module) -> list[Tensor]:
    """The FP8 weights of every site: constant with update="adapter"."""
    states = falqon_fx.adapters(model).values()
    return [s.weight.view(torch.uint8).clone() for s in states]


# -- shapes ----------------------------------------------------------------------------------------


def test_inductor_trains_as_eager_where_no_size_is_a_multiple_of_16():
    """Out, in, rank and tokens. A transposed input, then one that changes its shape."""
    torch.manual_seed(1)
    model = Relu(33, 47, rank=3)
    result = []
    for inner in ("eager", "inductor"):
        own = copy.deepcopy(model)
        losses = train(compiled(own, inner), adam(own), randn(33, 7).t(), steps=4)
        result.append((losses, weights(own)))
    assert result[0][0] == result[1][0]
    assert all_equal(result[0][1], result[1][1])


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_strided_inputs_have_the_gradients_of_contiguous_ones(inner):
    model = Relu()
    fill_b(model)
    whole = torch.randn(4, 32, 6)
    inputs = [
        whole.transpose(1, 2),
        whole[::2].transpose(1, 2),
        whole[:, :, :1].expand(4, 32, 6).mT,
    ]
    for x in inputs:
        grads = []
        for own in (x.detach(), x.contiguous()):
            own = own.requires_grad_() if own.is_leaf else own
            model.zero_grad()
            compiled(model, inner)(own).square().sum().backward()
            grads.append([own.grad, *(p.grad.clone() for p in trained(model))])
        assert not x.is_contiguous()
        assert all_equal(*grads)


@each_value(inner=["eager", "aot_eager"], granularity=["row", "tensor"], update=["adapter", "rows"])
def test_no_tokens_at_all_give_zero_gradients_and_write_nothing(inner, granularity, update):
    model = of_update(Relu(), update)
    fill_b(model)
    call = compiled(model, inner, granularity=granularity, **UPDATES[update])
    for shape in ((0, 32), (2, 0, 32)):
        x = torch.empty(shape, requires_grad=True)
        y = call(x)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape
    assert all(p.grad is not None and not p.grad.any() for p in trained(model))
    if update == "rows":
        assert steps(model) == [0, 0]


@each_value(dynamic=[None, True], update=["adapter", "rows"])
def test_batches_and_lengths_that_change_train_as_in_eager(dynamic, update):
    model = of_update(Relu(), update)
    xs = [torch.randn(*shape, 32) for shape in ((4, 9), (3, 7), (1, 1), (2, 5), (4, 9))]
    result = []
    for inner in ("eager", "aot_eager"):
        own = copy.deepcopy(model)
        options = {"inner": inner, **UPDATES[update]}
        call = torch.compile(own, backend="falqon", options=options, dynamic=dynamic)
        optimizer = adam(own)
        losses = [train(call, optimizer, x, steps=1)[0] for x in xs]
        if update == "rows":
            assert steps(own) == [len(xs) - 1] * 2
        result.append((losses, weights(own)))
    assert result[0][0] == result[1][0]
    assert all_equal(result[0][1], result[1][1])


def test_fullgraph_trains_a_llama():
    model = tiny_llama(layers=1, target_modules=["q_proj", "down_proj"])
    ids = torch.randint(0, 64, (2, 9))
    call = torch.compile(model, backend="falqon", options={"inner": "aot_eager"}, fullgraph=True)
    optimizer, losses, bases = adam(model), [], []
    before = weights(model)
    for _ in range(3):
        loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bases.append(base_bytes(model))
    assert losses[-1] < losses[0]
    assert len(bases[0]) == 2
    assert all_equal(bases[0], bases[-1])
    assert not any(map(torch.equal, before, weights(model)))


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_frozen_adapter_counts_and_gets_no_gradient(inner):
    model, x = Relu(), torch.randn(5, 32)
    fill_b(model, 0.1)
    expected = compiled(copy.deepcopy(model), inner)(x)
    model.up.requires_grad_(False)
    found = compiled(model, inner)(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert model.up.lora_B.weight.grad is None
    assert model.down.lora_B.weight.grad.any()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_frozen_b_whose_a_is_trained_trains_a_alone(inner):
    """As in MiCA. The numbers of A's gradient are those of a site that trains both."""
    model, x = Relu(), torch.randn(5, 32)
    fill_b(model, 0.1)
    both = copy.deepcopy(model)
    compiled(both, inner)(x).square().sum().backward()
    model.up.lora_B.requires_grad_(False)
    compiled(model, inner)(x).square().sum().backward()
    assert len(falqon_fx.adapters(model)) == 2
    assert model.up.lora_B.weight.grad is None
    assert model.up.lora_A.weight.grad.any()
    assert torch.equal(model.up.lora_A.weight.grad, both.up.lora_A.weight.grad)
    assert torch.equal(model.down.lora_A.weight.grad, both.down.lora_A.weight.grad)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_with_rows_a_frozen_b_whose_a_is_trained_runs_as_it_was(inner):
    """What is trained there is A, which a written weight freezes."""
    model, x = Relu(), torch.randn(5, 32)
    fill_b(model, 0.1)
    model.up.lora_B.requires_grad_(False)
    model.down.lora_A.requires_grad_(False)
    call = compiled(model, inner, exclude="down", **UPDATES["rows"])
    call(x).sum().backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    expected(x).sum().backward()
    assert torch.equal(model.up.lora_A.weight.grad, expected.up.lora_A.weight.grad)
    assert model.up.lora_B.weight.grad is None


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@each_update
def test_a_site_that_a_step_does_not_use_is_left_alone(inner, update):
    """It has no gradient, so the optimizer leaves it; the next step uses it again."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = LoraLinear(32, 32), LoraLinear(32, 32)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            return self.second(self.first(x)) if both else self.first(x)

    model, x = of_update(Skip(), update), torch.randn(5, 32)
    call, optimizer = compiled(model, inner, **UPDATES[update]), adam(model)
    fill_b(model, 0.1)
    counts = []
    for both in (True, False, False, True, True):
        call(x, both).square().mean().backward()
        counts.append(steps(model) if update == "rows" else base_bytes(model))
        assert all((p.grad is not None) == both for p in trained(model.second))
        assert all(p.grad is not None for p in trained(model.first))
        optimizer.step()
        optimizer.zero_grad()
    if update == "rows":
        assert counts == [[0, 0], [1, 0], [2, 0], [3, 1], [4, 2]]
    else:
        assert all(all_equal(counts[0], count) for count in counts)


def test_two_adapters_on_one_tied_base_weight_train_as_on_two():
    """And an embedding that shares it stays as it is."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 32).requires_grad_(False)
            self.up, self.head = LoraLinear(32, 32), LoraLinear(32, 32)
            self.up.base_layer.weight = self.head.base_layer.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.up(self.embed(ids))))

    tied, ids = Tied(), torch.randint(0, 32, (2, 5))
    untied = copy.deepcopy(tied)
    for layer in (untied.up, untied.head):
        layer.base_layer.weight = nn.Parameter(tied.embed.weight.clone(), requires_grad=False)
    weight, result = tied.embed.weight.clone(), []
    for model in (tied, untied):
        call, optimizer = compiled(model, "aot_eager"), adam(model)
        for _ in range(4):
            loss = call(ids).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        result.append((loss.item(), trained(model)))
    assert result[0][0] == result[1][0]
    assert all_equal(result[0][1], result[1][1])
    assert torch.equal(tied.embed.weight, weight)
    assert tied.up.base_layer.weight is tied.embed.weight
    assert falqon_fx.adapters(tied).keys() == {"up", "head"}


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@each_update
def test_a_copy_of_a_model_compiled_in_place_trains_apart(
    copied: Callable[[nn.Module], nn.Module], prepared, update
):
    """And from where the original was. With update="rows" a prepared copy goes on with W' as it is;
    without prepare, W' is merged anew.
    """
    model, x = of_update(tiny_mlp(), update), torch.randn(5, 32)
    fill_b(model, 0.1)
    options = {"inner": "eager", **UPDATES[update]}
    if prepared:
        falqon_fx.prepare(model, FalqonConfig(**UPDATES[update]), progress=False)
    model.compile(backend="falqon", options=options)
    train(model, adam(model), x, steps=3)
    twin = copied(model)
    kept = weights(model)
    twin.compile(backend="falqon", options=options)
    found = train(twin, adam(twin), x, steps=3)
    assert all_equal(weights(model), kept)
    if update == "rows" and not prepared:
        falqon_fx.restore(model)
    assert train(model, adam(model), x, steps=3) == found
    assert all_equal(weights(model), weights(twin))


def test_a_pickled_wrapper_compiles_again():
    model, x = Relu(), torch.randn(5, 32)
    fill_b(model, 0.1)
    call = compiled(model)
    expected = call(x)
    twin = pickled(call)
    assert torch.equal(twin(x), expected)
    assert len(falqon_fx.adapters(twin)) == 2


# -- compilers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"triton.cudagraphs": True}, {"mode": "reduce-overhead"}], ids=["option", "mode"]
)
def test_cuda_graphs_asked_for_on_cpu_change_nothing(options):
    """Inductor skips them on a CPU. (On a GPU nothing was run.)"""
    model, x = LoraLinear(32, 48), torch.randn(5, 32)
    result = []
    for asked in ({"inner": "eager"}, {"inner": "inductor", **options}):
        own = copy.deepcopy(model)
        call, optimizer = compiled(own, **asked), adam(own)
        losses = []
        for _ in range(4):
            loss = call(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        result.append((losses, weights(own)))
    assert result[0][0] == pytest.approx(result[1][0], rel=1e-6)
    assert all_equal(result[0][1], result[1][1])


@pytest.mark.parametrize(
    "prepared", [pytest.param(False, marks=pytest.mark.slow), True], ids=["unprepared", "prepared"]
)
def test_generate_with_the_whole_model_compiled_gives_the_tokens_of_the_emulation(prepared):
    """A KV cache that grows, in one graph with the sites."""
    model = tiny_llama(layers=1, target_modules=["q_proj", "down_proj"]).eval()
    fill_b(model, size=1.0)
    ids = torch.randint(0, 64, (1, 6))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    if prepared:
        falqon_fx.prepare(model, progress=False)
    inner = model.get_base_model()
    inner.compile(backend="falqon", options={"inner": "eager"})
    tokens = model.generate(input_ids=ids, **settings)
    states = falqon_fx.adapters(model)
    assert len(states) == 2
    twin = emulate(copy.deepcopy(model), states)
    assert torch.equal(tokens, twin.generate(input_ids=ids, **settings))


def test_a_model_moved_to_meta_after_compile_is_an_error_that_names_the_site():
    """Meta stands for any device that the values don't reach."""
    model, x = Relu(), torch.randn(5, 32)
    call = compiled(model)
    call(x)
    with pytest.raises(FalqonError, match=r"up: its base weight .* meta"):
        call.to("meta")(x.to("meta"))
