"""What the ops compute, against float64 on the same quantized operands and the layer itself."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from torch import Tensor

from falqon_fx.numerics import E4M3
from tests.sites import cast, cast_scale, dequantized
from tests.strategies import Case, cases, siblings
from tests.tolerances import Approx, fp8_cast_bound, rounded_bound

F32, BF16 = torch.float32, torch.bfloat16


def run(case: Case) -> dict[str, Tensor]:
    """The op for one site, and its gradients."""
    state, x = case.site.state, case.x.detach().requires_grad_()
    lora_b = case.site.lora_b.detach().requires_grad_()
    bias = None if case.bias is None else case.bias.detach().requires_grad_()
    y, out_a = torch.ops.falqon.merged_linear(
        x,
        [state.weight],
        [state.scale],
        [state.applied],
        [lora_b],
        [] if bias is None else [bias],
        [state.scaling],
        case.out_dtype,
        str(state.plan),
    )
    inputs = [x, lora_b] if bias is None else [x, lora_b, bias]
    grads = torch.autograd.grad(y, inputs, case.grad)
    for given_, grad in zip(inputs, grads, strict=True):
        assert (grad.shape, grad.dtype) == (given_.shape, given_.dtype)
    assert (y.shape, y.dtype) == ((*x.shape[:-1], len(state.applied)), case.out_dtype)
    names = ("grad_x", "grad_b", "grad_bias")
    return {"y": y, "out_a": out_a, **dict(zip(names, grads, strict=False))}


def pending(case: Case, dtype: torch.dtype) -> Approx:
    """scaling · (B - applied): difference, scaling (itself a float32) and product round, then the
    cast to the GEMM's dtype.
    """
    state = case.site.state
    exact = (case.site.lora_b.double() - state.applied.double()) * state.scaling
    return Approx.exact(exact).rounded(F32, F32, F32, dtype)


def expected(case: Case) -> dict[str, Approx]:
    """Each result on the operands that the op really multiplies, and its roundings one by one."""
    state, plan = case.site.state, case.site.state.plan
    out = len(state.applied)
    dtype = BF16 if case.out_dtype == BF16 else F32  # what the GEMMs return
    pow2 = plan.scale == "pow2"  # such scales go into bf16 operands exactly, others behind the GEMM
    scales = () if pow2 else (F32, F32, dtype)
    flat = case.x.reshape(-1, case.x.shape[-1]).float()
    grad = case.grad.reshape(-1, out)
    weight = Approx.exact(dequantized(state))
    w, a = (Approx.exact(part) for part in weight.value.split([out, state.rank]))

    x_hat = Approx.exact(cast(flat, E4M3, plan))
    y = (x_hat @ w.t()).rounded(dtype, *scales)
    out_a = (x_hat @ a.t()).rounded(dtype, *scales)
    if plan.pending == "apply":
        y = y.addmm(out_a, pending(case, dtype).t(), dtype)
    if case.bias is not None:
        y = (y + Approx.exact(case.bias).rounded(dtype)).rounded(dtype)

    wide, codes = grad.float(), state.weight.double()
    if plan.per_row:
        wide = wide * state.scale[:out].t()
    grad_hat = Approx.exact(cast(wide, plan.grad_dtype, plan))
    scale_grad = () if pow2 else (F32, F32, dtype)
    grad_x = (grad_hat @ (Approx.exact(codes[:out]) if plan.per_row else w)).rounded(
        dtype, *scale_grad
    )
    if plan.pending == "apply":
        # The scales of A join the product of r columns, unless they are in dq(A) exactly.
        tail = (Approx.exact(grad) @ pending(case, dtype)).rounded(dtype)
        if plan.per_row or not pow2:
            a_scale = state.scale[out:].t() if plan.per_row else state.scale
            tail = (tail * Approx.exact(a_scale)).rounded(F32, dtype)
            grad_x = grad_x.addmm(tail, Approx.exact(codes[out:]), dtype)
        else:
            grad_x = grad_x.addmm(tail, a, dtype)

    product = (Approx.exact(grad).t() @ out_a).rounded(dtype)
    scaling = Approx.exact(torch.tensor(state.scaling)).rounded(F32)
    grad_b = (product * scaling).rounded(F32, case.site.lora_b.dtype)
    ones = torch.ones(1, len(grad))
    grad_bias = Approx.exact(ones) @ Approx.exact(grad)
    return {
        "y": y.rounded(case.out_dtype),
        "out_a": out_a,
        "grad_x": grad_x.rounded(case.x.dtype),
        "grad_b": grad_b,
        "grad_bias": Approx(grad_bias.value[0], grad_bias.bound[0]),
    }


@settings(max_examples=4 * settings.default.max_examples)
@given(cases())
def test_results_equal_float64_on_the_same_quantized_operands(case):
    wanted = expected(case)
    for name, actual in run(case).items():
        result = wanted[name]
        if name == "grad_bias":
            result = result.rounded(case.bias.dtype)
        Approx(result.value.reshape(actual.shape), result.bound.reshape(actual.shape)).assert_holds(
            actual
        )


@settings(max_examples=4 * settings.default.max_examples)
@given(cases())
def test_results_equal_the_original_layer_within_the_fp8_casts(case):
    """The layer is x (W + s·B·A)ᵀ + bias, with the part of B that counts: all of it with
    pending="apply", else what is applied. Its operands differ from those of the op by their casts.
    """
    site, state = case.site, case.site.state
    plan, out, s = state.plan, len(state.applied), state.scaling
    applied, b = state.applied.double(), site.lora_b.double()
    counts = b if plan.pending == "apply" else applied
    base, lora_a = site.base.double(), site.lora_a.double()
    weight = base + s * counts @ lora_a
    x = case.x.reshape(-1, case.x.shape[-1]).double()
    grad = case.grad.reshape(-1, out).double()

    # dq(W') against W + s·applied·Â by its cast; Â against A by its own; float32 sums in between.
    w_scale, a_scale = state.scale.expand(out + state.rank, 1).split([out, state.rank])
    a_off = fp8_cast_bound(lora_a, a_scale, E4M3)
    merged = Approx(base, torch.zeros_like(base)) + (
        Approx.exact(s * applied).rounded(F32) @ Approx(lora_a, a_off)
    )
    merged = merged.rounded(F32)
    w_off = merged.bound + fp8_cast_bound(merged.largest, w_scale, E4M3)
    w_off = w_off + abs(s) * (counts - applied).abs() @ a_off
    x_off = fp8_cast_bound(x, cast_scale(x.float(), E4M3, plan).double(), E4M3)
    x_near, w_near, a_near = Approx(x, x_off), Approx(weight, w_off), Approx(lora_a, a_off)

    per_row = state.scale[:out].t() if plan.per_row else torch.ones(1, 1)
    wide = grad.float() * per_row
    wide_off = fp8_cast_bound(wide, cast_scale(wide, plan.grad_dtype, plan), plan.grad_dtype)
    g_off = wide_off / per_row.double()

    # The casts' part; the arithmetic's part is what the test above allows.
    own = expected(case)
    y = x_near @ w_near.t()
    if case.bias is not None:
        y = y + Approx.exact(case.bias)
    out_a = x_near @ a_near.t()
    # With "apply", the pending part of dL/dx takes dL/dO without its cast; the bound gives it one.
    grad_x = Approx(grad, g_off) @ w_near
    grad_b = (Approx.exact(grad).t() @ out_a) * Approx.exact(torch.tensor(s, dtype=torch.float64))
    actual = run(case)
    for name, near in {"y": y, "grad_x": grad_x, "grad_b": grad_b}.items():
        shape, bound = actual[name].shape, near.bound + own[name].bound
        Approx(near.value.reshape(shape), bound.reshape(shape)).assert_holds(actual[name])


@settings(max_examples=2 * settings.default.max_examples)
@given(siblings())
def test_siblings_equal_the_sites_alone_up_to_the_order_of_sums(cases):
    """One op for all sites that read x: O and dL/dB as the sites alone, dL/dx their sum."""
    (plan,) = {case.site.state.plan for case in cases}
    x = cases[0].x.detach().requires_grad_()
    lora_b = [case.site.lora_b.detach().requires_grad_() for case in cases]
    biases = [case.bias.detach().requires_grad_() for case in cases if case.bias is not None]
    states = [case.site.state for case in cases]
    *ys, out_a = torch.ops.falqon.merged_linear(
        x,
        *([state.tensors[i] for state in states] for i in range(3)),
        lora_b,
        biases,
        [state.scaling for state in states],
        cases[0].out_dtype,
        str(plan),
    )
    wanted = [expected(case) for case in cases]
    for y, own in zip(ys, wanted, strict=True):
        Approx(own["y"].value.reshape(y.shape), own["y"].bound.reshape(y.shape)).assert_holds(y)
    for part, own in zip(out_a.split([s.rank for s in states], dim=1), wanted, strict=True):
        own["out_a"].assert_holds(part)

    inputs = [x, *lora_b, *biases]
    grads = torch.autograd.grad(ys, inputs, [case.grad for case in cases])
    for grad, own in zip(grads[1:], wanted):
        own["grad_b"].assert_holds(grad)
    for grad, own, case in zip(grads[1 + len(cases) :], wanted, cases):
        own["grad_bias"].rounded(case.bias.dtype).assert_holds(grad)
    # A buffer that several products are added to is rounded after each of them, at a size that is
    # below the sum of their sizes.
    dtype = BF16 if cases[0].out_dtype == BF16 else F32
    largest = torch.stack([own["grad_x"].largest for own in wanted]).sum(0)
    total = Approx(
        torch.stack([own["grad_x"].value for own in wanted]).sum(0),
        torch.stack([own["grad_x"].bound for own in wanted]).sum(0),
    )
    steps = 2 * len(cases)
    bound = total.bound + steps * rounded_bound(largest, torch.zeros_like(largest), dtype)
    Approx(total.value, bound).rounded(x.dtype).assert_holds(grads[0].reshape(total.value.shape))
