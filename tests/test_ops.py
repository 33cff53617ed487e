"""The ops as torch sees them: schema, fake implementation, autograd, AOT dispatch.

W' goes in as bytes, which the ops take as well as E4M3: opcheck compares arguments by allclose,
which torch doesn't have for FP8.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sites import Site, dequantized, make_site, randn
from tests.tolerances import Approx, gamma

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
falqon = torch.ops.falqon


def linear_args(
    site: Site, x: Tensor, out_dtype: torch.dtype, bias: Tensor | None
) -> tuple[Any, ...]:
    state, spec = site.state, str(site.state.plan)
    own = ([t] for t in (state.code, state.scale, state.applied, site.lora_b))
    return (x, *own, [] if bias is None else [bias], [state.scaling], out_dtype, spec)


def grad_args(site: Site, grad: Tensor, x_dtype: torch.dtype) -> tuple[Any, ...]:
    state = site.state
    own = ([t] for t in (grad, state.code, state.scale, state.applied, site.lora_b.detach()))
    return (*own, [state.scaling], x_dtype, str(state.plan))


def base_args(site: Site, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    state = site.state
    return (x, state.code, *state.tensors[1:], bias, state.scaling, str(state.plan))


# Each value of each option at least once, and the pairs that take their own path in the lowering.
PLANS = [
    ("row", "pow2", "apply", F32),
    ("row", "amax", "hold", BF16),
    ("tensor", "pow2", "drop", BF16),
    ("tensor", "amax", "apply", F16),
]


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(("granularity", "scale", "pending", "dtype"), PLANS)
def test_opcheck(granularity, scale, pending, dtype, bias):
    """torch.library's own checks: the schema's mutations and aliases, autograd's registration, the
    fake implementation's shapes, dtypes and strides, and AOT dispatch with dynamic shapes.
    """
    site = make_site(6, 9, 3, granularity=granularity, scale=scale, pending=pending, dtype=dtype)
    site.lora_b.requires_grad_()
    x = randn(2, 4, 9).to(dtype).requires_grad_()
    b = randn(6).to(dtype).requires_grad_() if bias else None
    torch.library.opcheck(falqon.merged_linear, linear_args(site, x, dtype, b))
    torch.library.opcheck(falqon.base_linear, base_args(site, x, b))
    if not bias:
        grad = randn(4, 6).to(dtype)
        torch.library.opcheck(falqon.merged_linear_grad_x, grad_args(site, grad, dtype))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("pending", ["hold", "drop", "apply"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_opcheck_of_the_update(granularity, pending, rounding):
    """Two sites, one of them prepared (no base weight), both with something to write."""
    options = {"granularity": granularity, "pending": pending, "rounding": rounding, "topk": 2}
    sites = [make_site(6, 9, 3, **options), make_site(4, 8, 2, dtype=BF16, **options)]
    for site in sites:
        site.step()
    states = [site.state for site in sites]
    args = (
        [state.code for state in states],
        *([state.tensors[i] for state in states] for i in range(1, 5)),
        [site.lora_b for site in sites],
        [site.lora_a for site in sites],
        [sites[0].base, None],
        [2.0, 2.0],
        str(states[0].plan),
    )
    torch.library.opcheck(falqon.proxy_update_, args)


def test_bytes_and_e4m3_are_the_same_to_the_ops():
    site = make_site()
    x, code, weight = randn(3, 40), site.state.code, site.state.weight
    for op, args in (
        (falqon.merged_linear, linear_args(site, x, F32, None)),
        (falqon.merged_linear_grad_x, grad_args(site, randn(3, 24), F32)),
        (falqon.base_linear, base_args(site, x, None)),
    ):
        as_e4m3 = tuple(weight if arg is code else arg for arg in args)
        results = [torch.utils._pytree.tree_leaves(op(*given)) for given in (args, as_e4m3)]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        torch.library.opcheck(op, as_e4m3, test_utils=("test_faketensor",))


SHAPES = [
    (24, 40, 4, (0,)),  # no token
    (24, 40, 4, (2, 0)),
    (24, 40, 4, (1,)),
    (24, 40, 4, ()),
    (7, 13, 3, (5,)),  # nothing divides anything
    (1, 1, 1, (2,)),
    (5, 33, 64, (3, 3)),  # rank above out and in
    (24, 40, 1, (2, 2, 2)),
]


@pytest.mark.parametrize(("out", "features", "rank", "leading"), SHAPES)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_fake_and_real_agree_on_odd_shapes(out, features, rank, leading, granularity):
    site = make_site(out, features, rank, granularity=granularity, dtype=BF16)
    site.lora_b.requires_grad_()
    x = randn(*leading, features).to(BF16).requires_grad_()
    checks = ("test_schema", "test_faketensor")
    bias = randn(out)
    torch.library.opcheck(falqon.merged_linear, linear_args(site, x, F32, bias), test_utils=checks)
    torch.library.opcheck(falqon.base_linear, base_args(site, x, bias), test_utils=checks)
    y, out_a = falqon.merged_linear(*linear_args(site, x, F32, bias))
    tokens = x.numel() // features
    assert (y.shape, y.dtype) == ((*leading, out), F32)
    assert (out_a.shape, out_a.dtype) == ((tokens, rank), F32)
    y.sum().backward()
    assert (x.grad.shape, site.lora_b.grad.shape) == (x.shape, (out, rank))
    assert x.grad.isfinite().all()
    assert site.lora_b.grad.isfinite().all()
    grad = randn(tokens, out)
    torch.library.opcheck(
        falqon.merged_linear_grad_x, grad_args(site, grad, BF16), test_utils=checks
    )


@pytest.mark.parametrize("out_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
def test_every_pair_of_dtypes_gives_the_dtype_asked_for(x_dtype, out_dtype):
    site = make_site()
    x = randn(3, 40).to(x_dtype).requires_grad_()
    site.lora_b.requires_grad_()
    y, _ = falqon.merged_linear(*linear_args(site, x, out_dtype, None))
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, site.lora_b.grad.dtype) == (out_dtype, x_dtype, F32)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "one_row_of_a_slice"])
def test_strides_of_x_do_not_matter(layout):
    site = make_site()
    x = {
        "transposed": randn(40, 6).t(),
        "sliced": randn(6, 81)[:, 1::2],
        "expanded": randn(40).expand(6, 40),
        "one_row_of_a_slice": randn(6, 90)[:1, 10:50],
    }[layout]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(falqon.merged_linear, linear_args(site, x, F32, None), test_utils=checks)
    strided, dense = (
        falqon.merged_linear(*linear_args(site, v, F32, None)) for v in (x, x.contiguous())
    )
    assert torch.equal(strided[0], dense[0])
    assert torch.equal(strided[1], dense[1])
    torch.library.opcheck(falqon.base_linear, base_args(site, x, None), test_utils=checks)


def test_outputs_lie_in_their_own_storage():
    """O_A is kept for backward; as a view of [O | O_A] it would keep all of that alive."""
    site = make_site()
    y, out_a = falqon.merged_linear(*linear_args(site, randn(3, 40), F32, None))
    assert out_a.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()
    assert out_a.untyped_storage().nbytes() == out_a.nbytes


def test_x_is_not_kept_for_backward():
    site = make_site()
    site.lora_b.requires_grad_()
    x = randn(3, 40).requires_grad_() * 1  # not a leaf: nothing else holds it
    alive = weakref.ref(x)
    y, _ = falqon.merged_linear(*linear_args(site, x, F32, None))
    del x
    gc.collect()
    assert alive() is None
    y.sum().backward()


@pytest.mark.parametrize("wanted", ["x", "lora_b", "bias"])
def test_only_the_gradients_asked_for_are_made(wanted):
    site = make_site()
    inputs = {"x": randn(3, 40), "lora_b": site.lora_b, "bias": randn(24)}
    inputs[wanted].requires_grad_()
    y, _ = falqon.merged_linear(*linear_args(site, inputs["x"], F32, inputs["bias"]))
    y.sum().backward()
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [wanted]


def test_base_linear_differentiates_x_and_bias():
    """Plain linear algebra: the gradient is that of F.linear with the same dequantized weight."""
    site = make_site()
    x, bias = randn(3, 40).requires_grad_(), randn(24).requires_grad_()
    grad = randn(3, 24, seed=7)
    y = falqon.base_linear(*base_args(site, x, bias))
    actual = torch.autograd.grad(y, (x, bias), grad)
    weight = site.state.base()
    expected_y = torch.nn.functional.linear(x, weight, bias)
    expected = torch.autograd.grad(expected_y, (x, bias), grad)
    assert torch.equal(y, expected_y)
    assert torch.equal(actual[0], expected[0])
    # A sum of three numbers in either order: two roundings each.
    assert ((actual[1] - expected[1]).abs() <= 2 * 2 * 2**-24 * grad.abs().sum(0)).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_base_linear_takes_the_adapter_out_again(granularity, dtype):
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
    expected.assert_holds(falqon.base_linear(*base_args(site, x, None)))


def test_second_derivatives_are_refused():
    site = make_site()
    site.lora_b.requires_grad_()
    x = randn(3, 40).requires_grad_()
    y, _ = falqon.merged_linear(*linear_args(site, x, F32, None))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="merged_linear_grad_x"):
        grad.sum().backward()
