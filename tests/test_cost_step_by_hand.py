"""The parts of a training step, computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from falqon_fx.cost.step.launches import Timer
from falqon_fx.cost.step.whole import arithmetic, layer_of
from tests.costs import H100, OURS_WIN, STEP

THEIRS_WIN = ["own_gemm=1", "summed_gemm=1"]


def us(read_and_written: float, share: float = 1.0) -> float:
    """2.8 TB/s, and 2.5 us from a kernel to the next."""
    return read_and_written / (2.8e6 * share) + 2.5


MIB = 2**20
WAVE = 2 * 128 * 256 * 132  # FLOPs of a wave, a column of K
BF16, FP8 = 755e6 * 12 * 132 / 1536, 1215e6 * 4 * 132 / 512  # FLOP/us with full waves


def test_each_part_by_hand():
    """LLaMA-7B, 4096 tokens, rank 64: 512 tiles of 4096 x 4096 are 4 waves, 1376 of 4096 x 11008
    are 11.
    """
    runs = arithmetic(STEP, H100.given(OURS_WIN))
    of_layer = {
        name: {part: 1e6 * t / 32 for part, t in run.seconds.items()} for name, run in runs.items()
    }
    peft, nf4, ours = of_layer["peft"], of_layer["nf4"], of_layer["falqon"]
    # Eight of 4096 x 4096; forward of gate and up, dL/dx of down; and the other three.
    square, wide = 4 * 4096 * WAVE / BF16, 11 * 4096 * WAVE / BF16
    deep = 4 * 11008 * WAVE / BF16
    assert peft["products"] == pytest.approx(8 * square + 3 * wide + 3 * deep + 14 * 2.5)
    h, i, r, w, v = 32 * MIB, 86 * MIB, MIB / 2, MIB / 2, 11008 * 64 * 2
    linears = [(h, h, w, w)] * 4 + [(h, i, w, v)] * 2 + [(i, h, v, w)]
    adapter = sum(
        us(x + a + r, 0.69)
        + us(r + b + y)
        + us(y + b + r, 0.69)
        + us(r + a + x)
        + us(y + r + b, 0.69)
        + us(x + r + a, 0.69)
        for x, y, a, b in linears
    )
    assert peft["adapter"] == pytest.approx(adapter)
    passes: list[float] = [
        2 * h,
        3 * h,
        6 * h,
        5 * h,
        7 * i,
        4 * h,
        2 * h,
        8 * i,
        10 * h,
        3 * h,
        2 * h,
        6 * h,
    ]
    assert peft["elementwise"] == pytest.approx(sum(map(us, [*passes, 9 * h])))
    flops = 2 * 4096 * 4096 * 4096
    attention = flops / 319e6 + 2.5 * flops / (310e6 * 319 / 368) + 2 * 2.5
    for run in of_layer.values():
        assert run["attention"] == pytest.approx(attention)
        assert run["host"] == 0
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    dequantize = 2 * (weights * 2.5625 / (2.8e6 * 0.85) + 7 * 2.5)
    assert nf4["dequantize"] == pytest.approx(dequantize)

    assert ours["transposes"] == pytest.approx(2 * weights / 2.8e6 + 4 * 2.5)
    a, b = 64 * 35584, 64 * 42496
    casts = us(5 * a + 6 * b) + 3 * us(1.5 * h)
    assert ours["casts"] == pytest.approx(casts)
    passes = [1.5 * h, 4 * h, 2.5 * h, 2.5 * i, 4 * h, 8 * i, 5.5 * h, 5 * h, 4 * h]
    assert ours["elementwise"] == pytest.approx(sum(map(us, passes)))
    assert ours["sums"] == 0

    # 32000 columns are 125 tiles of 256, and 4000 tiles 31 waves.
    head = 31 * 4096 * WAVE / BF16 + 4 * 32000 * WAVE / BF16 + 5 + us(6 * 2 * 4096 * 32000)
    assert 1e6 * runs["peft"].seconds["head"] == pytest.approx(head)
    assert 1e6 * runs["falqon"].seconds["optimizer"] == pytest.approx(us(28 * 32 * (a + b)))
    assert 1e6 * runs["falqon_frozen_a"].seconds["optimizer"] == pytest.approx(us(28 * 32 * b))
    assert 1e6 * runs["peft"].seconds["optimizer"] == pytest.approx(us(14 * 32 * (a + b)))


def test_the_adapter_by_hand():
    """Of o_proj: x·Aᵀ is 32 steps of 128 of K, dL/dB and dL/dA are 8 parts each."""
    x, ranks, side = 32 * MIB, MIB / 2, 4096 * 64
    skinny = max(32 * 0.23, (x / 2 + side + ranks) / 2.8e6) + 2.5
    d = us(x + 2 * side + ranks, 0.69)
    of_b, of_a = us(x + ranks + 8 * 4 * side, 0.69), us(x / 2 + ranks + 8 * 4 * side, 0.69)
    sums = us(9 * 4 * 2 * side)
    scale = us(3 * ranks)
    done = _of_group(layer_of("falqon", STEP, Timer(H100.given(OURS_WIN))), 1, 7)
    assert 1e6 * done == pytest.approx(skinny + d + of_b + of_a + sums + scale)


def test_rounds_of_the_skinny_product():
    """384 programs, two for each of 132 processors at a time."""
    one = Timer(H100.given(["skinny_step=1"])).skinny("x A'", 8192, 4096, 3, 64)
    assert one.seconds == pytest.approx(2 * 32)


def _of_group(layer: list[Any], group: int, launches: int) -> float:
    """The seconds of a group's adapter: of ``launches``, one is the product's, which isn't it."""
    own = [one for one in layer if one.part == "adapter"]
    each = len(own) // 4
    assert each == launches - 1
    return float(sum(one.seconds for one in own[group * each : (group + 1) * each]))


