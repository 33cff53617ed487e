"""Training loops as people write them: precision, shapes, frozen and shared parameters, copies.

Each gives the numbers of the same ops run eagerly, or of exact arithmetic within the bounds of
tests/tolerances.py. The base never changes; with update="rows" each step of B is written once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from tests import tolerances as tol
from tests.emulation import emulate
from tests.models import LoraLinear, Relu, fill_b, lora_b, tiny_llama, tiny_mlp, train
from tests.parameters import each_value
from tests.sites import randn
from tests.training import adam, all_equal, pickled, steps, trained, weights


def compiled(model: nn.Module, inner: str = "eager", **options: Any) -> Any:
    return torch.compile(model, backend="falqon", options={"inner": inner, **options})


# What a test says of training, for both ways in which steps reach W'.
UPDATES = {"adapter": {}, "rows": {"update": "rows", "rounding": "nearest"}}
each_update = pytest.mark.parametrize("update", UPDATES)


def of_update(model: nn.Module, update: str) -> nn.Module:
    """A model as ``update`` takes it: "rows" wants A frozen."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name and update == "rows":
            parameter.requires_grad_(False)
    return model


def base_bytes(model: nn.Module) -> list[Tensor]:
    """The FP8 weights of every site: constant with update="adapter"."""
    states = falqon_fx.adapters(model).values()
    return [s.weight.view(torch.uint8).clone() for s in states]


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_exact_arithmetic_within_the_casts(dtype):
    """Forward and backward of a site under autocast, its parameters and input in float32."""
    model, x = LoraLinear(32, 48, bias=True), randn(6, 32).requires_grad_()
    fill_b(model, 0.1)
    with torch.autocast("cpu", dtype):
        y = compiled(model, "aot_eager")(x)
        original = model(x.detach())
    assert y.dtype == original.dtype
    grad = randn(6, 48, seed=1).to(y.dtype)
    y.backward(grad)

    base, a, b = (m.weight.detach() for m in (model.base_layer, model.lora_A, model.lora_B))
    bias = model.base_layer.bias.detach()
    bounds = tol.site_bounds(x.detach(), grad, tol.Parameters(base, a, b, model.scaling, bias))
    merged = base.double() + model.scaling * b.double() @ a.double()
    wide_x, wide_grad = x.detach().double(), grad.double()
    tol.assert_within(y.detach(), wide_x @ merged.t() + bias.double(), bounds.y)
    tol.assert_within(x.grad, wide_grad @ merged, bounds.grad_x)
    expected = model.scaling * wide_grad.t() @ (wide_x @ a.double().t())
    tol.assert_within(model.lora_B.weight.grad, expected, bounds.grad_b)
    expected = model.scaling * (wide_grad @ b.double()).t() @ wide_x
    tol.assert_within(model.lora_A.weight.grad, expected, bounds.grad_a)


def test_a_wider_cast_behind_a_site_sees_the_rounded_sum():
    """As in the original: logits of a bfloat16 head that are cast to float32 for the loss."""

    class Head(nn.Module):
        def __init__(self, wide: bool) -> None:
            super().__init__()
            self.base, self.a = (
                nn.Linear(32, 48).requires_grad_(False),
                nn.Linear(32, 4, bias=False),
            )
            self.b, self.wide = nn.Linear(4, 48, bias=False), wide

        def forward(self, x: Tensor) -> Tensor:
            total = self.base(x) + self.b(self.a(x)) * 2.0
            return total.float() if self.wide else total

    head, x = Head(wide=True).bfloat16(), torch.randn(5, 32).bfloat16()
    wide = compiled(head)(x)
    head.wide = False
    assert wide.dtype == torch.float32
    assert torch.equal(wide, compiled(head)(x).float())
    assert len(falqon_fx.adapters(head)) == 1


@pytest.mark.parametrize(
    ("dtype", "compiler"),
    [
        (torch.bfloat16, "aot_eager"),
        (torch.float16, "aot_eager"),
        (torch.bfloat16, "inductor"),
    ],
)
def test_autocast_trains_bit_for_bit_as_eager(dtype, compiler):
    """Autocast is on around the eager ops, and off in what AOTAutograd runs. (Inductor drops the
    rounding to float16 between two kernels that it fuses.)
    """
    model, x = Relu(), torch.randn(2, 5, 32)
    result = []
    for inner in ("eager", compiler):
        own = copy.deepcopy(model)
        with torch.autocast("cpu", dtype):
            losses = train(compiled(own, inner), adam(own), x, steps=5)
        result.append((losses, weights(own)))
    assert result[0][0] == result[1][0]
    assert all_equal(result[0][1], result[1][1])
    assert len(trained(model)) == 4
    assert result[0][0][-1] < result[0][0][0]


