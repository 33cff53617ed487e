"""Second derivatives, and the prepared layer by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from falqon_fx import FalqonError
from falqon_fx.ops import lowering
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests.layers import BF16, F16, F32, base_args, case, falqon, layer, rows_args
from tests.sites import dequantized, make_site, randn
from tests.tolerances import Approx, gamma

# -- second derivatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sum", "square"])
@pytest.mark.parametrize("of", ["x", "a 0", "b 0", "bias 0"])
def test_first_gradients_are_right_with_create_graph_and_second_ones_are_refused(of, loss):
    """Those of a sum too: dL/dO is constant there, but dL/dx depends on B, and dL/dB on x."""
    given = case(randn(3, 40), layer(bias=True))
    leaves = given.leaves()

    def value() -> Tensor:
        y = falqon.merged_linear(*given.arguments())[0]
        return y.square().sum() if loss == "square" else y.sum()

    (plain,) = torch.autograd.grad(value(), leaves[of])
    (grad,) = torch.autograd.grad(value(), leaves[of], create_graph=True)
    assert torch.equal(grad, plain)
    with pytest.raises(FalqonError, match="second derivatives"):
        (value() + grad.square().sum()).backward()


def test_a_layer_that_trains_nothing_is_linear_in_x():
    """dL/dx = q(dL/dO)·W is a constant where dL/dO is: its derivative is rightly none."""
    given = case(randn(3, 40), layer(ranks=()))
    x = given.x.requires_grad_()
    (grad,) = torch.autograd.grad(
        falqon.merged_linear(*given.arguments())[0].sum(), x, create_graph=True
    )
    assert not grad.requires_grad
    y = falqon.merged_linear(*given.arguments())[0].square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(FalqonError, match="second derivatives"):
        grad.sum().backward()


class Two(nn.Module):
    """A gradient penalty, as in a GAN, is what takes second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(64, 64).requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + 2.0 * self.lora_b(self.lora_a(x)))


def test_second_derivatives_of_a_model_that_runs_op_by_op_are_refused():
    call = torch.compile(Two(), backend="falqon", options={"inner": "eager"})
    x = randn(3, 64).requires_grad_()
    (plain,) = torch.autograd.grad(call(x).sum(), x)
    (grad,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    assert torch.equal(grad, plain)
    with pytest.raises(FalqonError, match="second derivatives"):
        grad.square().sum().backward()


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_aotautograd_refuses_second_derivatives_itself(inner):
    call = torch.compile(Two(), backend="falqon", options={"inner": inner})
    x = randn(3, 64).requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"double backward|requires create_graph=False|does not require grad"
    ):
        torch.autograd.grad(call(x).sum(), x, create_graph=True)[0].square().sum().backward()


# -- the prepared layer ----------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("granularity", "scale"), [("row", "pow2"), ("tensor", "amax")])
def test_the_prepared_layer_alone_equals_float64(granularity, scale, dtype, native, monkeypatch):
    """x · dq(W)ᵀ + bias and its gradients, on the same dq(W).

    dq rounds to float32, then to what the product is computed in: x's dtype, or float32 for a
    bfloat16 that the CPU doesn't multiply. The bias joins the product's sums or comes behind it.
    """
    monkeypatch.setattr(lowering, "native_bf16", lambda: native)
    spec, wide = (
        SiteSpec(granularity, scale, "e5m2"),
        F32 if dtype == BF16 and not native else dtype,
    )
    made = layer(dtype=dtype, spec=spec)
    x, bias = randn(5, 40).to(dtype).requires_grad_(), randn(24).to(dtype).requires_grad_()
    code, bits = made.base.code, made.base.scale
    exact = Approx.exact(code.view(E4M3).float().double() * bits.double())
    w, grad = exact.rounded(F32, wide), randn(5, 24, seed=7).to(dtype)
    y = falqon.base_linear(*base_args(made.base, x, bias, spec))
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)
    wanted = (Approx.exact(x.detach()) @ w.t()).rounded(wide)
    wanted = (wanted + Approx.exact(bias.detach())).rounded(wide, dtype)
    wanted.assert_holds(y.detach())
    (Approx.exact(grad) @ w).rounded(wide, dtype).assert_holds(grad_x)
    total = Approx.exact(torch.ones(1, 5)) @ Approx.exact(grad)
    total.rounded(dtype).assert_holds(grad_bias[None])
    actual = falqon.dequantize(code, bits.view(torch.int32), dtype)
    exact.rounded(F32, dtype).assert_holds(actual)


def test_the_prepared_layer_can_be_differentiated_twice():
    """Outside of compiled code it is plain linear algebra."""
    made = layer(6, 9)
    x = randn(3, 9).double().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: falqon.base_linear(*base_args(made.base, x, None)).square(), x
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_the_prepared_layer_of_rows_takes_the_adapter_out_again(granularity, dtype):
    """x · (dq(W) - s·applied·dq(A))ᵀ against float64 on the same state.

    dq, the product and the scaling round once each, the sum of r products and the difference r
    times: gamma(r + 4) of the terms' magnitudes. Then one rounding to x's dtype, the GEMM in
    float32, and one rounding of its result.
    """
    site = make_site(granularity=granularity)
    state, x = site.state, randn(5, 40).to(dtype)
    merged = dequantized(state)
    w, a = merged[:24], merged[24:]
    adapter = state.scaling * state.applied.double()
    off = gamma(state.rank + 4) * (w.abs() + adapter.abs() @ a.abs())
    base = Approx(w - adapter @ a, off).rounded(dtype)
    expected = (Approx.exact(x) @ base.t()).rounded(dtype)
    expected.assert_holds(falqon.rows_base_linear(*rows_args(site, x, None)))
