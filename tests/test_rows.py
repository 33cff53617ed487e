"""update="rows" in whole models: what evaluation adds, what "drop" must not lose, threads, a
trained A.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError, MergedAdapter
from falqon_fx.rows.state import create, registry
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.record import STEP
from tests.by_rows import OPTIONS, PREPARED, SITES, compiled, mlp, sgd, states_of
from tests.models import LoraLinear, Stack, fill_b, freeze_a, lora_b, tiny_mlp, train
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.sites import cast, dequantized, randn, same
from tests.tolerances import assert_within, gamma

# -- hold ------------------------------------------------------------------------------------------


def exact_output(x: Tensor, state: MergedAdapter, rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """x̂ · (dq(W) + rest · Â)ᵀ in float64, and what float32 may be off: sums of in products, of r
    products, and the roundings of b, O_A and the sum.
    """
    merged, out = dequantized(state), len(state.applied)
    q = cast(x, E4M3, state.spec)
    y, most = q @ merged[:out].t(), q.abs() @ merged[:out].abs().t()
    if rest is not None:
        y = y + q @ merged[out:].t() @ rest.double().t()
        most = most + q.abs() @ merged[out:].abs().t() @ rest.double().abs().t()
    return y, gamma(x.shape[1] + state.rank + 8) * most


@PREPARED
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hold_evaluates_a_b_that_was_just_loaded(prepared, mode):
    """Ten rows of 48 are written at the first call; the others are not in W' yet."""
    model, run = one_layer(prepared, pending="hold", topk=10)
    x = randn(5, 32)
    run(x)
    fill_b(model, 0.25)  # no row grows more than four times
    (b,) = lora_b(model)
    with mode():
        y = run(x)
    (state,) = falqon_fx.adapters(model).values()
    assert state.writes.sum() == 10
    rest = (b.detach() - state.applied) * state.scaling
    assert (rest != 0).any(1).sum() == 38
    expected, bound = exact_output(x, state, rest)
    assert_within(y, expected, bound)
    # Training goes on from what is in W', as the paper has it.
    expected, bound = exact_output(x, state, None)
    assert_within(run(x), expected, bound)
    assert state.writes.sum() == 10


@PREPARED
def test_hold_evaluates_as_it_trains_where_nothing_is_pending(prepared):
    model, run = one_layer(prepared, pending="hold", topk=10)
    x = randn(5, 32)
    run(x)
    fill_b(model, 0.5)
    run(x)
    falqon_fx.flush(model)
    with torch.no_grad():
        evaluated = run(x)
    assert torch.equal(run(x), evaluated)


def one_layer(
    prepared: bool, features: int = 32, out: int = 48, **options: Any
) -> tuple[nn.Module, nn.Module]:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    layers = nn.Sequential(nn.Linear(features, out, bias=False))
    model = freeze_a(peft.get_peft_model(layers, lora))
    if prepared:
        falqon_fx.prepare(model, FalqonConfig(**{**OPTIONS, **options}), progress=False)
    return model, compiled(model, **options)


# -- threads ---------------------------------------------------------------------------------------


