"""The backend as a whole: inner compilers, what is written and kept, fusion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import falqon_fx
from falqon_fx.rows.state import allocate
from falqon_fx.rows.update import proxy_update_
from falqon_fx.site.record import NONFINITE
from falqon_fx.site.spec import RowsSpec
from tests.emulation import emulate
from tests.models import (
    Stack,
    compiled,
    fill_b,
    freeze_a,
    lora_b,
    made,
    tiny_llama,
    tiny_mlp,
    train,
)
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.training import adam, all_equal, steps, weights

PAPER = {"granularity": "tensor", "scale": "amax"}

ROWS = {"update": "rows"}
PUBLIC_CODE = {**ROWS, **PAPER, "pending": "drop", "rounding": "nearest", "topk": 10}
ALL_OPTIONS = {
    "default": {},
    "int8": {"base_dtype": "int8"},
    "nvfp4": {"base_dtype": "nvfp4"},
    "paper": PAPER,
    "rows": ROWS,
    "public code": PUBLIC_CODE,
}
OPTIONS = pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)


def writes(model: nn.Module) -> list[int]:
    """How many rows each site has written."""
    return [int(state.writes.sum()) for state in falqon_fx.adapters(model).values()]


# -- inner compilers -------------------------------------------------------------------------------


@each_value(options=ALL_OPTIONS, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16})
def test_aot_eager_trains_bit_for_bit_as_eager(dtype, options):
    x, result = torch.randn(4, 6, 32).to(dtype), {}
    model = made(update=options.get("update", "adapter"), dtype=dtype)
    for inner in ("eager", "aot_eager"):
        own = copy.deepcopy(model)
        losses = train(compiled(own, inner, **options), adam(own), x, steps=8)
        result[inner] = (losses, weights(own))
    assert result["eager"][0] == result["aot_eager"][0]
    assert all_equal(result["eager"][1], result["aot_eager"][1])
    assert result["eager"][0][-1] < result["eager"][0][0]


@pytest.mark.parametrize(
    "options",
    [{}, {"adapter_dtype": "fp8"}, {"base_dtype": "int8"}, {"base_dtype": "nvfp4"}, ROWS],
    ids=["default", "fp8 adapter", "int8", "nvfp4", "rows"],
)
def test_inductor_trains_bit_for_bit_as_eager(options):
    """On a CPU the ops are opaque to it, and what is around them here is exact: no rounding is left
    to differ, in bfloat16 either.
    """
    x, result = torch.randn(4, 6, 32).bfloat16(), []
    model = made(update=options.get("update", "adapter"), dtype=torch.bfloat16)
    for inner in ("eager", "inductor"):
        own = copy.deepcopy(model)
        losses = train(compiled(own, inner, **options), adam(own), x, steps=8)
        result.append((losses, weights(own)))
    assert result[0][0] == result[1][0]
    assert all_equal(result[0][1], result[1][1])


@pytest.mark.parametrize("options", [PAPER, PUBLIC_CODE], ids=["paper", "public code"])
def test_the_sizes_of_a_prepared_weight_are_fixed_for_the_compiler(options):
    """Symbols that AOTAutograd gave to them had no source: with one scale a weight, compiling for
    evaluation failed in a guard on such a symbol.
    """
    model, x = freeze_a(tiny_mlp().bfloat16()), torch.randn(4, 32).bfloat16()
    falqon_fx.prepare(model, falqon_fx.FalqonConfig(**options), progress=False)
    with torch.no_grad():
        assert compiled(model, "inductor", **options)(x).isfinite().all()


@OPTIONS
def test_a_rewritten_llama_equals_an_eager_emulation_of_the_same_quantized_ops(options):
    """The emulation (tests/emulation.py) is written with torch's own FP8 casts and takes the same
    steps in the same order, so it is equal bit for bit: logits, loss, and the gradients of all 7
    sites. (Siblings add up their parts of dL/dx in one buffer: another order.)
    """
    model, ids = tiny_llama(layers=1), torch.randint(0, 64, (2, 9))
    fill_b(model)
    if "update" in options:
        freeze_a(model)
    backend = compiled(model, siblings=False, **options)
    output = backend(input_ids=ids, labels=ids)
    output.loss.backward()
    states = falqon_fx.adapters(model)
    assert len(states) == 7

    config = None if "update" in options else falqon_fx.FalqonConfig(**options)
    twin = emulate(copy.deepcopy(model), states, config)
    twin.zero_grad()
    expected = twin(input_ids=ids, labels=ids)
    expected.loss.backward()
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == (7 if "update" in options else 14)
    for name, parameter in trained.items():
        assert parameter.grad.abs().max() > 0
        assert torch.equal(parameter.grad, twin.get_parameter(name).grad), name


def test_the_same_seed_gives_the_same_weights_after_20_steps():
    """Stochastic rounding of rows included."""
    result = []
    for seed in (0, 0, 1):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = made(Stack, "rows"), torch.randn(4, 6, 32)
        train(compiled(model, "aot_eager", seed=seed, **ROWS), adam(model), x, steps=20)
        result.append(weights(model))
    assert all_equal(result[0], result[1])
    assert not all_equal(result[0], result[2])


# -- nothing is written ----------------------------------------------------------------------------


def bases(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Where the FP8 base of each site lies, and its bytes."""
    return {
        path: (state.weight.data_ptr(), state.weight.view(torch.uint8).clone())
        for path, state in falqon_fx.adapters(model).items()
    }


