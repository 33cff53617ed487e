from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.cost import cards, variants
from falqon_fx.cost import model as cost
from falqon_fx.cost.cards import CARDS, Card
from falqon_fx.cost.variants import VARIANTS, Shape, symbolic
from tests.models import LoraLinear

H100 = cards.find("H100")
WITH_FP8 = [card for card in CARDS if card.has_fp8]
SIZES = st.integers(16, 2**14)
SHAPES = st.builds(
    Shape,
    n=st.just(1),
    features=SIZES,
    out=SIZES,
    rank=st.integers(0, 512),
    dtype=st.sampled_from(["bfloat16", "float32", "float16"]),
    adapter_dtype=st.sampled_from(["bfloat16", "float32"]),
    train_a=st.booleans(),
    train_b=st.booleans(),
    siblings=st.integers(1, 3),
    wide=st.sampled_from(["", "float32"]),
    compensate=st.integers(0, 64),
    outliers=st.integers(0, 64),
    integers=st.booleans(),
)
NUMERIC = Shape(96, 40, 56, 4)


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
    kernels = variants.lora(replace(NUMERIC, train_a=train_a))
    assert cost.flops(kernels, "forward") == forward.get_total_flops()
    assert cost.flops(kernels, "backward") == backward.get_total_flops()


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("train_a", [True, False])
def test_flops_of_the_op_are_those_that_torch_counts(rank, train_a):
    """Counted below the op: its lowering runs eagerly. Rank 0 is a frozen layer alone."""
    from torch.utils.flop_counter import FlopCounterMode

    from falqon_fx.ops import lowering
    from falqon_fx.ops.arguments import Merged
    from falqon_fx.site.base import cast_base
    from falqon_fx.site.spec import SiteSpec

    plan = SiteSpec.from_config(FalqonConfig())
    base = cast_base(torch.randn(56, 40), plan)
    a, b = [torch.randn(4, 40)] * bool(rank), [torch.randn(56, 4)] * bool(rank)
    casts = lowering.proxy_update(a, b, [2.0] * len(a), [], False, str(plan))
    x, grad = torch.randn(96, 40).bfloat16(), torch.randn(96, 56).bfloat16()
    of_a: tuple[Any, ...] = (a, b, [], [0] * len(a), [2.0] * len(a))
    adapters = (casts[0::3], casts[1::3], casts[2::3], [], [], *of_a)
    rest = (train_a, torch.bfloat16, str(plan))
    given: list[Any] = [x, [base.weight], [base.scale], [], *adapters, True, [], [], [], *rest[1:]]
    with FlopCounterMode(display=False) as forward:
        _, out_a, x_cast, x_scale = lowering.merged_linear(Merged(*given))
    with FlopCounterMode(display=False) as backward:
        wide = out_a.dtype
        d = [grad.to(wide) @ t.to(wide) for t in casts[2::3]]
        lowering.merged_linear_grad_x(
            [grad], [base.weight], [base.scale], d, casts[0::3], casts[1::3], *rest[1:]
        )
        for d_j in d:
            lowering.grad_b(grad, out_a, 2.0, torch.float32)
            if train_a:
                lowering.grad_a(d_j, x_cast, x_scale, torch.float32)
    for variant in (variants.merged, variants.emulated):
        kernels = variant(replace(NUMERIC, rank=rank, train_a=train_a))
        assert cost.flops(kernels, "forward") == forward.get_total_flops()
        assert cost.flops(kernels, "backward") == backward.get_total_flops()
        assert cost.flops(kernels) == cost.flops(
            variants.lora(replace(NUMERIC, rank=rank, train_a=train_a))
        )


@pytest.mark.parametrize("rank", [4, 0])
def test_a_calibration_adds_a_frozen_adapter_and_a_product_of_a_few_columns(rank):
    """x·A_cᵀ, O_c·B_cᵀ and back D_c = dO·B_c, D_c·A_c; (x - x̂)_S·W_Sᵀ. No optimizer has it."""
    plain = replace(NUMERIC, rank=rank, siblings=2)
    for variant in (variants.merged, variants.emulated):
        before, after = variant(plain), variant(replace(plain, compensate=6, outliers=5))
        added = {p: cost.flops(after, p) - cost.flops(before, p) for p in ("forward", "backward")}
        assert added["backward"] == 2 * 96 * 6 * (40 + 56)
        assert added["forward"] == added["backward"] + 2 * 96 * 5 * 56
        assert cost.moved(after, "update") == cost.moved(before, "update")
        assert cost.moved(after, "forward") > cost.moved(before, "forward")
    site = falqon_fx.explain(_calibrated(), torch.randn(3, 64)).sites[0]
    assert (site.compensate, site.outliers) == (4, 3)
    shape = cost.shape_of(site, cards.find("H100"))
    assert (shape.compensate, shape.outliers) == (4, 3)


