"""The transpose of W's bytes and dL/dB, interpreted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falqon_fx.kernels.grad_b.launch import grad_b
from falqon_fx.kernels.grad_b.spec import GradBSpec
from falqon_fx.kernels.transpose.launch import transpose
from falqon_fx.kernels.transpose.spec import TransposeSpec
from tests.sites import randn
from tests.tolerances import Approx

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = GradBSpec(
    grad_dtype="bfloat16",
    a_dtype="bfloat16",
    b_dtype="float32",
    operands="float32",
    rank=16,
    block_m=16,
    block_k=16,
)


@pytest.mark.parametrize("shape", [(16, 16), (1, 40), (33, 17), (70, 5), (0, 4), (4, 0)])
def test_transpose(shape):
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    y = transpose(x, TransposeSpec(block=16))
    assert torch.equal(y, x.t())
    assert y.stride(0) % 16 == 0 or y.numel() == 0


def test_transpose_refuses_what_it_is_not_for():
    with pytest.raises(ValueError, match="int8"):
        transpose(torch.zeros(8, 4, dtype=torch.int8), TransposeSpec())
    with pytest.raises(ValueError, match="strides"):
        transpose(torch.zeros(8, 4, dtype=torch.uint8).t(), TransposeSpec())


@settings(max_examples=25)
@given(
    n=st.sampled_from([0, 1, 15, 16, 17, 100]),
    out=st.integers(1, 40),
    rank=st.integers(1, 32),
    grad_dtype=st.sampled_from(sorted(DTYPES)),
    a_dtype=st.sampled_from(["bfloat16", "float32"]),
    b_dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**32 - 2),
)
def test_grad_b_within_the_bound_of_float64(n, out, rank, grad_dtype, a_dtype, b_dtype, seed):
    grad, out_a = randn(n, out, seed=seed).to(DTYPES[grad_dtype]), randn(n, rank, seed=seed + 1)
    out_a = out_a.to(DTYPES[a_dtype])
    spec = replace(SMALL, grad_dtype=grad_dtype, a_dtype=a_dtype, b_dtype=b_dtype, rank=32)
    actual = grad_b(grad, out_a, 0.3, spec)
    assert actual.dtype == DTYPES[b_dtype]
    if n == 0:
        assert torch.equal(actual, torch.zeros(out, rank, dtype=actual.dtype))
        return
    product = Approx.exact(grad).t() @ Approx.exact(out_a)
    scaling = Approx.exact(torch.tensor(0.3))
    (product * scaling).rounded(torch.float32, DTYPES[b_dtype]).assert_holds(actual)


def test_grad_b_is_the_same_each_time():
    grad, out_a = randn(300, 40).bfloat16(), randn(300, 8, seed=1).bfloat16()
    first = grad_b(grad, out_a, 1.0, SMALL)
    for _ in range(2):
        assert torch.equal(first, grad_b(grad, out_a, 1.0, SMALL))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_dtype": "float16"}, "takes others"),
        ({"operands": "native"}, "interpreter needs"),
    ],
)
def test_bad_input_is_explained(change, message):
    with pytest.raises(ValueError, match=message):
        grad_b(randn(4, 8).bfloat16(), randn(4, 8).bfloat16(), 1.0, replace(SMALL, **change))
    with pytest.raises(ValueError, match=r"O_A is \(4, 17\)"):
        grad_b(randn(4, 8).bfloat16(), randn(4, 17).bfloat16(), 1.0, SMALL)
    with pytest.raises(ValueError, match="rank=8"):
        replace(SMALL, rank=8)
