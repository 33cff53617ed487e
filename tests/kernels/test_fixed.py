"""Rows behind A and columns behind B that don't train, interpreted: their casts with those of an
adapter, and gradients that leave them out.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falqon_fx.kernels.adapter_cast.launch import adapter_cast
from falqon_fx.kernels.adapter_cast.spec import AdapterCastSpec
from falqon_fx.kernels.adapter_fp8.launch import adapter_fp8
from falqon_fx.kernels.adapter_fp8.spec import AdapterFp8Spec
from falqon_fx.kernels.adapter_grads.launch import adapter_grads
from falqon_fx.kernels.grad_out_a.launch import grad_out_a
from falqon_fx.kernels.grad_out_a.spec import GradOutASpec
from falqon_fx.kernels.products import adapters as products
from falqon_fx.kernels.products import tails as products_in_fp8
from falqon_fx.kernels.spec import aligned
from falqon_fx.ops.fp8_adapter import balance
from falqon_fx.site.casts import cast_fp8
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests.kernels.test_backward import DTYPES, SMALL
from tests.sites import randn
from tests.tolerances import Approx, gamma

CAST = AdapterCastSpec(
    input_dtype="float32",
    b_dtype="bfloat16",
    scale="pow2",
    cast="integer",
    adapters=1,
    fixed="bfloat16",
    block=64,
)
FP8 = AdapterFp8Spec(
    input_dtype="float32",
    scale="pow2",
    cast="integer",
    adapters=1,
    rank=64,
    fixed="bfloat16",
    block=64,
    tile=512,
    chunks=2,
)
TEXT = str(SiteSpec("row", "pow2", "e5m2"))

ranks = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([0, 3, 16]), st.sampled_from([0, 5, 16])),
    min_size=1,
    max_size=3,
)
# Where A has a row of zeros, t has all the range for itself.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in divide")
seeds = st.integers(0, 2**32 - 99)


class Given:
    """Adapters with ranks (r, rc, c). Of the lists of fixed ones those without a row or column in
    any adapter are empty.
    """

    def __init__(self, ranks, width, out, dtype, fixed, seed):
        def matrices(shapes, of, first):
            return [randn(*s, seed=seed + first + i).to(DTYPES[of]) for i, s in enumerate(shapes)]

        outs = [out + i for i in range(len(ranks))]
        both = [*zip(outs, ranks, strict=True)]
        self.lora_a = matrices([(r, width) for r, _, _ in ranks], dtype, 0)
        self.lora_b = matrices([(out, r) for out, (r, _, _) in both], dtype, 10)
        self.scaling = [0.3, 2.0, 1.0][: len(ranks)]
        self.base_scale = [2.0 ** randn(out, 1, seed=seed + 20 + i) for i, out in enumerate(outs)]
        of_a = matrices([(rc, width) for _, rc, _ in ranks], fixed, 30)
        of_b = matrices([(out, rc) for out, (_, rc, _) in both], fixed, 40)
        last = matrices([(out, c) for out, (_, _, c) in both], fixed, 50)
        any_rows, any_last = any(rc for _, rc, _ in ranks), any(c for _, _, c in ranks)
        self.fixed = of_a * any_rows, of_b * any_rows, last * any_last

    def whole(self, j):
        """[A; A_c; 0], s · B, [B_c | 0] and W_S of an adapter in float32, zeros up to a multiple
        of 16 where anything is behind A and B.
        """
        behind = [of[j].float() if of else None for of in self.fixed]
        a, b = self.lora_a[j].float(), self.lora_b[j].float()
        of_a, of_b, last = behind
        rows = a if of_a is None else torch.cat([a, of_a])
        none = b[:, :0]
        of_b = none if of_b is None else of_b
        lacking = -len(rows) % 16 * any(map(bool, self.fixed))
        rows = torch.cat([rows, rows.new_zeros(lacking, rows.shape[1])])
        of_b = torch.cat([of_b, b.new_zeros(len(b), lacking)], dim=1)
        scaled = b * torch.tensor(self.scaling[j])
        return rows, scaled, of_b, none if last is None else last


def same_bytes(actual, wanted):
    """Equal codes, and NaN where it is wanted."""
    nan = wanted.float().isnan()
    same = actual.view(torch.uint8) == wanted.contiguous().view(torch.uint8)
    return torch.equal(actual.float().isnan(), nan) and bool((same | nan).all())


@given(
    ranks=ranks,
    width=st.integers(1, 90),
    out=st.integers(1, 40),
    dtype=st.sampled_from(sorted(DTYPES)),
    fixed=st.sampled_from(sorted(DTYPES)),
    b_dtype=st.sampled_from(["bfloat16", "float32"]),
    scale=st.sampled_from(["pow2", "amax"]),
    seed=seeds,
)
def test_casts_are_those_of_an_adapter_of_all_rows_and_columns(
    ranks, width, out, dtype, fixed, b_dtype, scale, seed
):
    """Bit for bit, zeros and NaN among them; what is fixed is not multiplied by the scaling."""
    made_of = Given(ranks, width, out, dtype, fixed, seed)
    made_of.lora_a[0][0] = 0
    for of in made_of.fixed:
        if of and of[-1].numel():
            of[-1][-1, -1] = float("nan")
    spec = replace(
        CAST,
        input_dtype=dtype,
        fixed=fixed if any(made_of.fixed) else "none",
        b_dtype=b_dtype,
        scale=scale,
        adapters=len(ranks),
    )
    made = adapter_cast(made_of.lora_a, made_of.lora_b, made_of.scaling, spec, *made_of.fixed)
    for j in range(len(ranks)):
        code, scales, b = made[3 * j : 3 * j + 3]
        rows, *columns = made_of.whole(j)
        wanted, wanted_scales = cast_fp8(rows, E4M3, str(SiteSpec("row", scale, "e5m2")))
        assert same_bytes(code, wanted)
        torch.testing.assert_close(scales, wanted_scales, rtol=0, atol=0, equal_nan=True)
        wanted_b = torch.cat(columns, dim=1).to(DTYPES[b_dtype])
        torch.testing.assert_close(b, wanted_b, rtol=0, atol=0, equal_nan=True)
        assert b.is_contiguous()


@given(
    ranks=ranks,
    width=st.integers(1, 90),
    out=st.integers(1, 40),
    dtype=st.sampled_from(sorted(DTYPES)),
    fixed=st.sampled_from(sorted(DTYPES)),
    scale=st.sampled_from(["pow2", "amax"]),
    zero=st.sampled_from(["", "lora_a", "lora_b"]),
    seed=seeds,
)
def test_casts_to_fp8_have_one_balance_for_all_columns_beside_o_a(
    ranks, width, out, dtype, fixed, scale, zero, seed
):
    """α up to the rounding of a norm, which is a sum of ``width`` squares, a root and two products;
    with that α each byte of b.
    """
    made_of = Given(ranks, width, out, dtype, fixed, seed)
    if zero:
        getattr(made_of, zero)[0].zero_()
    spec = replace(
        FP8,
        input_dtype=dtype,
        fixed=fixed if any(made_of.fixed) else "none",
        scale=scale,
        adapters=len(ranks),
    )
    columns = made_of.lora_a, made_of.lora_b, made_of.scaling, made_of.base_scale
    made = adapter_fp8(*columns, spec, *made_of.fixed)
    for j, (r, rc, c) in enumerate(ranks):
        code, scales, b, alpha = made[4 * j : 4 * j + 4]
        rows, scaled, of_b, last = made_of.whole(j)
        wanted, wanted_scales = cast_fp8(rows, E4M3, str(SiteSpec("row", scale, "e5m2")))
        assert same_bytes(code, wanted)
        assert torch.equal(scales, wanted_scales)
        beside = torch.cat([scaled, of_b], dim=1) / made_of.base_scale[j]
        typical = 80.0 * (wanted.double() * scales.double()).norm(dim=1)
        off, largest = gamma(width + 5), beside.abs().amax(dim=0)
        low, high = (balance((typical * factor).float(), largest) for factor in (1 - off, 1 + off))
        assert ((low <= alpha) & (alpha <= high)).all()
        start, rank = aligned(r + rc), len(rows)
        width_of_b = start + aligned(c)
        wide = torch.zeros(len(beside), width_of_b)
        wide[:, :rank] = beside * alpha
        wide[:, start : start + c] = last / made_of.base_scale[j]
        wanted_b = wide.clamp(-448, 448).to(E4M3)
        assert b.stride(0) == width_of_b
        assert same_bytes(b.as_strided(wide.shape, b.stride()), wanted_b)  # zeros between, too
        assert b.shape[1] == rank + c


@pytest.mark.parametrize("lora_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "ranks", [[(8, 16, 16)], [(16, 16, 0), (4, 16, 0)], [(16, 0, 16)], [(8, 16, 4), (8, 0, 0)]]
)
def test_casts_by_aten_are_those_of_the_kernel(ranks, lora_dtype):
    made_of = Given(ranks, 48, 33, lora_dtype, "bfloat16", 3)
    given = made_of.lora_a, made_of.lora_b, made_of.scaling, torch.bfloat16, TEXT
    contest = products.adapter_casts(*given, *made_of.fixed)
    assert len(contest.candidates) == 2
    ours, theirs = (run() for run in contest.candidates.values())
    assert len(ours) == len(theirs)
    for of_kernel, of_aten in zip(ours, theirs, strict=True):
        assert of_kernel.dtype == of_aten.dtype
        assert torch.equal(of_kernel.float(), of_aten.float())


@pytest.mark.parametrize(
    ("fixed", "kernels"), [("bfloat16", 1), ("float16", 1), (("bfloat16", "float32"), 0)]
)
def test_fixed_tensors_of_one_dtype_have_a_kernel(fixed, kernels):
    """In FP8, where what a tile holds is at most 128 columns."""
    one = fixed if isinstance(fixed, str) else fixed[0]
    made_of = Given([(8, 16, 16)], 48, 32, "float32", one, 0)
    a, b, last = made_of.fixed
    last = last if one == fixed else [t.to(DTYPES[fixed[1]]) for t in last]
    columns, plain = (made_of.lora_a, made_of.lora_b, made_of.scaling), partial(list[torch.Tensor])
    cast = products.adapter_casts(*columns, torch.bfloat16, TEXT, a, b, last)
    in_fp8 = partial(products_in_fp8.adapter_casts, *columns, made_of.base_scale, plain, TEXT)
    for contest in (cast, in_fp8(a, b, last)):
        assert len(contest.candidates) == kernels + 1
    wide = [torch.zeros(32, 97, dtype=a[0].dtype)]
    assert [*in_fp8(a, b, wide).candidates] == ["dequantize"]  # 32 and 112


@given(
    n=st.sampled_from([0, 1, 17, 100]),
    ranks=st.lists(
        st.tuples(st.integers(1, 20), st.sampled_from([0, 3, 16])), min_size=1, max_size=3
    ),
    width=st.integers(1, 50),
    a_dtype=st.sampled_from(["bfloat16", "float32"]),
    train_a=st.booleans(),
    rows=st.sampled_from([0, 5, 16]),
    seed=seeds,
)
def test_gradients_are_those_of_the_first_columns_alone(
    n, ranks, width, a_dtype, train_a, rows, seed
):
    """Bit for bit those of these columns without others, which hold NaN; ``rows``: how many more
    elements a row of the memory has.
    """
    outs, trained = [40, 7, 23][: len(ranks)], [r for r, _ in ranks]
    scaling, widths = [0.3, 2.0, 1.0][: len(ranks)], [r + rc for r, rc in ranks]
    grad = [randn(n, out, seed=seed + i).bfloat16() for i, out in enumerate(outs)]
    of_all: list[list[torch.Tensor]] = []
    for i in range(2):
        parts = [
            randn(n, r, seed=seed + 10 + 10 * i + j).to(DTYPES[a_dtype])
            for j, r in enumerate(trained)
        ]
        memory = torch.full((n, sum(widths) + rows), float("nan"), dtype=DTYPES[a_dtype])
        wide = memory[:, : sum(widths)]
        for part, columns in zip(parts, wide.split(widths, dim=1), strict=True):
            columns[:, : part.shape[1]] = part
        of_all.append([torch.cat(parts, dim=1), wide])
    (low, wide_low), (d, wide_d) = of_all
    x = [*cast_fp8(randn(n, width, seed=seed + 40), E4M3, TEXT)] if train_a else []
    spec = replace(
        SMALL, a_dtype=a_dtype, adapters=len(ranks), rank=32, x_rank=64 if train_a else 0
    )
    wanted = adapter_grads(grad, low, trained, scaling, x, [d] if train_a else [], spec)
    given = grad, wide_low, trained, scaling, x, [wide_d] if train_a else []
    made = adapter_grads(*given, spec, widths)
    assert len(made) == len(wanted) == len(ranks) * (2 if train_a else 1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, wanted, strict=True))


def test_gradients_by_aten_are_those_of_the_kernel_but_for_rounding():
    n, trained, widths = 50, [8, 4], [24, 20]
    grad = [randn(n, out, seed=out).bfloat16() for out in (40, 33)]
    low, d = (randn(n, 50, seed=i).bfloat16()[:, :44] for i in range(2))
    x = [*cast_fp8(randn(n, 32, seed=5), E4M3, TEXT)]
    given = grad, low, trained, [0.5, 2.0], x, [d], torch.float32, "auto", widths
    contest = products.adapter_grads(*given)
    assert len(contest.candidates) == 2
    parts = zip(low.split(widths, dim=1), d.split(widths, dim=1), trained, strict=True)
    wanted = []
    for (of_low, of_d, r), g, factor in zip(parts, grad, (0.5, 2.0), strict=True):
        product = (Approx.exact(g).t() @ Approx.exact(of_low[:, :r])).rounded(torch.bfloat16)
        wanted.append(product * Approx.exact(torch.tensor(factor)))
        scaled = (of_d[:, :r].float() * x[1]).bfloat16()
        product = (Approx.exact(scaled).t() @ Approx.exact(x[0].float())).rounded(torch.bfloat16)
        wanted.append(product)
    for run in contest.candidates.values():
        for actual, bound in zip(run(), [*wanted[::2], *wanted[1::2]], strict=True):
            bound.rounded(torch.float32).assert_holds(actual)


@given(
    n=st.sampled_from([0, 1, 40]),
    ranks=st.lists(
        st.tuples(st.integers(1, 20), st.sampled_from([0, 3, 16])), min_size=1, max_size=3
    ),
    a_dtype=st.sampled_from(["bfloat16", "float32"]),
    seed=seeds,
)
def test_grad_out_a_reads_the_first_columns_of_wider_rows(n, ranks, a_dtype, seed):
    """Against float64, and NaN in the other columns."""
    outs = [40, 7, 23][: len(ranks)]
    grad = [randn(n, out, seed=seed + i).bfloat16() for i, out in enumerate(outs)]
    b = []
    for i, (out, (r, rc)) in enumerate(zip(outs, ranks, strict=True)):
        wide = torch.full((out, r + rc), float("nan"), dtype=DTYPES[a_dtype])
        wide[:, :r] = randn(out, r, seed=seed + 10 + i)
        b.append(wide[:, :r])
    spec = GradOutASpec(
        grad_dtype="bfloat16",
        a_dtype=a_dtype,
        operands="float32",
        adapters=len(ranks),
        rank=32,
        block_m=16,
        block_k=16,
    )
    d = grad_out_a(grad, b, spec)
    for part, g, f in zip(d.split([r for r, _ in ranks], dim=1), grad, b, strict=True):
        (Approx.exact(g) @ Approx.exact(f)).rounded(torch.float32, f.dtype).assert_holds(part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, last: (a, (), last), "some of 1 adapters"),
        (lambda a, b, last: (a * 2, b * 2, last), "some of 1 adapters"),
        (lambda a, b, last: ((), (), ()), "other dtypes than bfloat16"),
        (lambda a, b, last: (a, b, [last[0].float()]), "other dtypes than bfloat16"),
        (lambda a, b, last: ([a[0][:, :5]], b, last), r"fixed \[\(3, 5\)\], not \[\(3, 20\)\]"),
        (lambda a, b, last: (a, [b[0][:, :2]], last), r"fixed \[\(9, 2\)\], not \[\(9, 3\)\]"),
        (lambda a, b, last: (a, b, [last[0][:4]]), r"fixed \[\(4, 5\)\], not \[\(9, 5\)\]"),
    ],
)
def test_fixed_tensors_that_do_not_fit_are_refused(change, message):
    made_of = Given([(4, 3, 5)], 20, 9, "float32", "bfloat16", 0)
    of_b = made_of.lora_a, made_of.lora_b, made_of.scaling
    for run in (
        partial(adapter_cast, *of_b, CAST),
        partial(adapter_fp8, *of_b, made_of.base_scale, FP8),
    ):
        with pytest.raises(ValueError, match=message):
            run(*change(*made_of.fixed))
        run(*made_of.fixed)


def test_more_columns_than_there_are_room_for_are_refused():
    made_of = Given([(4, 3, 5)], 20, 9, "float32", "bfloat16", 0)
    of_b = made_of.lora_a, made_of.lora_b, made_of.scaling, made_of.base_scale
    with pytest.raises(ValueError, match=r"\[32\] columns"):
        adapter_fp8(*of_b, replace(FP8, rank=16), *made_of.fixed)
    grad, low = [randn(4, 8).bfloat16()], randn(4, 12).bfloat16()
    with pytest.raises(ValueError, match=r"\[16\] of \[12\] columns"):
        adapter_grads(grad, low, [16], [1.0], [], [], SMALL, [12])
    with pytest.raises(ValueError, match=r"O_A is \(4, 12\)"):
        adapter_grads(grad, low, [8], [1.0], [], [], SMALL, [11])