def _calibrated() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).requires_grad_(False)
    asked: dict[str, Any] = {"calibration": [torch.randn(9, 64)], "compensate": 4, "outliers": 3}
    falqon_fx.prepare(model, progress=False, **asked)
    return model


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("phase", ["forward", "backward", "update", None])
def test_expressions_and_numbers_agree(name, phase):
    open_shape = symbolic()
    names = ("n", "features", "out", "rank")
    values = {getattr(open_shape, n): getattr(NUMERIC, n) for n in names}
    formulas, numeric = VARIANTS[name](open_shape), VARIANTS[name](NUMERIC)
    for measure in (cost.flops, cost.moved):
        expression = sympy.sympify(measure(formulas, phase))
        assert expression.free_symbols <= values.keys()
        assert float(expression.subs(values)) == float(measure(numeric, phase))
    time = sympy.sympify(cost.seconds(formulas, H100, phase)).subs(values)
    assert float(time) == pytest.approx(float(cost.seconds(numeric, H100, phase)), rel=1e-12)


def named(kernels: list[variants.Kernel]) -> dict[str, variants.Kernel]:
    return {kernel.name: kernel for kernel in kernels}


def test_bytes_of_a_layer_by_hand():
    """x, W and y once each; with the adapter in the epilogue O_A and s·B, too."""
    gemm = named(variants.lora(NUMERIC))["x·Wᵀ"]
    assert gemm.bytes == 2 * (96 * 40 + 56 * 40 + 96 * 56)
    fused = named(variants.merged(NUMERIC))["x·Wᵀ + s·O_A·Bᵀ"]
    assert fused.bytes == 96 * 40 + 56 * 40 + 2 * 96 * 56 + 2 * (96 * 4 + 56 * 4)
    assert (fused.flops, fused.added) == (2 * 96 * 40 * 56, 2 * 96 * 4 * 56)
    back = named(variants.merged(NUMERIC))["dO·W + D·A"]
    assert back.bytes == 96 * 56 + 56 * 40 + 2 * 96 * 40 + 2 * (96 * 4 + 4 * 40)


def test_a_frozen_a_costs_no_product_and_keeps_no_x():
    trained, frozen = (variants.merged(replace(NUMERIC, train_a=t)) for t in (True, False))
    assert named(trained)["cast x"].kept == 96 * 40  # one byte an element
    assert named(frozen)["cast x"].kept == 0
    assert named(trained).keys() - named(frozen).keys() == {"widen x", "dA"}
    assert cost.flops(trained) - cost.flops(frozen) == 2 * 96 * 40 * 4
    adam = [named(k)["AdamW"].bytes for k in (trained, frozen)]
    assert adam == [7 * 4 * 4 * (40 + 56), 7 * 4 * 4 * 56]


def test_a_frozen_layer_has_neither_casts_of_an_adapter_nor_an_optimizer():
    at = replace(NUMERIC, rank=0)
    assert [k.name for k in variants.merged(at)] == [
        "cast x",
        "x·Wᵀ + s·O_A·Bᵀ",
        "cast dO",
        "dO·W + D·A",
    ]
    assert cost.moved(variants.merged(at), "update") == 0
    for name, variant in VARIANTS.items():
        kept = sum(k.kept for k in variant(at))
        assert kept == (0 if name == "fp8_lora" else 2 * 96 * (56 + 40)), name


def test_new_memory_is_what_a_layer_keeps_or_hands_out_and_costs_its_page_faults():
    """In float32 beside bf16: y and dL/dx, O_A for dL/dB, and x for dL/dA: PEFT's wide copy, ours
    in one byte on FP8 units and else in bf16.
    """
    out, grad_x = 2 * 96 * 56, 2 * 96 * 40
    kept = {
        "lora": out + grad_x + 4 * 96 * (40 + 4),
        "emulated": out + grad_x + 2 * 96 * (40 + 4),
        "merged": out + grad_x + 96 * 40 + 2 * 96 * 4,
    }
    for name, count in kept.items():
        kernels = VARIANTS[name](NUMERIC)
        assert sum(k.kept for k in kernels) == count
        plain, faulting = (float(cost.seconds(kernels, replace(H100, fresh=f))) for f in (0.0, 1e9))
        assert faulting - plain == pytest.approx(count / 1e9, rel=1e-9)