@each_value(inner=["eager", "aot_eager", "inductor"], prepared=PREPARED_OR_NOT)
def test_the_base_is_constant_whatever_trains_it(inner, prepared):
    """Optimizer steps, writes through ``data``, evaluation, a NaN that a scaler skips."""
    model, x = tiny_mlp(), torch.randn(4, 6, 32)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    backend, optimizer = compiled(model, inner), adam(model)
    backend(x)
    first = bases(model)
    train(backend, optimizer, x, steps=3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
            parameter.data = parameter.data.clone()
    before = backend(x)
    with torch.no_grad():
        assert torch.equal(backend(x), before)
        lora_b(model)[0].fill_(float("nan"))
        assert backend(x).isnan().any()
        lora_b(model)[0].zero_()
        assert backend(x).isfinite().all()
    last = bases(model)
    assert len(first) == 2
    for path, (pointer, code) in first.items():
        assert last[path][0] == pointer
        assert torch.equal(last[path][1], code)


# -- update="rows": each step is written once
# -------------------------------------------------------


OPTIMIZERS = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("kind", [*OPTIMIZERS, "compiled"])
def test_each_optimizer_step_is_written_once_by_adamw(kind):
    model, x = made(update="rows"), torch.randn(4, 6, 32)
    backend, optimizer = compiled(model, topk=5, **ROWS), adam(model, **OPTIMIZERS.get(kind, {}))
    step = torch.compile(optimizer.step, backend="aot_eager") if kind == "compiled" else None
    backend(x)
    assert steps(model) == [0, 0]
    for n in range(1, 4):
        backend(x).square().mean().backward()
        (step or optimizer.step)()
        optimizer.zero_grad()
        backend(x)
        assert steps(model) == [n, n]
        assert writes(model) == [5 * n, 5 * n]


def test_a_write_through_data_is_seen():
    model, x = made(update="rows"), torch.randn(4, 6, 32)
    backend = compiled(model, topk="all", pending="hold", rounding="nearest", **ROWS)
    before = backend(x)
    for b in lora_b(model):
        b.data.copy_(torch.randn_like(b))
    after = backend(x)
    assert steps(model) == [1, 1]
    assert not torch.equal(before, after)
    for state in falqon_fx.adapters(model).values():
        assert torch.equal(state.applied, state.lora_b())
    backend(x)
    assert steps(model) == [1, 1]


def test_a_replaced_data_tensor_is_seen():
    model, x = made(update="rows"), torch.randn(4, 6, 32)
    backend = compiled(model, **ROWS)
    backend(x)
    for b in lora_b(model):
        b.data = torch.randn_like(b)
    backend(x)
    assert steps(model) == [1, 1]


def test_a_step_that_gradscaler_skips_writes_nothing():
    model, x = made(update="rows"), torch.randn(4, 6, 32)
    backend, optimizer = compiled(model, **ROWS), adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for n, factor in enumerate((1.0, float("inf"), 1.0)):
        scaler.scale(backend(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        before = weights(model)
        backend(x)
        assert steps(model) == [(1, 1, 2)[n]] * 2
        assert all_equal(before, weights(model)) == (n == 1)
    assert scaler.get_scale() == 2.0**9


def test_gradient_accumulation_and_evaluation_write_once():
    model, x = made(update="rows"), torch.randn(4, 6, 32)
    backend, optimizer = compiled(model, **ROWS), adam(model)
    for n in range(3):
        for part in x.split(2):
            backend(part).square().mean().backward()
            model.eval()
            with torch.no_grad():
                backend(x)
            model.train()
            assert steps(model) == [n, n]
        optimizer.step()
        optimizer.zero_grad()


@each_value(inner=["eager", "aot_eager"], reentrant={"non-reentrant": False, "reentrant": True})
def test_checkpoint_recomputation_writes_nothing_and_changes_nothing(inner, reentrant):
    plain, x = made(Stack, "rows"), torch.randn(4, 6, 32)
    saving: Any = copy.deepcopy(plain)
    saving.call = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    result = []
    for model in (plain, saving):
        call, given = compiled(model, inner, **ROWS), x.clone().requires_grad_()
        losses = train(call, adam(model), given, steps=5)
        assert steps(model) == [4] * 4
        result.append((losses, weights(model)))
    assert result[0][0] == result[1][0]
    assert all_equal(result[0][1], result[1][1])


def test_nan_in_b_is_not_written_and_warned_of_once_one_step_late():
    model, x = made(update="rows"), torch.randn(4, 6, 32)
    backend = compiled(model, topk="all", pending="hold", **ROWS)
    backend(x)
    before = falqon_fx.adapters(model)["up"].code.clone()
    with torch.no_grad():
        for b in lora_b(model):
            b.normal_()
        lora_b(model)[0][3] = float("nan")
        lora_b(model)[0][7, 1] = float("inf")
    backend(x)
    with pytest.warns(UserWarning, match="2 rows of lora_B of up held NaN or Inf") as seen:
        backend(x)
        with torch.no_grad():
            lora_b(model)[0][4] = float("nan")
        for _ in range(3):
            backend(x)
    assert len(seen) == 1
    up, down = falqon_fx.adapters(model).values()
    assert up.nonfinite_rows == up.counters[NONFINITE] == 2 + 3
    assert down.nonfinite_rows == 0
    assert up.weight.float().isfinite().all()
    rows = torch.arange(48)
    kept = torch.isin(rows, torch.tensor([3, 7]))
    assert torch.equal(up.code[:48][kept], before[:48][kept])
    assert up.writes[kept].eq(0).all()
    assert up.writes[~kept].ge(1).all()
    assert down.writes.eq(1).all()


@pytest.mark.parametrize("options", [ROWS, PUBLIC_CODE], ids=["rows", "public code"])
def test_away_from_the_cpu_the_update_reads_nothing_back(options):
    """Meta tensors have no values: whatever asks for one raises. (On CPU, where looking is free,
    the update does look.)
    """
    spec, device = RowsSpec.from_config(falqon_fx.FalqonConfig(**options)), torch.device("meta")
    state = allocate(48, 32, 4, torch.bfloat16, 2.0, spec, device)
    base = torch.empty(48, 32, dtype=torch.bfloat16, device=device)
    a, b = torch.empty(4, 32, device=device), torch.empty(48, 4, device=device)
    columns: list[Any] = [[tensor] for tensor in (*state.tensors, b, a, base)]
    proxy_update_([*columns, [2.0]], str(spec))
    with pytest.raises(RuntimeError, match="meta"):
        bool(state.counters.any())