@each_update
def test_float16_with_a_grad_scaler_trains_by_the_steps_that_were_taken(update):
    """The first scales overflow float16: those steps are skipped, and nothing is written."""
    model, x = of_update(Relu(), update), torch.randn(2, 5, 32)
    result = []
    for inner in ("eager", "aot_eager"):
        own = copy.deepcopy(model)
        call, optimizer = compiled(own, inner, **UPDATES[update]), adam(own)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
        taken, losses = 0, []
        for _ in range(16):
            with torch.autocast("cpu", torch.float16):
                loss = (call(x) - x / 2).float().square().mean()
            scaler.scale(loss).backward()
            before = lora_b(own)[1].detach().clone()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            taken += not torch.equal(before, lora_b(own)[1])
            losses.append(loss.item())
        call(x)
        assert 0 < taken < 16
        if update == "rows":
            assert steps(own)[1] == taken
        assert losses[-1] < losses[0]
        result.append((losses, weights(own)))
    assert result[0][0] == result[1][0]
    assert all_equal(result[0][1], result[1][1])


@each_update
@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_cast_after_compile_goes_on_as_a_cast_before_it(cast, update):
    model, x = of_update(tiny_mlp(), update), torch.randn(5, 32)
    fill_b(model, 0.1)
    before = getattr(copy.deepcopy(model), cast)()
    call, half = compiled(model, **UPDATES[update]), getattr(x, cast)()
    call(x)
    getattr(model, cast)()
    found = train(call, torch.optim.SGD(trained(model), lr=0.1), half, steps=3)
    torch._dynamo.reset()
    sgd = torch.optim.SGD(trained(before), lr=0.1)
    assert found == train(compiled(before, **UPDATES[update]), sgd, half, steps=3)
    assert found[-1] < found[0]
    assert all_equal(weights(model), weights(before))
    if update == "rows":
        assert steps(model) == [2, 2]


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_cast_of_a_prepared_model_rounds_its_adapter_and_nothing_else(cast):
    """As of any model; the base keeps its bytes and its scales."""
    model, x = tiny_mlp(), torch.randn(5, 32)
    fill_b(model, 0.1)
    falqon_fx.prepare(model, progress=False)
    kept = [
        (s.weight, s.scale, s.weight.view(torch.uint8).clone(), s.scale.clone())
        for s in falqon_fx.adapters(model).values()
    ]
    call, half = compiled(model), getattr(x, cast)()
    call(x)
    getattr(model, cast)()
    for state, (weight, scale, code, values) in zip(falqon_fx.adapters(model).values(), kept):
        assert state.weight.data_ptr() == weight.data_ptr()
        assert state.scale.data_ptr() == scale.data_ptr()
        assert torch.equal(state.weight.view(torch.uint8), code)
        assert torch.equal(state.scale, values)
    found = train(call, torch.optim.SGD(trained(model), lr=0.1), half, steps=3)
    assert found[-1] < found[0]


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_with_rows_a_cast_of_a_prepared_models_adapter_is_an_error_whose_remedy_works(cast):
    """It rounds lora_A, which W' holds as it was."""
    model, x, config = (
        of_update(tiny_mlp(), "rows"),
        torch.randn(5, 32),
        FalqonConfig(**UPDATES["rows"]),
    )
    falqon_fx.prepare(model, config, progress=False)
    call, half = compiled(model, **UPDATES["rows"]), getattr(x, cast)()
    call(x)
    getattr(model, cast)()
    with pytest.raises(FalqonError, match=r"changed or cast since") as no:
        call(half)
    assert no.value.site == "base_model.model.0"
    falqon_fx.restore(model)
    falqon_fx.prepare(model, config, progress=False)
    assert call(half).isfinite().all()


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


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@each_update
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
    model, ids = tiny_llama(target_modules=["q_proj", "down_proj"]), torch.randint(0, 64, (2, 9))
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
    assert len(bases[0]) == 4
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
    model = tiny_llama(target_modules=["q_proj", "down_proj"]).eval()
    fill_b(model, size=1.0)
    ids = torch.randint(0, 64, (1, 6))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    if prepared:
        falqon_fx.prepare(model, progress=False)
    inner = model.get_base_model()
    inner.compile(backend="falqon", options={"inner": "eager"})
    tokens = model.generate(input_ids=ids, **settings)
    states = falqon_fx.adapters(model)
    assert len(states) == 4
    twin = emulate(copy.deepcopy(model), states)
    assert torch.equal(tokens, twin.generate(input_ids=ids, **settings))


def test_a_model_moved_to_meta_after_compile_is_an_error_that_names_the_site():
    """Meta stands for any device that the values don't reach."""
    model, x = Relu(), torch.randn(5, 32)
    call = compiled(model)
    call(x)
    with pytest.raises(FalqonError, match=r"up: its base weight .* meta"):
        call.to("meta")(x.to("meta"))