def test_where_the_cpu_cannot_multiply_bf16_the_op_runs_in_float32():
    kernels = variants.emulated(replace(NUMERIC, wide="float32"))
    assert {k.dtype for k in kernels if k.flops != 0} == {"float32"}
    assert named(kernels)["decode W"].bytes == 40 * 56 * (1 + 4)
    assert {"narrow O", "narrow dx", "widen dO"} <= named(kernels).keys()
    kept = 2 * 96 * (56 + 40) + 4 * 96 * (40 + 4)
    assert sum(k.kept for k in kernels) == kept


def test_thin_products_move_their_bytes_at_the_rate_measured_for_them():
    card = replace(H100, launch=0.0, thin={"float32": H100.bandwidth / 4})
    kernels = {k.name: k for k in variants.lora(NUMERIC)}
    for name, factor in (("A", 4), ("cast x", 1), ("x·Wᵀ", 1)):  # the last is in bf16
        time = float(cost.seconds([kernels[name]], card))
        assert time == pytest.approx(factor * kernels[name].bytes / H100.bandwidth, rel=1e-12)


@pytest.mark.parametrize("variant", [variants.lora, variants.merged, variants.emulated])
def test_siblings_share_what_is_done_once(variant):
    """Three layers that share x: of the shared work each has a third, and the total never grows."""
    alone, third = (named(variant(replace(NUMERIC, siblings=s, adapted=s))) for s in (1, 3))
    assert third["cast x"].bytes == alone["cast x"].bytes / 3
    assert third["cast x"].launches == pytest.approx(1 / 3)
    assert cost.seconds([*third.values()], H100) < cost.seconds([*alone.values()], H100)
    assert cost.flops([*third.values()]) == cost.flops([*alone.values()])


def test_siblings_of_a_frozen_layer_are_not_all_adapted():
    """A's product reads x once for those of the siblings that have an adapter."""
    at = replace(NUMERIC, siblings=3, adapted=2)
    assert named(variants.merged(at))["x·Aᵀ"].bytes == 96 * 40 / 2 + 4 * 40 + 2 * 96 * 4


def test_it_takes_dynamos_symbols():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    tokens = env.create_unbacked_symint()
    total = cost.flops(variants.merged(replace(NUMERIC, n=tokens.node.expr)))
    (symbol,) = total.free_symbols
    assert total.subs(symbol, 96) == cost.flops(variants.merged(NUMERIC))


@pytest.mark.parametrize("card", WITH_FP8, ids=lambda card: card.name)
@pytest.mark.parametrize("size", [1024, 2048])
@pytest.mark.parametrize("train_a", [True, False])
def test_fp8_under_a_separate_lora_path_pays_late_and_the_rewrite_early(card, size, train_a):
    """The paper's finding, at its rank: casts of A, B and O_A eat what FP8 gains. The rewrite has
    to make up for its own launches alone.
    """
    shape = Shape(1, size, size, 64, adapter_dtype="bfloat16", train_a=train_a)
    separate = cost.break_even(variants.lora, variants.fp8_lora, shape, card)
    rewrite = cost.break_even(variants.lora, variants.merged, shape, card)
    assert separate is not None
    assert separate > 128
    assert rewrite is not None
    assert rewrite < separate / 5


CALIBRATED = replace(H100, casts=1e11, thin={"bfloat16": 1e12, "float32": 4e11}, fresh=1e11)


@given(
    SHAPES,
    st.sampled_from([*WITH_FP8, CALIBRATED]),
    st.sampled_from(["fp8_lora", "merged", "emulated"]),
)
def test_break_even_is_where_the_sign_changes(shape, card, name):
    after = VARIANTS[name]

    def gain(n: int) -> float:
        at = replace(shape, n=n)
        old, new = (float(cost.seconds(v(at), card)) for v in (variants.lora, after))
        return (old - new) / old

    # A sum of some twenty float64 terms; at an exact tie the sign is noise.
    noise = 1e-12
    found = cost.break_even(variants.lora, after, shape, card)
    many = [2**i for i in range(1, 40)]
    if found is None:
        assert gain(2**60) < noise
        return
    assert all(gain(n) >= -noise for n in [found, *(n for n in many if n >= found)])
    if found > 1:
        assert gain(found - 1) < noise


def test_break_even_by_brute_force():
    shape = Shape(1, 1024, 1024, 64, adapter_dtype="bfloat16")
    card = cards.find("RTX 4090")

    def loses(n: int) -> bool:
        at = replace(shape, n=n)
        return cost.seconds(variants.fp8_lora(at), card) > cost.seconds(variants.lora(at), card)

    last = max(n for n in range(1, 3000) if loses(n))
    assert cost.break_even(variants.lora, variants.fp8_lora, shape, card) == last + 1


def test_what_never_pays_has_no_break_even():
    slow = Card("slow cast", dict.fromkeys(("bfloat16", "float32"), 1e12), 1e12, 1e3, 0.0, {})
    assert cost.break_even(variants.lora, variants.emulated, NUMERIC, slow) is None