@pytest.fixture
def _switching():
    """Threads take turns fifty times as often as else."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def in_threads(*functions: Any) -> list[Any]:
    """The results of functions that begin at the same moment."""
    barrier = threading.Barrier(len(functions))
    results: list[Any] = [None] * len(functions)

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = functions[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@each_value(prepared=PREPARED_OR_NOT, pending=["hold", "drop", "apply"])
@pytest.mark.usefixtures("_switching")
def test_two_threads_compute_what_one_does(prepared, pending):
    """The same model in two threads, B moved between: rows are written once, and no thread reads a
    weight that is half written. Outputs, gradients and states equal those of a twin that runs both
    one after the other.
    """
    both = [one_layer(prepared, 512, 1024, pending=pending, topk="all") for _ in range(2)]
    (model, run), (twin, alone) = both
    twin.load_state_dict(model.state_dict())
    x = [randn(4, 512, seed=i) for i in range(2)]

    def step(call: nn.Module, value: Tensor, of: nn.Module) -> tuple[Tensor, ...]:
        y = call(value)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), lora_b(of)))

    for call, of in ((run, model), (alone, twin)):
        step(call, x[0], of)  # compiled; the states are there
    for i in range(12):
        for of in (model, twin):
            for j, b in enumerate(lora_b(of)):
                b.data.add_(randn(*b.shape, seed=2 * i + j) * 0.05)
        found = in_threads(*(lambda v=v: step(run, v, model) for v in x))
        expected = [step(alone, v, twin) for v in x]
        for one, other in zip(found, expected, strict=True):
            assert same(list(one), list(other)), i
        mine, others = states_of(model), states_of(twin)
        assert all(same(mine[path], others[path]) for path in mine), i
    assert {int(s.counters[STEP]) for s in falqon_fx.adapters(model).values()} == {12}


@pytest.mark.usefixtures("_switching")
def test_two_threads_make_one_state():
    """The first call of a model, by two threads at once."""
    model, x = freeze_a(Stack(1)), randn(6, 32)
    run = compiled(model)

    def call() -> Tensor:
        with torch.no_grad():
            return run(x)

    call()  # compiled
    for _ in range(10):
        falqon_fx.restore(model)  # its states are dropped
        in_threads(call, call)
        assert [len(registry.of(b)) for b in lora_b(model)] == [1, 1]


# -- A trained -------------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
}


@pytest.mark.parametrize("pending", ["hold", "apply"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_trains_where_all_rows_are_written(pending, make, dtype):
    """In each step W' = [q(base + s·B·Â); q(A)] of the A and B as they are then, bit for bit what a
    new state of them is, and the gradients are those of the products in FP8.
    """
    model = LoraLinear(32, 48, dtype=dtype)
    fill_b(model, 0.1)
    run = compiled(model, topk="all", pending=pending)
    a, b = model.lora_A.weight, model.lora_B.weight
    optimizer, x = make([a, b]), randn(16, 32).to(dtype)
    target, losses = randn(16, 48, seed=1), []
    config = FalqonConfig(**OPTIONS, topk="all", pending=pending)
    for _ in range(15):
        y = run(x)
        (state,) = falqon_fx.adapters(model).values()
        fresh = create("site", model.base_layer.weight, a, b, 2.0, config)
        assert same(
            [state.code, state.scale, state.applied], [fresh.code, fresh.scale, fresh.applied]
        )
        y.retain_grad()
        loss = (y.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert_gradients(x, y.grad, state, a, b)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def assert_gradients(x: Tensor, grad: Tensor, state: MergedAdapter, a: Tensor, b: Tensor) -> None:
    """dL/dA = Dᵀ·x̂ with D = s·dL/dO·B, dL/dB = s·dL/dOᵀ·O_A with O_A = x̂·Âᵀ, in float64 on the
    same quantized operands. The op works in ``unit``: each of the factors s·B, D and O_A rounds
    once to it, sums of n, in, out products are float32's, the result rounds once more.
    """
    g, s, n = grad.double(), state.scaling, len(x)
    q = cast(x.float(), E4M3, state.spec)
    lora_a = dequantized(state)[len(state.applied) :]
    unit = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-24
    d, out_a = s * g @ b.detach().double(), q @ lora_a.t()
    d_most, most = s * g.abs() @ b.detach().double().abs(), q.abs() @ lora_a.abs().t()
    own = gamma(4, unit) + gamma(n + len(state.applied) + x.shape[1] + 4)
    assert_within(a.grad, d.t() @ q, own * (d_most.t() @ q.abs()))
    assert_within(b.grad, s * g.t() @ out_a, own * s * (g.abs().t() @ most))


def test_a_backward_pass_behind_a_step_of_a_fails_as_it_does_in_torch():
    """W' that was saved has been made anew since."""
    model = LoraLinear(32, 48)
    fill_b(model, 0.1)
    run, x = compiled(model, topk="all"), randn(6, 32).requires_grad_()
    loss = run(x).sum()
    with torch.no_grad():
        model.lora_A.weight.mul_(1.5)
    run(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_a_trained_site_that_breaks_is_named(bad, which):
    model = Stack(1)
    run, x = compiled(model, topk="all"), randn(6, 32)
    run(x)
    model.blocks[0].down.lora_A.weight.data.mul_(1.5)
    getattr(model.blocks[0].down, which).weight.data[1, 1] = bad
    with pytest.raises(FalqonError, match=f"its {which} holds NaN or Inf") as error:
        run(x)
    assert error.value.site == "blocks.0.down"


@pytest.mark.parametrize(
    ("options", "prepared"),
    [
        ({}, False),
        ({"topk": 5}, False),
        ({"topk": "all"}, True),
        ({"topk": "all", "pending": "drop"}, False),
    ],
    ids=["ten rows", "five rows", "prepared", "drop"],
)
def test_a_trained_a_is_refused_where_rows_would_hold_another(options, prepared):
    pytest.importorskip("peft")
    model = tiny_mlp()
    if prepared:
        falqon_fx.prepare(model, FalqonConfig(**OPTIONS, **options), progress=False)
    with pytest.raises(Exception, match="its lora_A is trained") as error:
        compiled(model, **options)(randn(6, 32))
    assert 'update="adapter"' in str(error.value)
    assert SITES[0] in str(error.value)


def test_models_of_several_scalings_are_all_written(graphs):
    """Dynamo takes a number that differs from one model to the next for one that varies."""
    pytest.importorskip("peft")
    x = randn(6, 32)
    for alpha in (8, 16, 4):
        model = freeze_a(tiny_mlp(lora_alpha=alpha))
        falqon_fx.prepare(model, FalqonConfig(**OPTIONS), progress=False)
        train(compiled(model), sgd(model), x, 3)
        states = falqon_fx.adapters(model).values()
        assert {state.scaling for state in states} == {alpha / 4}
        assert all(int(state.counters[STEP]) == 2 for state in states)
    assert [len(report.sites) for report in graphs] == [2, 2, 2]


def test_weight_decay_on_b_is_a_change_like_any_other():
    model, run = mlp(topk="all", pending="hold")
    x = randn(6, 32)
    fill_b(model)
    run(x)
    for b in lora_b(model):
        b.grad = torch.zeros_like(b)
    torch.optim.AdamW(lora_b(model), lr=0.1, weight_decay=0.5).step()
    run(x)
    for state in falqon_fx.adapters(model).values():
        assert torch.equal(state.applied, state.lora_b())
        assert state.counters[STEP] == 1


# -- torch's defaults, and states of other dtypes --------------------------------------------------


@each_value(
    default=[(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")],
    prepared=PREPARED_OR_NOT,
)
def test_defaults_of_torch_change_no_training(default, prepared):
    dtype, device = default

    def trained() -> list[Any]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, run = mlp(prepared)
        x = randn(6, 32)
        return [model, run, x, sgd(model)]

    results = []
    for setting in ((torch.float32, "cpu"), (dtype, device)):
        model, run, x, optimizer = trained()
        torch.set_default_dtype(setting[0])
        torch.set_default_device(setting[1])
        try:
            with falqon_fx.watch(model) as seen:
                losses = train(run, optimizer, x, 4)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        results.append((losses, states_of(model), seen.history))
    (losses, states, history), (other_losses, others, other_history) = results
    assert losses == other_losses
    assert history == other_history
    assert all(same(states[path], others[path]) for path in states)


@pytest.mark.parametrize("part", ["scale", "applied", "counters", "writes"])
def test_state_of_another_dtype_is_refused_by_name(part):
    """As code that goes round `load_state_dict`, which refuses it by itself, leaves it behind."""
    model, run = mlp(True)
    run(randn(6, 32))
    layer = model.get_submodule(f"{SITES[1]}.base_layer")
    to = torch.float16 if part == "applied" else torch.bfloat16
    place = layer._buffers if part in layer._buffers else layer._parameters
    place[part] = nn.Parameter(getattr(layer, part).detach().to(to), requires_grad=False)
    with pytest.raises(FalqonError, match=f"its {part} is torch.{str(to)[6:]}") as error:
        run(randn(6, 32))
    assert error.value.site == SITES[1]
    assert "assign=True" in error.value.remedy
