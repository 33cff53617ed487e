from __future__ import annotations

import json
from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.passes import cards, cost
from falqon_fx.passes.cards import CARDS, Card
from falqon_fx.passes.cost import IN, OUT, VARIANTS, K, N, R, Shape
from tests.models import LoraLinear

H100 = cards.find("H100")
SIZES = st.integers(16, 2**14)
SHAPES = st.builds(
    Shape,
    n=st.just(1),
    features=SIZES,
    out=SIZES,
    rank=st.integers(1, 512),
    rows=st.integers(1, 16),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    adapter_dtype=st.sampled_from(["bfloat16", "float32"]),
    pending=st.booleans(),
    train_a=st.booleans(),
)
NUMBERS = {N: 96, IN: 40, OUT: 56, R: 4, K: 10}
NUMERIC = Shape(96, 40, 56, 4, 10)


@pytest.mark.parametrize("train_a", [True, False])
def test_flops_of_lora_are_those_that_torch_counts(train_a):
    """torch's own counter, on the module that PEFT's layer is."""
    from torch.utils.flop_counter import FlopCounterMode

    layer = LoraLinear(40, 56)
    layer.lora_A.weight.requires_grad_(train_a)
    x = torch.randn(96, 40, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    kernels = cost.lora(replace(NUMERIC, train_a=train_a))
    assert cost.flops(kernels, "forward") == forward.get_total_flops()
    assert cost.flops(kernels, "backward") == backward.get_total_flops()


@pytest.mark.parametrize("pending", ["apply", "hold"])
def test_flops_of_the_merged_op_are_those_that_torch_counts(pending):
    """Counted below the op: its lowering runs eagerly."""
    from torch.utils.flop_counter import FlopCounterMode

    from falqon_fx import lowering
    from tests.sites import make_site, spec

    site = make_site(56, 40, 4, dtype=torch.bfloat16, pending=pending)
    state = site.state
    x, grad = torch.randn(96, 40).bfloat16(), torch.randn(96, 56).bfloat16()
    tensors = [[t] for t in (*state.tensors[:3], site.lora_b)]
    with FlopCounterMode(display=False) as forward:
        lowering.merged_linear(x, *tensors, [], [2.0], torch.bfloat16, spec(site))
    with FlopCounterMode(display=False) as grad_x:
        lowering.merged_linear_grad_x([grad], *tensors, [2.0], torch.bfloat16, spec(site))
    grad_b = 2 * 96 * 56 * 4
    for variant in (cost.merged, cost.emulated):
        kernels = variant(replace(NUMERIC, pending=pending == "apply"))
        assert cost.flops(kernels, "forward") == forward.get_total_flops()
        assert cost.flops(kernels, "backward") == grad_x.get_total_flops() + grad_b


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("phase", ["forward", "backward", "update", None])
def test_expressions_and_numbers_agree(name, phase):
    symbolic, numeric = VARIANTS[name](Shape()), VARIANTS[name](NUMERIC)
    for measure in (cost.flops, cost.moved):
        expression = sympy.sympify(measure(symbolic, phase))
        assert expression.free_symbols <= {N, IN, OUT, R, K}
        assert float(expression.subs(NUMBERS)) == float(measure(numeric, phase))
    time = sympy.sympify(cost.seconds(symbolic, H100, phase)).subs(NUMBERS)
    assert float(time) == pytest.approx(float(cost.seconds(numeric, H100, phase)), rel=1e-12)


def test_bytes_of_a_layer_by_hand():
    """One GEMM: x, W and y once each, in bf16."""
    gemm = next(k for k in cost.lora(NUMERIC) if k.name == "x·Wᵀ")
    assert gemm.bytes == 2 * (96 * 40 + 56 * 40 + 96 * 56)
    fused = next(k for k in cost.merged(NUMERIC) if k.name == "x·W'ᵀ")
    assert fused.bytes == 96 * 40 + 60 * 40 + 2 * 96 * 60
    assert fused.flops == 2 * 96 * 40 * 60


def test_new_memory_is_what_a_layer_keeps_or_hands_out_and_costs_its_page_faults():
    """In float32 beside bf16: y and dL/dx, and PEFT's wide copy of x."""
    out, grad_x, wide_x = 2 * 96 * 56, 2 * 96 * 40, 4 * 96 * 40
    kept = {"lora": out + grad_x + wide_x, "emulated": out + grad_x, "merged": out + grad_x}
    for name, count in kept.items():
        kernels = VARIANTS[name](NUMERIC)
        assert sum(k.kept for k in kernels) == count
        plain, faulting = (float(cost.seconds(kernels, replace(H100, fresh=f))) for f in (0.0, 1e9))
        assert faulting - plain == pytest.approx(count / 1e9, rel=1e-9)


def test_thin_products_move_their_bytes_at_the_rate_measured_for_them():
    card = replace(H100, launch=0.0, thin={"float32": H100.bandwidth / 4})
    kernels = {k.name: k for k in cost.lora(NUMERIC)}
    for name, factor in (("A", 4), ("cast x", 1), ("x·Wᵀ", 1)):  # the last is in bf16
        time = float(cost.seconds([kernels[name]], card))
        assert time == pytest.approx(factor * kernels[name].bytes / H100.bandwidth, rel=1e-12)


def test_siblings_share_one_cast_of_x():
    alone, third = (
        cost.moved([k for k in cost.merged(replace(NUMERIC, siblings=s)) if k.name == "cast x"])
        for s in (1, 3)
    )
    assert third == alone / 3


def test_it_takes_dynamos_symbols():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    tokens = env.create_unbacked_symint()
    total = cost.flops(cost.merged(replace(NUMERIC, n=tokens.node.expr)))
    (symbol,) = total.free_symbols
    assert total.subs(symbol, 96) == cost.flops(cost.merged(NUMERIC))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("size", [1024, 2048])
@pytest.mark.parametrize("train_a", [True, False])
def test_a_separate_lora_path_in_fp8_loses_below_some_size_and_merged_does_not(card, size, train_a):
    """The paper's finding, at its rank and with its update (k = 10, nothing applied in between)."""
    shape = Shape(1, size, size, 64, 10, adapter_dtype="bfloat16", pending=False, train_a=train_a)
    separate = cost.break_even(cost.lora, cost.fp8_lora, shape, card)
    assert separate is None or separate > 128
    assert cost.break_even(cost.lora, cost.merged, shape, card) == 1


CALIBRATED = replace(H100, casts=1e11, thin={"bfloat16": 1e12, "float32": 4e11}, fresh=1e11)


@given(
    SHAPES,
    st.sampled_from([*CARDS, CALIBRATED]),
    st.sampled_from(["fp8_lora", "merged", "emulated"]),
)
def test_break_even_is_where_the_sign_changes(shape, card, name):
    after = VARIANTS[name]

    def gain(n: int) -> float:
        at = replace(shape, n=n)
        old, new = (float(cost.seconds(v(at), card)) for v in (cost.lora, after))
        return (old - new) / old

    # A sum of some twenty float64 terms; at an exact tie the sign is noise.
    noise = 1e-12
    found = cost.break_even(cost.lora, after, shape, card)
    many = [2**i for i in range(1, 40)]
    if found is None:
        assert gain(2**60) < noise
        return
    assert all(gain(n) >= -noise for n in [found, *(n for n in many if n >= found)])
    if found > 1:
        assert gain(found - 1) < noise


def test_break_even_by_brute_force():
    shape = Shape(1, 1024, 1024, 64, 10, adapter_dtype="bfloat16", pending=False)
    card = cards.find("RTX 4090")

    def loses(n: int) -> bool:
        at = replace(shape, n=n)
        return cost.seconds(cost.fp8_lora(at), card) > cost.seconds(cost.lora(at), card)

    last = max(n for n in range(1, 3000) if loses(n))
    assert cost.break_even(cost.lora, cost.fp8_lora, shape, card) == last + 1


def test_what_never_pays_has_no_break_even():
    slow = Card("slow cast", dict.fromkeys(("bfloat16", "float32"), 1e12), 1e12, 1e3, 0.0, {})
    assert cost.break_even(cost.lora, cost.emulated, NUMERIC, slow) is None


def test_a_card_without_fp8_units_is_refused_by_name():
    plain = Card("plain", dict.fromkeys(("bfloat16", "float32"), 1e12), 1e12, 0.0, 0.0, {})
    with pytest.raises(FalqonError, match="plain: has no float8 matrix units"):
        cost.seconds(cost.merged(NUMERIC), plain)


def test_a_prediction_adds_up():
    shape = Shape(1, 4096, 4096, 64, 10)
    found = cost.predict(shape, "merged", H100, 2048)
    at = replace(shape, n=2048)
    assert found.seconds_before == float(cost.seconds(cost.lora(at), H100))
    assert found.seconds_after == float(cost.seconds(cost.merged(at), H100))
    assert found.flops_before == cost.flops(cost.lora(at))
    assert found.moved_after == cost.moved(cost.merged(at))
    assert found.speedup[2048] == found.gain


def test_every_figure_of_a_card_has_a_source():
    names = [card.name for card in CARDS]
    assert names == ["RTX 4090", "L40S", "H100", "H200", "B200", "MI300X", "RTX 5090"]
    for card in CARDS:
        assert card.has_fp8
        assert set(card.source) == {"flops", "bandwidth", "launch"}
        assert all(len(source) > 20 for source in card.source.values())
        # FP8 has twice bf16's rate on all of these (to the rounding of the datasheets).
        assert card.flops["float8"] / card.flops["bfloat16"] == pytest.approx(2, rel=0.02)


def test_an_unknown_card_names_the_nearest():
    with pytest.raises(FalqonError, match="nearest is 'RTX 4090'"):
        cards.find("rtx4090")
    assert cards.find("rtx 4090").name == "RTX 4090"


def test_calibration_measures_and_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("FALQON_CARDS", str(tmp_path / "sub" / "cards.json"))
    cpu = torch.device("cpu")
    assert cards.at_hand(cpu) is None
    measured = cards.calibrate(cpu, size=128, repeats=1)
    assert measured.name == cards.device_name(cpu)
    assert cards.at_hand(cpu) == cards.find(measured.name) == measured
    assert not measured.has_fp8
    rates = [*measured.flops.values(), measured.bandwidth, measured.casts, measured.launch]
    rates += measured.thin.values()
    assert all(rate > 0 for rate in rates)
    assert json.loads((tmp_path / "sub" / "cards.json").read_text()).keys() == {measured.name}
    x = torch.randn(3, 32)
    (site,) = falqon_fx.explain(LoraLinear(32, 48), x).sites
    assert site.cost is not None
    assert site.cost.card == measured.name
    assert site.cost.variant == "emulated"
    with pytest.raises(FalqonError, match="can't be measured"):
        cards.calibrate(torch.device("meta"))


@pytest.mark.parametrize("value", [0, -1.0, True, "2", float("nan")])
def test_min_gain_must_be_a_positive_number(value):
    with pytest.raises(falqon_fx.FalqonConfigError, match="min_gain"):
        FalqonConfig(min_gain=value)