def test_a_card_without_fp8_units_is_refused_by_name():
    plain = Card("plain", dict.fromkeys(("bfloat16", "float32"), 1e12), 1e12, 0.0, 0.0, {})
    with pytest.raises(FalqonError, match="plain: has no float8 matrix units"):
        cost.seconds(variants.merged(NUMERIC), plain)


def test_a_prediction_adds_up():
    shape = Shape(1, 4096, 4096, 64)
    found = cost.predict(shape, "merged", H100, 2048)
    at = replace(shape, n=2048)
    assert found.seconds_before == float(cost.seconds(variants.lora(at), H100))
    assert found.seconds_after == float(cost.seconds(variants.merged(at), H100))
    assert found.flops_before == cost.flops(variants.lora(at))
    assert found.moved_after == cost.moved(variants.merged(at))
    assert found.speedup[2048] == found.gain


def test_every_figure_of_a_card_has_a_source():
    names = [card.name for card in WITH_FP8]
    assert names == ["RTX 4090", "L40S", "H100", "H200", "B200", "MI300X", "RTX 5090"]
    for card in CARDS:
        assert set(card.source) == {"flops", "bandwidth", "launch"}
        assert all(len(source) > 20 for source in card.source.values())
        # FP8 has twice bf16's rate on all of these (to the rounding of the datasheets), INT8 on
        # those for servers, and four times on others.
        if card.has_fp8:
            assert card.flops["float8"] / card.flops["bfloat16"] == pytest.approx(2, rel=0.02)
        if "int8" in card.flops:
            times = 4 if card.name.startswith("RTX") else 2
            assert card.flops["int8"] / card.flops["bfloat16"] == pytest.approx(times, rel=0.02)


def test_an_unknown_card_names_the_nearest():
    with pytest.raises(FalqonError, match="nearest is 'RTX 4090'"):
        cards.find("rtx4090")
    assert cards.find("rtx 4090").name == "RTX 4090"


def test_calibration_measures_and_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path / "sub"))
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


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"name": 5}}', "[" * 100_000])
def test_a_damaged_file_of_cards_is_named(text, monkeypatch, tmp_path):
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path))
    (tmp_path / "cards.json").write_text(text)
    with pytest.raises(FalqonError, match=r"cards\.json: it holds no cards .* Remove it"):
        cards.find("H100")


@pytest.mark.parametrize("value", [0, -1.0, True, "2", float("nan")])
def test_min_gain_must_be_a_positive_number(value):
    with pytest.raises(falqon_fx.FalqonConfigError, match="min_gain"):
        FalqonConfig(min_gain=value)


def test_integers_are_predicted_on_a_card_without_fp8():
    """O and O_A of an A100 in INT8; dL/dx of decoded weights, A's behind W's, in bf16. A CPU that
    has no units for them multiplies in float32.
    """
    model = torch.nn.Sequential(torch.nn.Linear(64, 96)).requires_grad_(False)
    config, x = FalqonConfig(base_dtype="int8", card="A100"), torch.randn(3, 64).bfloat16()
    (site,) = falqon_fx.explain(model.bfloat16(), x, config=config).sites
    assert site.cost is not None
    assert (site.cost.card, site.cost.variant) == ("A100", "merged")
    card = cards.find("A100")
    shape = replace(cost.shape_of(site, card), n=32, rank=4)
    kernels = {k.name: k for k in variants.merged(shape)}
    product, back = kernels["x·Wᵀ + s·O_A·Bᵀ"], kernels["[dO | D]·[W; A]"]
    assert (product.dtype, back.dtype) == ("int8", "bfloat16")
    assert back.flops == 2 * 32 * 64 * (96 + 4)
    assert kernels["decode W"].bytes == 64 * 96 * 3
    assert not [k for k in kernels.values() if k.dtype == "float8"]
    assert cost.flops([product]) == 2 * 32 * 96 * (64 + 4)
    fast = cost.seconds([replace(product, bytes=0, added=0)], card) - card.launch
    assert fast == pytest.approx(2 * 32 * 64 * 96 / 624e12)
    cpu = replace(card, flops={"bfloat16": 1e12, "float32": 5e11}, gpu=False, launch=0.0)
    assert cost.variant_of(site, cpu) == "emulated"
    (slow,) = [k for k in variants.emulated(shape) if k.name == "x·Wᵀ"]
    assert cost.seconds([replace(slow, bytes=0)], cpu) == pytest.approx(2 * 32 * 64 * 96 / 5e11)
    for name in ("forward", "backward"):
        assert cost.flops(variants.emulated(shape), name) == cost.flops(variants.lora(shape), name)
