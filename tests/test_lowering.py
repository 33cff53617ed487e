"""What the ops compute, against float64 on the same quantized operands and the layer itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx.ops import lowering
from falqon_fx.site.numerics import E4M3, E5M2
from falqon_fx.site.spec import SiteSpec
from tests.emulation import cast
from tests.lowered import (
    BF16,
    F32,
    NOTHING,
    added,
    check,
    expected,
    falqon,
    number,
    on_this_cpu,
    run,
)
from tests.sites import randn
from tests.strategies import cases
from tests.tolerances import Approx, fp8_cast_bound, side_by_side

BOTH = ("fp8", "int8")


def holds(wanted: Approx, actual: Tensor) -> None:
    shape = actual.shape
    Approx(wanted.value.reshape(shape), wanted.bound.reshape(shape)).assert_holds(actual)


@settings(max_examples=6 * settings.default.max_examples)
@given(cases(BOTH))
def test_results_equal_float64_on_the_same_quantized_operands(case):
    check(case, expected(case, dtype=on_this_cpu(case.out_dtype)))


@given(cases(BOTH))
def test_results_equal_float64_where_the_cpu_multiplies_no_bfloat16(case):
    """Then products are in float32, and b comes in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "native_bf16", lambda: False)
        assert all(b.dtype == F32 for _, _, b in case.casts)
        assert check(case, expected(case, dtype=F32))["out_a"].dtype == F32


@given(cases(BOTH), st.sampled_from([torch.bfloat16, torch.float16]))
def test_autocast_changes_nothing_inside_of_the_op(case, dtype):
    expected = run(case)
    with torch.autocast("cpu", dtype):
        del case.casts
        for name, actual in run(case).items():
            assert torch.equal(actual, expected[name]), name


@settings(max_examples=4 * settings.default.max_examples)
@given(cases(BOTH, corrected=False))
def test_results_equal_the_original_layer_within_the_fp8_casts(case):
    """The layer is x·Wᵀ + Σ s·(x·Aᵀ)·Bᵀ + bias. Its operands differ from those of the op by their
    casts: x, A and W by one to E4M3 or INT8, s·B by float32 and the dtype of the products, dL/dO by
    one to FP8 where it meets W in FP8. The rest is the arithmetic of the op.
    """
    spec, dtype = case.spec, on_this_cpu(case.out_dtype)
    own = expected(case, dtype=dtype)
    casts, wanted = iter(case.casts), {}

    def near(x: Tensor, scale: Tensor) -> Approx:
        return Approx(x.detach().double(), fp8_cast_bound(x.detach(), scale, spec.operand))

    def read(x: Tensor) -> Approx:
        x = x.detach().reshape(-1, x.shape[-1])
        return near(x, cast(x.float(), spec.operand, spec.per_row, spec.scale == "pow2")[1])

    x, grad_x, out_as, j = read(case.x), [], [], -1
    for i, layer in enumerate(case.layers):
        w, scale = near(layer.weight, layer.base.scale), layer.base.scale
        grad = layer.grad.reshape(-1, len(layer.weight))
        exact, y = Approx.exact(grad), x @ w.t()
        for lora in layer.adapters:
            j, (_, a_scale, _) = j + 1, next(casts)
            x_j = x if lora.x is None else read(lora.x)
            a = near(lora.lora_a, a_scale)
            b = (Approx.exact(lora.lora_b) * number(lora.scaling)).rounded(F32, dtype)
            out_a, d = x_j @ a.t(), exact @ b
            out_as.append(out_a)
            wanted[f"a {j}"] = d.t() @ x_j
            wanted[f"b {j}"] = (exact.t() @ out_a) * number(lora.scaling)
            if case.adds_b:
                y = y + out_a @ b.t()
                if lora.x is not None:
                    wanted[f"x {j}"] = d @ a
                elif layer.reached:
                    grad_x.append(d @ a)
        wanted[f"y {i}"] = y if layer.bias is None else y + Approx.exact(layer.bias)
        if layer.reached:
            if spec.base == "int8":
                grad_x.append(exact @ w)
                continue
            # q(dL/dO · s_W) / s_W: an error of the cast in units of its own scale.
            wide, fp8 = grad.float(), E5M2 if spec.grad == "e5m2" else E4M3
            rows = scale.t() if spec.per_row else torch.ones(1, 1)
            _, g_scale = cast(wide * rows, fp8, spec.per_row, spec.scale == "pow2")
            off = fp8_cast_bound(wide * rows, g_scale, fp8) / rows.double()
            grad_x.append(Approx(grad.double(), off) @ w)
    wanted["x"] = added(grad_x, torch.float64)
    wanted["out_a"] = side_by_side(out_as, 1) if out_as else own["out_a"]
    for name, actual in run(case).items():
        if not name.startswith("bias"):
            bound = wanted[name].bound + own[name].bound
            value = wanted[name].value.reshape(actual.shape)
            Approx(value, bound.reshape(actual.shape)).assert_holds(actual)


@given(cases(BOTH))
def test_the_adapters_are_cast_as_by_torch(case):
    """Â and its scale bit for bit; b = s·B rounded in float32, then to the dtype asked for. Behind
    both, what a calibration has made.
    """
    for lora, (code, scale, b) in zip(case.adapters, case.casts, strict=True):
        value = torch.cat([lora.lora_a.float(), *(t.float() for t in lora.fixed.error_a)])
        lacking = lora.rank - len(value)
        value = torch.cat([value, torch.zeros(lacking, value.shape[1])])
        spec = case.spec
        codes, wanted = cast(value, spec.operand, spec.per_row, spec.scale == "pow2")
        assert (code.dtype, scale.dtype) == (spec.operand, F32)
        assert torch.equal(code.float(), codes)
        assert torch.equal(scale, wanted)
        zeros = torch.zeros(len(b), lacking)
        parts = [lora.lora_b.float() * lora.scaling, *lora.fixed.error_b, zeros]
        parts += lora.fixed.columns
        assert torch.equal(b, torch.cat([part.to(b.dtype) for part in parts], dim=1))


def test_the_adapters_of_a_graph_are_cast_together_and_apart_from_autograd():
    """In one op, whatever their shapes; gradients reach A and B through the products alone."""
    a = [randn(3, 8).requires_grad_(), randn(5, 6, seed=1).bfloat16().requires_grad_()]
    b = [randn(4, 3, seed=2).requires_grad_(), randn(7, 5, seed=3).requires_grad_()]
    spec = str(SiteSpec("row", "pow2", "e5m2"))
    casts = falqon.proxy_update(a, b, [2.0, 0.5], *NOTHING, False, spec)
    assert [t.dtype for t in casts] == [E4M3, F32, BF16] * 2
    assert [tuple(t.shape) for t in casts] == [(3, 8), (3, 1), (4, 3), (5, 6), (5, 1), (7, 5)]
    assert not any(t.requires_grad for t in casts)
    first = falqon.proxy_update(a[:1], b[:1], [2.0], *NOTHING, False, spec)
    second = falqon.proxy_update(a[1:], b[1:], [0.5], *NOTHING, False, spec)
    alone = [*first, *second]
    assert all(torch.equal(s.float(), t.float()) for s, t in zip(casts, alone, strict=True))
