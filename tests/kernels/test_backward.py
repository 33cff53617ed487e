"""The transpose of W's bytes, dL/dB and dL/dA, interpreted."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falqon_fx.kernels.adapter_cast.launch import adapter_cast
from falqon_fx.kernels.adapter_cast.spec import AdapterCastSpec
from falqon_fx.kernels.adapter_grads.launch import adapter_grads, splits_of
from falqon_fx.kernels.adapter_grads.spec import AdapterGradsSpec
from falqon_fx.kernels.transpose.launch import starts, transpose
from falqon_fx.kernels.transpose.spec import TransposeSpec
from falqon_fx.site.casts import cast_fp8
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests.sites import randn
from tests.tolerances import Approx

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = AdapterGradsSpec(
    grad_dtype="bfloat16",
    a_dtype="bfloat16",
    out_dtype="float32",
    x_scale="row",
    fp8=False,
    operands="float32",
    adapters=1,
    rank=16,
    x_rank=0,
    block_m=16,
    block_x=16,
    block_k=16,
)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [([16], 16), ([1], 40), ([33], 17), ([70], 5), ([0], 4), ([4], 0), ([33, 16, 5], 40)],
)
def test_transpose(rows, columns):
    numbers = torch.Generator().manual_seed(0)
    x = [torch.randint(0, 256, (n, columns), generator=numbers).to(torch.uint8) for n in rows]
    spec = TransposeSpec(len(rows), fp8=False, block=16)
    matrices = [m.view(E4M3) for m in x]
    whole, (*begins, end) = transpose(matrices, spec), starts(matrices)
    assert (whole.dtype, whole.shape) == (E4M3, (columns, end))
    bytes_of = whole.view(torch.uint8)
    for before, start, after in zip(x, begins, [*begins[1:], end], strict=True):
        assert start % 16 == 0
        assert torch.equal(bytes_of[:, start : start + len(before)], before.t())
        assert not bytes_of[:, start + len(before) : after].any()  # zeros, up to the next


def test_transpose_refuses_what_it_is_not_for():
    x, spec = torch.zeros(8, 4).to(E4M3), TransposeSpec(fp8=False)
    with pytest.raises(ValueError, match="int8"):
        transpose([torch.zeros(8, 4, dtype=torch.int8)], spec)
    with pytest.raises(ValueError, match="strides"):
        transpose([x.t()], spec)
    with pytest.raises(ValueError, match="2 matrices"):
        transpose([x, x], spec)
    with pytest.raises(ValueError, match="interpreter needs"):
        transpose([x], TransposeSpec())


@given(
    n=st.sampled_from([0, 1, 15, 16, 17, 100]),
    outs=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    width=st.integers(1, 50),
    rank=st.integers(1, 20),
    grad_dtype=st.sampled_from(sorted(DTYPES)),
    a_dtype=st.sampled_from(["bfloat16", "float32"]),
    out_dtype=st.sampled_from(sorted(DTYPES)),
    granularity=st.sampled_from(["row", "tensor"]),
    train_a=st.booleans(),
    seed=st.integers(0, 2**32 - 20),
)
def test_gradients_of_adapters_within_the_bound_of_float64(
    n, outs, width, rank, grad_dtype, a_dtype, out_dtype, granularity, train_a, seed
):
    """Each result is a product of what it is made from, whose D is rounded behind the scale of x;
    float32 sums of n terms, then the scaling, then the dtype of the results.
    """
    ranks = [rank, *[1 + rank // 2] * (len(outs) - 1)]
    scaling = [0.3, 2.0, 1.0][: len(outs)]
    grad = [randn(n, out, seed=seed + i).to(DTYPES[grad_dtype]) for i, out in enumerate(outs)]
    out_a, d = (randn(n, sum(ranks), seed=seed + 8 + i).to(DTYPES[a_dtype]) for i in range(2))
    q, scale = cast_fp8(
        randn(n, width, seed=seed + 12), E4M3, str(SiteSpec(granularity, "pow2", "e5m2"))
    )
    spec = replace(
        SMALL,
        grad_dtype=grad_dtype,
        a_dtype=a_dtype,
        out_dtype=out_dtype,
        x_scale=granularity,
        adapters=len(outs),
        rank=32,
        x_rank=64 if train_a else 0,
    )
    of_x = [q, scale] if train_a else []
    made = adapter_grads(grad, out_a, ranks, scaling, of_x, [d] if train_a else [], spec)
    of_b, of_a = made[: len(outs)], made[len(outs) :]
    assert [tuple(t.shape) for t in of_b] == [*zip(outs, ranks, strict=True)]
    assert [tuple(t.shape) for t in of_a] == ([(r, width) for r in ranks] if train_a else [])
    assert {t.dtype for t in made} == {DTYPES[out_dtype]}
    if n == 0:
        assert not any(t.any() for t in made)
        return
    parts = out_a.split(ranks, dim=1)
    for actual, g, part, factor in zip(of_b, grad, parts, scaling, strict=True):
        product = Approx.exact(g).t() @ Approx.exact(part)
        wanted = product * Approx.exact(torch.tensor(factor))
        wanted.rounded(torch.float32, DTYPES[out_dtype]).assert_holds(actual)
    scaled = (d.float() * scale).to(d.dtype).split(ranks, dim=1)
    for actual, part in zip(of_a, scaled, strict=False):
        product = Approx.exact(part).t() @ Approx.exact(q.float())
        product.rounded(torch.float32, DTYPES[out_dtype]).assert_holds(actual)


def test_gradients_of_adapters_are_the_same_each_time():
    grad, out_a = [randn(300, 40).bfloat16()], randn(300, 8, seed=1).bfloat16()
    first, *_ = adapter_grads(grad, out_a, [8], [1.0], [], [], SMALL)
    for _ in range(2):
        again, *_ = adapter_grads(grad, out_a, [8], [1.0], [], [], SMALL)
        assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("n", "columns", "parts"),
    [(4096, 32, 8), (512, 32, 2), (511, 32, 1), (512, 200, 1), (1, 1, 1)],
)
def test_parts_are_for_all_processors_and_no_less_than_sums(n, columns, parts, monkeypatch):
    """128 x 64 float32, written and read again, are 64 KiB; 256 tokens of 128 + 64 operands 96."""
    h100 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    spec = replace(SMALL, block_m=128, block_k=64, rank=64)
    splits, tokens = splits_of(n, columns, 1000, spec, torch.device("cuda"))
    assert splits == parts
    assert splits * tokens >= n > (splits - 1) * tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_dtype": "float16"}, "takes others"),
        ({"operands": "native"}, "interpreter needs"),
        ({"adapters": 2}, "1 adapters"),
        ({"x_rank": 16}, "x is for dL/dA alone"),
    ],
)
def test_bad_input_is_explained(change, message):
    def run(rank: int, **fields: Any) -> None:
        grad, out_a = [randn(4, 8).bfloat16()], randn(4, rank).bfloat16()
        adapter_grads(grad, out_a, [rank], [1.0], [], [], replace(SMALL, **fields))

    with pytest.raises(ValueError, match=message):
        run(8, **change)
    with pytest.raises(ValueError, match=r"O_A is \(4, 17\)"):
        run(17)
    with pytest.raises(ValueError, match="rank=8"):
        replace(SMALL, rank=8)
    with pytest.raises(ValueError, match="at most 256"):
        replace(SMALL, x_rank=512)


@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    width=st.integers(1, 300),
    out=st.integers(1, 90),
    dtype=st.sampled_from(sorted(DTYPES)),
    b_dtype=st.sampled_from(["bfloat16", "float32"]),
    scale=st.sampled_from(["pow2", "amax"]),
    seed=st.integers(0, 2**32 - 20),
)
def test_adapters_are_cast_in_one_launch_as_each_alone(
    ranks, width, out, dtype, b_dtype, scale, seed
):
    """Bit for bit, zeros and NaN among them."""
    lora_a = [randn(r, width, seed=seed + i).to(DTYPES[dtype]) for i, r in enumerate(ranks)]
    lora_b = [randn(out + i, r, seed=seed + 9 + i).to(DTYPES[dtype]) for i, r in enumerate(ranks)]
    lora_a[0][0] = 0
    lora_a[-1][-1, -1] = float("nan")
    scaling = [0.3, 2.0, 1.0][: len(ranks)]
    spec = AdapterCastSpec(
        input_dtype=dtype,
        b_dtype=b_dtype,
        scale=scale,
        cast="integer",
        adapters=len(ranks),
        block=64,
    )
    made = adapter_cast(lora_a, lora_b, scaling, spec)
    for j, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        code, scales, scaled = made[3 * j : 3 * j + 3]
        wanted, wanted_scales = cast_fp8(a.float(), E4M3, str(SiteSpec("row", scale, "e5m2")))
        nan = wanted.float().isnan()
        assert torch.equal(code.float().isnan(), nan)
        same = code.view(torch.uint8) == wanted.view(torch.uint8)
        assert (same | nan).all()
        torch.testing.assert_close(scales, wanted_scales, rtol=0, atol=0, equal_nan=True)
        factor = torch.tensor(scaling[j])
        assert torch.equal(scaled, (b.float() * factor).to(DTYPES[b_dtype]))


def test_casts_of_adapters_refuse_what_they_are_not_for():
    spec = AdapterCastSpec(
        input_dtype="float32", b_dtype="bfloat16", scale="pow2", cast="integer", adapters=1
    )
    a, b = [randn(4, 8)], [randn(6, 4)]
    with pytest.raises(ValueError, match="2 adapters"):
        adapter_cast(a * 2, b * 2, [1.0, 1.0], spec)
    with pytest.raises(ValueError, match=r"matrices of torch\.float32"):
        adapter_cast([a[0].bfloat16()], b, [1.0], spec)
    with pytest.raises(ValueError, match="interpreter needs"):
        adapter_cast(a, b, [1.0], replace(spec, cast="hardware"))
    with pytest.raises(ValueError, match="adapters=0"):
        replace(spec, adapters=0)
