"""The path of a GPU, on CPU: the same casts, with products by generated kernels (interpreted), by
the library or plain; against float64 on the same quantized operands.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx.kernels.products import dispatch
from falqon_fx.ops import gpu
from falqon_fx.site.numerics import E4M3
from tests.cuda import BF16, F32, GROUPS, INTERPRETED, ROW, TENSOR, as_on_a_gpu, group
from tests.lowered import check, expected, hat, run
from tests.parameters import each_value
from tests.sites import takes_row_scales
from tests.strategies import Case, cases

pytestmark = INTERPRETED


def check_on_gpu(case: Case) -> dict[str, Tensor]:
    """All results against float64. Kernels add up dL/dx in their own order, and some round in
    between: ``steps``.
    """
    wanted = expected(case, steps=True)
    with as_on_a_gpu():
        return check(case, wanted)


@given(case=cases(), kernel=st.sampled_from(["triton", "dequantize"]))
def test_results_equal_float64_on_the_same_quantized_operands(case: Case, kernel: str):
    case.spec = replace(case.spec, kernel=kernel)
    check_on_gpu(case)


@given(cases())
def test_adapters_are_cast_as_on_a_cpu(case: Case):
    """Bit for bit."""
    loras, wide = case.adapters, case.casts[0][2].dtype == F32 if case.adapters else False
    casts = [
        part
        for m in loras
        for part in gpu.proxy_update(
            [m.lora_a], [m.lora_b], [m.scaling], [], wide, str(case.spec), m.fixed
        )
    ]
    wanted = [tensor for cast in case.casts for tensor in cast]
    for ours, other in zip(casts, wanted, strict=True):
        assert (ours.dtype, ours.shape) == (other.dtype, other.shape)
        bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (ours, other)]
        assert torch.equal(*bits)


@each_value(
    name=list(GROUPS),
    spec={"row": ROW, "tensor": TENSOR},
    kernel=["triton", "dequantize", "scaled_mm"],
)
def test_every_kind_of_group_by_every_kernel(name, spec, kernel):
    if kernel == "scaled_mm" and spec.per_row and not takes_row_scales():
        pytest.skip("torch's _scaled_mm takes no row scales on CPU")
    actual = check_on_gpu(GROUPS[name](replace(spec, kernel=kernel)))
    assert actual["out_a"].is_contiguous()


@pytest.mark.parametrize("name", ["siblings, some frozen", "dropout"])
def test_by_inductors_templates(name):
    check_on_gpu(GROUPS[name](replace(TENSOR, kernel="inductor")))


def launched(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], int]]:
    """(outs, how many of them are O_A's) of each forward product."""
    found = []
    forward = dispatch.forward

    def seen(q, q_scale, pieces, a_pieces, *rest):
        found.append((tuple(len(piece.weight) for piece in pieces), a_pieces))
        return forward(q, q_scale, pieces, a_pieces, *rest)

    monkeypatch.setattr(dispatch, "forward", seen)
    gpu.merged_linear(case.arguments())
    return found


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("one adapter", [((16,), 1), ((48,), 0)]),
        ("a frozen layer", [((48,), 0)]),
        ("siblings, some frozen", [((16, 8), 2), ((48, 16), 0), ((32, 64), 0)]),
        ("several adapters", [((16, 8, 5, 16, 16, 3), 6), ((48, 32, 16), 0)]),
        ("dropout", [((16,), 1), ((8,), 1), ((16,), 1), ((48,), 0)]),
        ("b absent", [((48, 32, 16, 8), 2)]),
    ],
)
def test_siblings_share_their_launches(name, wanted, monkeypatch):
    """All O_A that read x in one, all O that add an adapter in one, all other O in one."""
    assert launched(GROUPS[name](ROW), monkeypatch) == wanted


def test_adapters_of_a_layer_need_not_stand_side_by_side():
    """Their order is that of ``owner``."""
    case = group(ROW, (48, (16, 8)), (32, (5,)))
    names = (
        "a",
        "a_scale",
        "b",
        "alpha",
        "clamped",
        "lora_a",
        "lora_b",
        "adapter_x",
        "owner",
        "scaling",
    )
    given, turned = case.arguments(), [2, 1, 0]
    columns = {name: column for name in names if (column := getattr(given, name))}
    moved: Any = {name: [column[j] for j in turned] for name, column in columns.items()}
    first, second, out_a, *_ = gpu.merged_linear(given._replace(**moved))
    wanted = gpu.merged_linear(case.arguments())
    of_a = wanted[2].split([16, 8, 5], dim=1)
    assert torch.equal(out_a, torch.cat([of_a[j] for j in turned], dim=1))
    assert torch.equal(second, wanted[1])
    expected(case)["y 0"].assert_holds(first)  # whose terms are added in another order


@pytest.mark.parametrize("spec", [ROW, TENSOR], ids=["row", "tensor"])
@pytest.mark.parametrize("name", ["one adapter", "dropout"])
def test_x_is_kept_in_fp8_where_a_trains_and_not_at_all_where_it_is_frozen(name, spec):
    case = GROUPS[name](spec)
    *_, out_a = gpu.merged_linear(replace(case, keep_x=False).arguments())
    assert out_a.shape[1] == sum(len(lora.lora_a) for lora in case.adapters)
    kept = gpu.merged_linear(case.arguments())[2:]
    read = [case.x if lora.x is None else lora.x for lora in case.adapters]
    read = read if case.apart else [case.x]
    assert len(kept) == 2 * len(read)
    for x, code, scale in zip(read, kept[::2], kept[1::2], strict=True):
        assert (code.dtype, scale.dtype) == (E4M3, F32)
        assert scale.shape == ((32, 1) if spec.per_row else ())
        assert torch.equal(code.double() * scale.double(), hat(x, E4M3, spec).value)


@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("name", ["siblings, some frozen", "dropout", "b absent"])
def test_no_tokens(name, kernel):
    case = GROUPS[name](replace(ROW, kernel=kernel))
    case.x = case.x.new_empty(2, 0, 64)
    for each in case.layers:
        each.grad = each.grad.new_empty(2, 0, len(each.weight))
    for lora in case.adapters:
        lora.x = None if lora.x is None else case.x.clone()
    with as_on_a_gpu():
        actual = run(case)
    assert actual["y 0"].shape == (2, 0, 48)
    assert actual["x"].shape == (2, 0, 64)
    gradients = [actual[n] for n in actual if re.fullmatch(r"[ab] \d", n)]
    assert len(gradients) == 2 * len(case.adapters)
    assert not any(grad.any() for grad in gradients)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("kernel", ["triton", "dequantize"])
def test_autocast_changes_nothing_inside_of_the_op(kernel, dtype):
    case = group(replace(ROW, kernel=kernel), (48, (16,)), (32, ()), out_dtype=F32)
    for each in case.layers:
        each.grad = each.grad.float()
    with as_on_a_gpu():
        wanted = run(case)
        with torch.autocast("cpu", dtype):
            for name, actual in run(case).items():
                assert torch.equal(actual, wanted[name]), name
