"""The FP8 GEMM, interpreted, against float64 on the operands that it really multiplies."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falqon_fx.kernels.gemm.examples import SITE
from falqon_fx.kernels.gemm.launch import Piece, Product, gemm
from falqon_fx.site.numerics import E4M3, E5M2, FP8_DTYPES
from tests.sites import randn
from tests.tolerances import Approx, assert_within

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SMALL = replace(
    SITE,
    operands="float32",
    memory="pointer",
    persistent=False,
    block_m=16,
    block_n=16,
    block_k=32,
    group_m=2,
)


def codes(rows, columns, dtype, seed):
    """FP8 values of all magnitudes."""
    size = 2.0 ** torch.randint(
        -9, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)
    )
    return (randn(rows, columns, seed=seed) * size).to(dtype)


def scale(count, seed):
    """Float32 scales, not powers of two: [count, 1]."""
    return torch.rand(count, 1, generator=torch.Generator().manual_seed(seed)) + 0.01


def expected(q, q_scale, piece, spec, dtype):
    """The float64 result with the bound of everything rounded on the way.

    The sum over K is `dot_bound` of a float32 accumulator; each scale and the bias round once, the
    extra term may be summed before or after the product, the store rounds to ``dtype``.
    """
    f32 = torch.float32
    weight = piece.weight if spec.layout == "nk" else piece.weight.t()
    y = (Approx.exact(q.double()) @ Approx.exact(weight.double()).t()).rounded(f32)
    y = (y * Approx.exact(q_scale.double().reshape(-1, 1))).rounded(f32)
    if piece.scale is not None:
        y = (y * Approx.exact(piece.scale.double().reshape(1, -1))).rounded(f32)
    if piece.left is not None:
        y = y.addmm(Approx.exact(piece.left), Approx.exact(piece.right).t(), f32)
    if piece.bias is not None:
        y = (y + Approx.exact(piece.bias)).rounded(f32)
    return y.rounded(dtype)


def separate(results, pieces, spec):
    """One output for each piece: those of O_A lie side by side."""
    y_pieces = spec.pieces - spec.a_pieces
    if not spec.a_pieces:
        return results
    assert results[-1].is_contiguous()
    rows = [piece.weight.shape[0] for piece in pieces[y_pieces:]]
    return [*results[:-1], *results[-1].split(rows, dim=1)]


def check(q, q_scale, pieces, spec):
    y_pieces = spec.pieces - spec.a_pieces
    actual = separate(gemm(q, q_scale, pieces, spec), pieces, spec)
    for g, (piece, y) in enumerate(zip(pieces, actual, strict=True)):
        dtype = DTYPES[spec.out_dtype if g < y_pieces else spec.a_dtype]
        assert y.dtype == dtype
        assert y.is_contiguous() or g >= y_pieces
        expected(q, q_scale, piece, spec, dtype).assert_holds(y)
    return actual


@st.composite
def problems(draw):
    layout = draw(st.sampled_from(["nk", "nk", "kn"]))
    k = draw(st.integers(1, 80))
    even_k = draw(st.booleans())
    if even_k:
        k = 32 * draw(st.integers(1, 3))
    n = draw(st.sampled_from([1, 2, 15, 16, 17, 40]))
    y_pieces = 1 if layout == "kn" else draw(st.integers(1, 3))
    extra = draw(st.sampled_from([0, 0, 16, 256]))
    a_pieces = 0 if extra or layout == "kn" else draw(st.sampled_from([0, y_pieces]))
    spec = replace(
        SMALL,
        x=draw(st.sampled_from(["e4m3", "e5m2"])),
        x_scale=draw(st.sampled_from(["tensor", "row"])),
        w_scale=draw(st.sampled_from(["tensor", "row", "none"])),
        out_dtype=draw(st.sampled_from(sorted(DTYPES))),
        a_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        pieces=y_pieces + a_pieces,
        a_pieces=a_pieces,
        bias=draw(st.sampled_from(["none", *sorted(DTYPES)])),
        extra=extra,
        layout=layout,
        persistent=draw(st.booleans()),
        even_k=even_k,
        group_m=draw(st.sampled_from([1, 2, 8])),
    )
    seed = draw(st.integers(0, 2**32 - 50))
    q = codes(n, k, FP8_DTYPES[spec.x], seed)
    if draw(st.booleans()):
        q = codes(n, k + 5, FP8_DTYPES[spec.x], seed)[:, :k]  # a row stride
    pieces = []
    for g in range(spec.pieces):
        is_a = g >= y_pieces
        rows = draw(st.sampled_from([1, 3, 16, 256] if is_a else [1, 7, 16, 33]))
        weight = codes(rows, k, E4M3, seed + 1 + g)
        rank = draw(st.integers(1, extra)) if extra else 0
        pieces.append(
            Piece(
                weight if layout == "nk" else weight.t().contiguous(),
                {"none": None, "tensor": scale(1, seed + 9)[0, 0], "row": scale(rows, seed + 9)}[
                    spec.w_scale
                ],
                randn(rows, seed=seed + 20).to(DTYPES[spec.bias])
                if spec.bias != "none" and not is_a and draw(st.booleans())
                else None,
                randn(n, rank, seed=seed + 21).to(DTYPES[spec.a_dtype]) if extra else None,
                randn(rows, rank, seed=seed + 22).to(DTYPES[spec.a_dtype]) if extra else None,
            )
        )
    return (
        q,
        scale(n, seed + 8) if spec.x_scale == "row" else scale(1, seed + 8)[0, 0],
        pieces,
        spec,
    )


@given(problem=problems())
def test_within_the_bound_of_float64(problem):
    check(*problem)


def merged(out=40, rank=5, k=64, n=20):
    weight = codes(out + rank, k, E4M3, 1)
    w_scale = scale(out + rank, 2)
    pieces = [Piece(weight[:out], w_scale[:out]), Piece(weight[out:], w_scale[out:])]
    return codes(n, k, E4M3, 3), scale(n, 4), pieces


def test_siblings_are_the_same_as_each_alone():
    q, q_scale, pieces = merged()
    both = gemm(q, q_scale, pieces, SMALL)
    for y, piece in zip(both, pieces, strict=True):
        (alone,) = gemm(q, q_scale, [piece], replace(SMALL, pieces=1, a_pieces=0))
        torch.testing.assert_close(y, alone, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("x_scale", ["tensor", "row"])
def test_products_with_their_own_scales_are_added_up(x_scale, layout):
    products = []
    for i, k in enumerate((64, 33, 20)):
        weight = codes(24, k, E4M3, i)
        q_scale = scale(19, i + 8) if x_scale == "row" else scale(1, i + 8)[0, 0]
        given = weight if layout == "nk" else weight.t().contiguous()
        products.append(Product(codes(19, k, E5M2, i + 4), q_scale, given))
    left, right = randn(19, 5).bfloat16(), randn(24, 5).bfloat16()
    spec = replace(
        SMALL,
        x="e5m2",
        x_scale=x_scale,
        w_scale="none",
        pieces=1,
        a_pieces=0,
        extra=16,
        layout=layout,
        k_pieces=3,
    )
    first, *more = products
    piece = Piece(first.weight, None, None, left, right)
    (y,) = gemm(first.q, first.q_scale, [piece], spec, more)
    f32, total = torch.float32, Approx.exact(torch.zeros(19, 24))
    for p in products:
        weight = p.weight.double() if layout == "nk" else p.weight.double().t()
        product = (Approx.exact(p.q.double()) @ Approx.exact(weight).t()).rounded(f32)
        product = (product * Approx.exact(p.q_scale.double())).rounded(f32)
        total = (total + product).rounded(f32)
    total.addmm(Approx.exact(left), Approx.exact(right).t(), f32).rounded(
        torch.bfloat16
    ).assert_holds(y)
    with pytest.raises(ValueError, match="2 more products"):
        gemm(first.q, first.q_scale, [piece], replace(spec, k_pieces=1), more)


def test_every_code_is_decoded_exactly():
    for x in FP8_DTYPES:
        bytes_ = torch.arange(256, dtype=torch.uint8)
        q = bytes_.view(FP8_DTYPES[x])[:, None].expand(256, 1).contiguous()
        one = Piece(torch.ones(1, 1).to(E4M3), None)
        spec = replace(
            SMALL, x=x, w_scale="none", x_scale="tensor", out_dtype="float32", pieces=1, a_pieces=0
        )
        (y,) = gemm(q, torch.ones(()), [one], spec)
        torch.testing.assert_close(y[:, 0], q.float()[:, 0], rtol=0, atol=0, equal_nan=True)
    weight = torch.arange(256, dtype=torch.uint8).view(E4M3)[:, None].contiguous()
    (y,) = gemm(
        torch.ones(1, 1).to(E4M3), torch.ones(()), [Piece(weight, None)], replace(spec, x="e4m3")
    )
    torch.testing.assert_close(y[0], weight.float()[:, 0], rtol=0, atol=0, equal_nan=True)


def test_nan_stays_in_its_row():
    q, q_scale, pieces = merged()
    q.view(torch.uint8)[3, 7] = 0x7F
    for y in gemm(q, q_scale, pieces, SMALL):
        assert y[3].isnan().all()
        assert y[:3].isfinite().all()
        assert y[4:].isfinite().all()


def test_bfloat16_store_rounds_ties_to_even():
    # 1 + 2**-8 and 1 + 3 * 2**-8 lie half way between two bfloat16.
    q = torch.tensor([[1.0, 2.0**-8]]).to(E5M2)
    weight = torch.tensor([[1.0, 1.0], [1.0, 3.0]]).to(E4M3)
    spec = replace(SMALL, x="e5m2", x_scale="tensor", w_scale="none", pieces=1, a_pieces=0)
    (y,) = gemm(q, torch.ones(()), [Piece(weight, None)], spec)
    assert y.tolist() == [[1.0, 1.015625]]


def test_no_tokens_launch_nothing(monkeypatch):
    q, q_scale, pieces = merged(n=0)
    monkeypatch.setattr("falqon_fx.kernels.gemm.launch.load", None)
    assert [y.shape for y in gemm(q, q_scale, pieces, SMALL)] == [(0, 40), (0, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pieces": 3}, "2 pieces"),
        ({"x": "e5m2"}, "takes .* e5m2"),
        ({"x_scale": "tensor"}, "x_scale='tensor'"),
        ({"w_scale": "tensor"}, "w_scale='tensor'"),
        ({"even_k": True, "block_k": 128}, "K = 64 is not a multiple of 128"),
        ({"operands": "fp8"}, "interpreter needs"),
        ({"layout": "kn", "pieces": 1, "a_pieces": 0}, "2 pieces"),
        ({"extra": 16, "a_pieces": 0}, "left and right"),
    ],
)
def test_bad_input_is_explained(change, message):
    q, q_scale, pieces = merged()
    with pytest.raises(ValueError, match=message):
        gemm(q, q_scale, pieces, replace(SMALL, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operands": "int8"}, "operands='int8'"),
        ({"block_m": 48}, "block_m=48"),
        ({"a_pieces": 3}, "a_pieces=3 of pieces=2"),
        ({"extra": 8, "a_pieces": 0}, "extra=8"),
        ({"extra": 16}, "O_A must be there"),
        ({"layout": "kn"}, "layout='kn': one piece"),
        ({"k_pieces": 2}, "k_pieces: one output"),
        ({"accumulation": "promoted"}, "accumulation='promoted'"),
    ],
)
def test_bad_spec_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("k", [32, 48])
def test_descriptors_read_what_pointers_read(k, persistent):
    q, q_scale, pieces = merged(k=k, out=37)
    tma = replace(SMALL, memory="tma", persistent=persistent, even_k=False)
    for by_pointer, by_tma in zip(
        gemm(q, q_scale, pieces, SMALL), gemm(q, q_scale, pieces, tma), strict=True
    ):
        torch.testing.assert_close(by_tma, by_pointer, rtol=0, atol=0)
    stored = replace(tma, layout="kn", pieces=1, a_pieces=0, w_scale="none")
    weight = codes(k, 48, E4M3, 7)
    check(q, q_scale, [Piece(weight, None)], stored)


def test_pieces_of_a_descriptor_are_aligned_rows_of_one_tensor():
    q, q_scale, pieces = merged()
    spec = replace(SMALL, memory="tma")
    apart = [replace(pieces[0], weight=pieces[0].weight.clone()), pieces[1]]
    with pytest.raises(ValueError, match="rows of one tensor"):
        gemm(q, q_scale, apart, spec)
    q, q_scale, pieces = merged(k=50)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        gemm(q, q_scale, pieces, spec)


def test_bound_is_not_loose():
    """A wrong scale of one row, or a missing last column, is far beyond the bound."""
    q, q_scale, pieces = merged()
    y = gemm(q, q_scale, pieces, SMALL)[0]
    wrong = replace(pieces[0], scale=pieces[0].scale.roll(1, 0))
    with pytest.raises(AssertionError, match="beyond the bound"):
        expected(q, q_scale, wrong, SMALL, torch.bfloat16).assert_holds(y)
    shorter = replace(pieces[0], weight=pieces[0].weight[:, :-1])
    with pytest.raises(AssertionError, match="beyond the bound"):
        expected(q[:, :-1], q_scale, shorter, SMALL, torch.bfloat16).assert_holds(y)
    assert_within(y, y, 0.0)
