"""What a calibration buys back of the casts: its formulas, its op, and where it lives."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.model.calibration import Calibration
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.lora_layers import linear_layers
from falqon_fx.site.compensate import DAMPING, damped_root, error_factors, heaviest_channels
from falqon_fx.site.numerics import E4M3, E5M2
from falqon_fx.site.spec import SiteSpec
from tests.calibrated import CHANNELS, EAGER, IN, OUT, RANK, adapted, calibrated, inputs
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
    factors = error_factors(error, moment, rank)
    e, low, a, b = (t.double() for t in (error, root, factors.a, factors.b))
    left = (e @ low - b @ (a @ low)).norm()
    tail = torch.linalg.svdvals(e @ low)[rank:].norm()
    size, sides = (e @ low).norm(), max(out, features)
    off = gamma(features) * (e.abs() @ low.abs()).norm() + 32 * sides * U32 * size
    off += gamma(features) * (b.abs() @ a.abs() @ low.abs()).norm()
    assert tail - 1e-12 * size <= left <= (tail.square() + off.square()).sqrt() + off
    assert abs(factors.left - float(left / size)) <= float(off / size) + gamma(4)


def test_the_root_is_that_of_the_damped_moment():
    x = randn(200, 24)
    moment = x.t() @ x / 200
    low = damped_root(moment).double()
    wanted = moment.double() + DAMPING * moment.double().diagonal().mean() * torch.eye(24)
    assert torch.equal(low, low.tril())
    # Rounded to float32 once: each factor of a product of two is off by u.
    assert_within(low @ low.t(), wanted, gamma(2) * (low.abs() @ low.abs().t()))


def test_an_error_of_low_rank_and_one_of_none_leave_nothing():
    error, moment = randn(20, 2) @ randn(2, 12, seed=1), torch.eye(12)
    factors = error_factors(error, moment, 6)
    assert bool(factors.a.isfinite().all() and factors.b.isfinite().all())
    assert factors.left < gamma(12) * 32
    nothing = error_factors(torch.zeros(20, 12), moment, 6)
    assert (float(nothing.a.abs().max()), float(nothing.b.abs().max()), nothing.left) == (0, 0, 0)


def test_the_channels_are_those_that_weigh_most():
    moment, weight = torch.diag(torch.tensor([1.0, 4.0, 9.0, 0.25])), torch.ones(3, 4)
    weight[:, 0] = 10
    assert heaviest_channels(moment, weight, 2).tolist() == [0, 2]


def test_moments_are_of_all_that_a_layer_read_and_siblings_share_them():
    model = adapted()
    layers = list(linear_layers(model))
    before = torch.random.get_rng_state()
    calibration = Calibration.asked(inputs(), 4, 0)
    calibration.read(model, layers, False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert not any(layer.module._forward_pre_hooks for layer in layers)
    found = {
        layer.site.rpartition(".")[2]: calibration._moments[id(layer.module)] for layer in layers
    }
    assert found["q"] is found["k"]
    assert len({id(moment) for moment in found.values()}) == 3
    x = torch.cat(inputs()).double()
    assert found["q"].tokens == len(x) == calibration.tokens
    # float32 sums of as many products as there are tokens.
    assert_within(
        found["q"].mean.double(),
        x.t() @ x / len(x),
        gamma(len(x) + 1) * (x.abs().t() @ x.abs()) / len(x),
    )


# -- the op ----------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(
    rank=st.sampled_from([0, 1, 7, 16]),
    channels=st.sampled_from([0, 1, 6]),
    granularity=st.sampled_from(["row", "tensor"]),
    scale=st.sampled_from(["pow2", "amax"]),
    bias=st.booleans(),
    adapter=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forward_and_gradients_are_those_of_the_quantized_operands(
    rank, channels, granularity, scale, bias, adapter, seed
):
    """O = x̂·Ŵᵀ + x̂·Â_cᵀ·B_cᵀ + (x - x̂)_S·W_Sᵀ + the adapter, dL/dx = q(dO ⊙ s_W)·Ŵ + (dO·B_c)·Â_c
    + its own: float64 on the operands as they are cast, float32 sums of as many products as a row
    has, of operands that decode exactly; scales that are no powers of two follow the product.
    """
    if not rank and not channels:
        rank = 3
    config = FalqonConfig(inner="eager", granularity=granularity, scale=scale)
    spec = SiteSpec.from_config(config)
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(IN, OUT, bias=bias)).requires_grad_(False)
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
        nn.init.normal_(model.base_model.model[0].lora_B.default.weight, std=0.05)
    x = (randn(30, IN, seed=seed) * randn(IN, seed=seed + 1).exp()).requires_grad_()
    batches = [x.detach()]
    falqon_fx.prepare(
        model, config, calibration=batches, compensate=rank, outliers=channels, progress=False
    )
    (layer,) = (m for m in model.modules() if isinstance(m, Fp8Linear))
    torch._dynamo.reset()
    y = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))(x)
    grad = randn(*y.shape, seed=seed + 2)
    y.backward(grad)

    read, weight = cast(x.detach(), E4M3, spec), layer.base().dequantize().double()
    low: list[tuple[Tensor, Tensor]] = []  # (Â, b)
    if rank:
        low.append((cast(layer.error_a.float(), E4M3, spec), layer.error_b.double()))
    if adapter:
        lora = model.base_model.model[0]
        a, b = lora.lora_A.default.weight.detach(), lora.lora_B.default.weight.detach()
        low.append((cast(a, E4M3, spec), b.double() * lora.scaling["default"]))
    wanted, gauge = read @ weight.t(), read.abs() @ weight.abs().t()
    for a, b in low:
        wanted, gauge = (
            wanted + read @ a.t() @ b.t(),
            gauge + read.abs() @ a.abs().t() @ b.abs().t(),
        )
    if channels:
        picked, columns = layer.channels.long(), layer.columns.double()
        error = (x.detach().double() - read)[:, picked]
        wanted, gauge = wanted + error @ columns.t(), gauge + error.abs() @ columns.abs().t()
    if bias:
        wanted, gauge = wanted + layer.bias.double(), gauge + layer.bias.double().abs()
    assert_within(y.detach().double(), wanted, gamma(IN + rank + channels + 12) * gauge)

    rows = layer.base().scale.double()
    given_ = grad * rows.t().float() if granularity == "row" else grad
    back = cast(given_, E5M2, spec)
    back = back / rows.t() if granularity == "row" else back
    wanted, gauge = back @ weight, back.abs() @ weight.abs()
    for a, b in low:
        wanted = wanted + grad.double() @ b @ a
        gauge = gauge + grad.double().abs() @ b.abs() @ a.abs()
    assert_within(x.grad.double(), wanted, gamma(OUT + rank + 16) * gauge)


@pytest.mark.parametrize(
    "options", [{"inner": "inductor"}, {"adapter_dtype": "fp8", "inner": "eager"}]
)
def test_compiled_code_computes_what_eager_code_stands_for(options):
    """Against the layer that casts no x: what the cast of x costs is a few percent, and with
    Inductor the numbers are those of the inner backend "eager" but for the order of sums.
    """
    config = FalqonConfig(**options)
    model, (x, *_) = calibrated(config).eval(), inputs()
    results = []
    for each in (config, EAGER):
        torch._dynamo.reset()
        if each.adapter_dtype != config.adapter_dtype:
            continue
        call = torch.compile(model, backend="falqon", options=dict[str, Any](config=each))
        read = x.clone().requires_grad_()
        y = call(read)
        y.sum().backward()
        results.append((y.detach(), read.grad))
    plain = model(x).detach()
    assert float((results[0][0] - plain).norm() / plain.norm()) < 2**-4  # E4M3's unit roundoff
    for y, g in results[1:]:
        torch.testing.assert_close(y, results[0][0], rtol=1e-4, atol=1e-4 * float(y.abs().max()))
        torch.testing.assert_close(g, results[0][1], rtol=1e-2, atol=1e-2 * float(g.abs().max()))


def test_a_calibrated_model_is_nearer_to_the_plain_one():
    """Outside of compiled code, where W alone is cast, by its ranks; in it by all."""
    x = inputs()[0]
    wanted = adapted().eval()(x).detach()
    eager, compiled = [], []
    cases: list[dict[str, Any]] = [{}, {"calibration": inputs()}]
    for asked in cases:
        model = adapted().eval()
        falqon_fx.prepare(model, EAGER, progress=False, **asked)
        torch._dynamo.reset()
        call = torch.compile(model, backend="falqon", options=dict[str, Any](config=EAGER))
        eager.append(float((model(x).detach() - wanted).norm()))
        compiled.append(float((call(x).detach() - wanted).norm()))
    assert eager[1] < eager[0]
    assert compiled[1] < compiled[0]


def test_the_graph_has_one_more_adapter_a_site_and_the_error_of_x_behind_it():
    model = calibrated()
    model.eval()
    graphs: list[torch.fx.GraphModule] = []

    def look(gm: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        result = falqon_fx.rewrite(gm, example, EAGER)
        graphs.append(result.gm)
        assert [site.adapters for site in result.report.sites] == [1, 1, 0, 1]
        assert {(site.compensate, site.outliers) for site in result.report.sites} == {
            (RANK, CHANNELS)
        }
        return gm.forward

    torch.compile(model, backend=look)(inputs()[0])
    (gm,) = graphs
    falqon = torch.ops.falqon
    fused = gm.graph.find_nodes(op="call_function", target=falqon.merged_linear.default)
    assert sorted(len(node.args[4]) for node in fused) == [1, 2, 4]  # plain, o, q and k
    assert len(gm.graph.find_nodes(op="call_function", target=falqon.outliers.default)) == 4


def test_dropout_of_an_adapter_does_not_reach_it():
    """Where B is zero, a dropped x changes nothing: the term reads x itself, and its gradient."""
    results = []
    for p in (0.0, 0.5):
        model = adapted(lora_dropout=p)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.zeros_(parameter)
        falqon_fx.prepare(model, EAGER, calibration=inputs(), progress=False)
        model.base_model.model.drop.p = 0.0
        torch._dynamo.reset()
        x = inputs()[0].requires_grad_()
        y = torch.compile(model.train(), backend="falqon", options=dict[str, Any](config=EAGER))(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for plain, dropped in zip(*results, strict=True):
        # The same products, added up in another order: sums of at most 96 float32 products, four
        # layers deep, of which none is 100 times its result.
        torch.testing.assert_close(plain, dropped, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


def test_x_is_not_kept_for_what_does_not_train():
    model = calibrated(outliers=0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    kept: list[Any] = []

    def look(gm: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        result = falqon_fx.rewrite(gm, example, EAGER)
        op = torch.ops.falqon.merged_linear.default
        kept.extend(n.args[13] for n in result.gm.graph.find_nodes(op="call_function", target=op))
        return gm.forward

    torch.compile(model, backend=look)(inputs()[0])
    assert kept == [False] * 3
