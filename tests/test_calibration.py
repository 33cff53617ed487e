"""What a calibration buys back of the casts: its formulas, its op, and where it lives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.model.calibration import MOST
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.ops import fp8_gpu, gpu
from falqon_fx.ops import products as gpu_products
from falqon_fx.site.allot import STEP, Offer, allot
from falqon_fx.site.compensate import DAMPING, damped_root, error_factors, heaviest_channels
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests.calibrated import (
    CHANNELS,
    EAGER,
    IN,
    MIDDLE,
    OUT,
    RANK,
    OneLayer,
    adapted,
    calibrated,
    inputs,
)
from tests.sites import cast, randn
from tests.tolerances import UNIT_ROUNDOFF, assert_within, gamma

U32 = UNIT_ROUNDOFF[torch.float32]


# -- formulas --------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    out=st.integers(2, 48),
    features=st.integers(2, 48),
    rank=st.integers(1, 48),
    seed=st.integers(0, 99),
)
def test_the_factors_leave_the_tail_of_the_singular_values(out, features, rank, seed):
    """‖(E - B·A)·L‖ is the tail of E·L's singular values: never less (Eckart and Young), and more
    by rounding alone.

    With float32's u: E·L is off by γ_in ‖|E||L|‖; LAPACK's SVD is backward stable, at most some
    multiple of the dimensions times u ‖E·L‖, twice (the triples, and B's product with them);
    A·L differs from its right side by γ_in |A||L|, brought to the output by B.
    """
    rank = min(rank, out, features)
    x = randn(3 * features, features, seed=seed) * randn(features, seed=seed + 1).exp()
    error, moment = randn(out, features, seed=seed + 2), x.t() @ x / len(x)
    root = damped_root(moment)
    factors = error_factors(error, root, rank)
    e, low, a, b = (t.double() for t in (error, root, factors.a, factors.b))
    left = (e @ low - b @ (a @ low)).norm()
    tail = torch.linalg.svdvals(e @ low)[rank:].norm()
    size, sides = (e @ low).norm(), max(out, features)
    off = gamma(features) * (e.abs() @ low.abs()).norm() + 32 * sides * U32 * size
    off += gamma(features) * (b.abs() @ a.abs() @ low.abs()).norm()
    assert tail - 1e-12 * size <= left <= (tail.square() + off.square()).sqrt() + off
    assert abs(factors.left - float(left / size)) <= float(off / size) + gamma(4)
    # What is left by fewer ranks is a difference of squares: of 1, of which each share is off.
    for fewer in {1, rank}:
        tail = torch.linalg.svdvals(e @ low)[fewer:].square().sum() / size.square()
        assert abs(factors.first(fewer).left ** 2 - float(tail)) <= 4 * float(off / size)


def test_the_root_is_that_of_the_damped_moment():
    x = randn(200, 24)
    moment = x.t() @ x / 200
    low = damped_root(moment).double()
    wanted = moment.double() + DAMPING * moment.double().diagonal().mean() * torch.eye(24)
    assert torch.equal(low, low.tril())
    # Rounded to float32 once: each factor of a product of two is off by u.
    assert_within(low @ low.t(), wanted, gamma(2) * (low.abs() @ low.abs().t()))


def test_an_error_of_low_rank_and_one_of_none_leave_nothing():
    error, root = randn(20, 2) @ randn(2, 12, seed=1), torch.eye(12)
    factors = error_factors(error, root, 6)
    assert bool(factors.a.isfinite().all() and factors.b.isfinite().all())
    assert factors.left < gamma(12) * 32
    nothing = error_factors(torch.zeros(20, 12), root, 6)
    assert (float(nothing.a.abs().max()), float(nothing.b.abs().max()), nothing.left) == (0, 0, 0)


def test_the_channels_are_those_that_weigh_most():
    squares, weight = torch.tensor([1.0, 4.0, 9.0, 0.25]), torch.ones(3, 4)
    weight[:, 0] = 10
    channels, shares = heaviest_channels(squares, weight, 2)
    assert channels.tolist() == [0, 2]
    assert shares.tolist() == pytest.approx([300 / 339.75, 27 / 339.75])


# -- a budget --------------------------------------------------------------------------------------


@given(
    worth=st.lists(st.floats(0, 10), min_size=3, max_size=3),
    prices=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    budget=st.integers(0, 200),
    seed=st.integers(0, 99),
)
def test_a_budget_buys_the_best_up_to_one_step(worth, prices, budget, seed):
    """Against all choices. With one price for all greedy is the best; else the best of fractions,
    which no choice passes, has at most the first step that is not paid for more.
    """
    shares = randn(3, 20, seed=seed).abs().sort(1, descending=True).values
    offers = [Offer(i, shares[i], worth[i], prices[i]) for i in range(3)]
    steps = [0, STEP, 2 * STEP, 20]
    assert steps[-1] - steps[-2] < STEP  # the last is a part of one

    def value(counts: Sequence[int]) -> tuple[int, float]:
        bought = zip(counts, prices, worth, shares, strict=True)
        parts = [(n * price, w * float(row[:n].sum())) for n, price, w, row in bought]
        return sum(cost for cost, _ in parts), sum(gain for _, gain in parts)

    chosen = allot(offers, budget)
    assert all(n in steps for n in chosen.values())
    cost, gain = value([chosen[i] for i in range(3)])
    assert cost <= budget
    every = map(value, itertools.product(steps, repeat=3))
    best = max(other for price, other in every if price <= budget)
    largest = max(w * float(row[:STEP].sum()) for w, row in zip(worth, shares, strict=True))
    assert best <= gain + largest + 1e-6 * best


def test_auto_spends_what_sixteen_of_each_would_take():
    uniform, auto = adapted(), adapted()
    for model, asked in ((uniform, {}), (auto, {"compensate": "auto"})):
        falqon_fx.prepare(model, EAGER, calibration=inputs(), progress=False, **asked)
    sizes = [
        sum(t.nbytes for m in terms_of(model).values() for t in m) for model in (uniform, auto)
    ]
    layers = [m for m in auto.modules() if isinstance(m, Fp8Linear)]
    assert len({layer.error_b.shape[1] for layer in layers if layer.error_b is not None}) > 1
    # All is spent but what doesn't pay for one more step of any layer that has one.
    steps = list[int]()
    for layer in layers:
        a, b, columns = layer.error_a, layer.error_b, layer.columns
        out, features = layer.out_features, layer.in_features
        if a is not None and b is not None and len(a) < min(MOST, out, features):
            steps.append(STEP * (a[:1].nbytes + b[:, :1].nbytes))
        if columns is not None and columns.shape[1] < min(MOST, features):
            steps.append(STEP * columns[:, :1].nbytes)
    assert 0 <= sizes[0] - sizes[1] < min(steps)


def terms_of(model: nn.Module) -> dict[str, list[Tensor]]:
    held = {p: m for p, m in model.named_modules() if isinstance(m, Fp8Linear)}
    return {p: [t for n, t in m.terms.items() if n != "channels"] for p, m in held.items()}


# -- the op ----------------------------------------------------------------------------------------


def check(one: OneLayer, **options: Any) -> None:
    """Output and gradient against float64 on the operands as they are cast: float32 sums of as many
    products as a row has, of operands that decode exactly; scales that are no powers of two follow
    the product.
    """
    for found, (wanted, gauge), products in zip(
        one.run(**options), (one.expected(), one.expected_gradient()), (IN, OUT), strict=True
    ):
        roundings = products + one.rank + one.channels + 16
        assert_within(found.double(), wanted, gamma(roundings) * gauge)


@settings(max_examples=12, deadline=None)
@given(
    rank=st.sampled_from([0, 1, 7, 16]),
    channels=st.sampled_from([0, 1, 6]),
    base=st.sampled_from(["fp8", "int8", "nvfp4"]),
    granularity=st.sampled_from(["row", "tensor"]),
    scale=st.sampled_from(["pow2", "amax"]),
    bias=st.booleans(),
    adapter=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forward_and_gradients_are_those_of_the_quantized_operands(
    rank, channels, base, granularity, scale, bias, adapter, seed
):
    config = FalqonConfig(inner="eager", base_dtype=base, granularity=granularity, scale=scale)
    check(OneLayer(config, rank or (0 if channels else 3), channels, bias, adapter, seed))


def test_inductor_computes_the_same():
    check(OneLayer(EAGER), inner="inductor")


def test_with_an_adapter_in_fp8_its_factors_are_cast_too():
    """Then O_A = x̂·Âᵀ and B are cast to E4M3, each value by a 17th of it at most, or by half of the
    smallest step of its row or column (`fp8_cast_bound`), which the 2**-9 of the largest covers.
    """
    config = FalqonConfig(inner="eager", adapter_dtype="fp8")
    one = OneLayer(config, adapter=False)
    y, _ = one.run()
    wanted, gauge = one.expected()
    ((a, b),) = one.low()
    read = cast(one.x, E4M3, one.spec)
    inner, moved = read @ a.t(), torch.zeros_like(wanted)
    # So are the error of x and the columns of W that bring it to the output.
    assert one.layer.channels is not None
    assert one.layer.columns is not None
    error = (one.x.double() - read)[:, one.layer.channels.long()]
    for left, right in ((inner, b), (error, one.layer.columns.detach().double())):
        off = [t.abs() / 17 + t.abs().amax(1, keepdim=True) * 2**-9 for t in (left, right)]
        moved += (left.abs() + off[0]) @ (right.abs() + off[1]).t() - left.abs() @ right.abs().t()
    assert_within(y.double(), wanted, moved + gamma(IN + RANK + CHANNELS + 16) * gauge)
    assert float(moved.mean()) < float((inner @ b.t()).abs().mean())  # or nothing would be seen


@pytest.mark.parametrize("base_dtype", ["fp8", "nvfp4"])
def test_a_calibrated_model_is_nearer_to_the_plain_one(base_dtype):
    """Outside of compiled code, where W alone is cast, by its ranks; in it by all."""
    config = FalqonConfig(inner="eager", base_dtype=base_dtype)
    x = inputs()[0]
    wanted = adapted().eval()(x).detach()
    eager, compiled = [], []
    cases: list[dict[str, Any]] = [{}, {"calibration": inputs()}]
    for asked in cases:
        model = adapted().eval()
        falqon_fx.prepare(model, config, progress=False, **asked)
        torch._dynamo.reset()
        call = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
        eager.append(float((model(x).detach() - wanted).norm()))
        compiled.append(float((call(x).detach() - wanted).norm()))
    assert eager[1] < eager[0]
    assert compiled[1] < compiled[0]


@pytest.mark.parametrize("ranks", [RANK, 0])
def test_what_it_makes_is_computed_with_the_adapters_of_a_site(ranks):
    """A layer without adapters has its A_c as one; without that, its error of x stands behind."""
    model = calibrated(compensate=ranks)
    model.eval()
    layers = [layer for layer in model.modules() if isinstance(layer, Fp8Linear)]
    held = [
        sum(t.nbytes for t in (layer.code, layer.scale, *layer.terms.values())) for layer in layers
    ]
    graphs: list[torch.fx.GraphModule] = []

    def look(gm: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        result = falqon_fx.rewrite(gm, example, EAGER)
        graphs.append(result.gm)
        assert [site.adapters for site in result.report.sites] == [1, 1, 0, 1]
        assert {(site.compensate, site.outliers) for site in result.report.sites} == {
            (ranks, CHANNELS)
        }
        memory = [site.memory for site in result.report.sites]
        assert sorted(m.state for m in memory if m is not None) == sorted(held)
        return gm.forward

    torch.compile(model, backend=look)(inputs()[0])
    (gm,) = graphs
    falqon = torch.ops.falqon
    fused = gm.graph.find_nodes(op="call_function", target=falqon.merged_linear.default)
    found = sorted((node.args[4] for node in fused), key=len)
    assert [*map(len, found)] == [int(ranks > 0), 1, 2]  # plain, o, q and k
    assert {a.meta["val"].shape[0] for of in found for a in of} == {16}  # 4 + ranks, with zeros
    widths = {b.meta["val"].shape[1] for node in fused for b in node.args[6]}
    assert widths == {rows + CHANNELS for rows in (16, 16 * bool(ranks)) if rows}
    behind = gm.graph.find_nodes(op="call_function", target=falqon.outliers.default)
    assert len(behind) == int(ranks == 0)


def test_terms_are_cast_together_beside_adapters_of_another_dtype(monkeypatch):
    """On a GPU a launch takes one dtype: one for the adapters, one for the terms."""
    shapes = [(IN, MIDDLE), (MIDDLE, OUT), (IN, OUT)]
    lora_a, lora_b = list[Tensor](), list[Tensor]()
    for rank, dtype in ((4, torch.float32), (RANK, torch.bfloat16)):
        lora_a += [randn(rank, size, seed=size).to(dtype) for size, _ in shapes]
        lora_b += [randn(size, rank, seed=size).to(dtype) for _, size in shapes]
    order = [0, 3, 1, 4, 2, 5]  # as they stand in a graph
    lora_a, lora_b = ([of[j] for j in order] for of in (lora_a, lora_b))
    scaling, spec = [2.0, 1.0] * 3, str(SiteSpec.from_config(EAGER))
    given: tuple[Any, ...] = lora_a, lora_b, scaling, [], False, spec
    plain, groups = gpu_products.adapter_casts, list[Any]()

    def noted(a: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        groups.append({t.dtype for t in a})
        return plain(a, *rest)

    monkeypatch.setattr(gpu_products, "adapter_casts", noted)
    found, wanted = (
        gpu.proxy_update(*given),
        torch.ops.falqon.proxy_update(*given[:4], [], [], [], *given[4:]),
    )
    assert sum(len(group) for group in groups) == len(groups)
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    assert all(torch.equal(f.float(), w.float()) for f, w in zip(found, wanted, strict=True))

    # Those in FP8 as each alone.
    in_fp8 = str(SiteSpec.from_config(FalqonConfig(adapter_dtype="fp8")))
    scale = [torch.full((len(b), 1), 2.0**-6) for b in lora_b]
    found = fp8_gpu.proxy_update(lora_a, lora_b, scaling, scale, in_fp8)
    columns = zip(lora_a, lora_b, scaling, scale, strict=True)
    each = (fp8_gpu.proxy_update([a], [b], [f], [s], in_fp8) for a, b, f, s in columns)
    wanted = [cast for casts in each for cast in casts]
    assert all(torch.equal(f.float(), w.float()) for f, w in zip(found, wanted, strict=True))


def test_dropout_of_an_adapter_does_not_reach_it():
    """Where B is zero, a dropped x changes nothing: the term reads x itself, and its gradient."""
    one = OneLayer(EAGER, dropout=0.5)
    nn.init.zeros_(one.lora.lora_B.default.weight)
    check(one)


def test_x_is_not_kept_for_what_does_not_train():
    model = calibrated(outliers=0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    kept: list[Any] = []

    def look(gm: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        result = falqon_fx.rewrite(gm, example, EAGER)
        op = torch.ops.falqon.merged_linear.default
        kept.extend(n.args[14] for n in result.gm.graph.find_nodes(op="call_function", target=op))
        return gm.forward

    torch.compile(model, backend=look)(inputs()[0])
    assert kept == [False] * 3


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("base_dtype", ["fp8", "int8"])
def test_it_stays_constant_where_a_loop_sets_requires_grad_on_all_parameters(base_dtype, inner):
    """Also where it is all that a site has beside W."""
    config = FalqonConfig(inner=inner, base_dtype=base_dtype)
    wanted, model = calibrated(config).eval(), calibrated(config).eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    results = []
    for each in (wanted, model):
        torch._dynamo.reset()
        x = inputs(1)[0].requires_grad_()
        y = torch.compile(each, backend="falqon", options=dict[str, Any](config=config))(x)
        y.square().sum().backward()
        results += [(y, x.grad, {n: p.grad for n, p in each.named_parameters()})]
    (y, grad_x, grads), (found_y, found_x, found) = results
    assert torch.equal(y, found_y)
    assert torch.equal(grad_x, found_x)
    for name, grad in found.items():
        last = name.rpartition(".")[2]
        assert (grad is not None) is ("lora_" in name or last == "bias"), name
        assert grads[name] is None or torch.equal(grad, grads[name])