def test_both_lowerings_by_hand():
    """4096 x 4096 in tiles of 128 x 128 are 1024, 8 waves; by the library in 4 of twice the size.
    The library's results take two passes more for the adapter, those of siblings a sum.
    """
    wave = WAVE / 2
    figures = H100.given(["own_gemm=7e14", "summed_gemm=6e14"])
    layer = layer_of("falqon", STEP, Timer(figures.given(["fp8_gemm=1"])))
    products = [1e6 * one.seconds - 2.5 for one in layer if one.part == "products"]
    assert products[0] == pytest.approx(24 * (4096 + 128) * wave / 7e8)  # q, k, v
    assert products[1] == pytest.approx(8 * (3 * 4096 + 3 * 128) * wave / 6e8)  # their dL/dx
    assert products[2] == pytest.approx(8 * (4096 + 128) * wave / 7e8)  # o

    layer = layer_of("falqon", STEP, Timer(H100.given(THEIRS_WIN)))
    products = [1e6 * one.seconds - 2.5 for one in layer if one.part == "products"]
    assert products[:6] == pytest.approx([4 * 4096 * WAVE / FP8] * 6)
    added = [one for one in layer if one.name == "addmm (library)"]
    assert 1e6 * added[0].seconds == pytest.approx(us(2 * 32 * MIB + MIB / 2))
    (of_three, of_two) = (one for one in layer if one.name == "of dL/dx")
    assert 1e6 * of_three.seconds == pytest.approx(us(4 * 32 * MIB))
    assert 1e6 * of_two.seconds == pytest.approx(us(3 * 32 * MIB))

    planned = layer_of("falqon", replace(STEP, adapter_dtype="fp8"), Timer(H100))
    products = [1e6 * one.seconds - 2.5 for one in planned if one.part == "products"]
    assert products[0] == pytest.approx(12 * (4096 + 192) * WAVE / FP8)
    assert products[1] == pytest.approx(4 * (3 * 4096 + 192) * WAVE / FP8)
    assert len(products) == 8
