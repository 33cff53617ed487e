"""What is chosen from, what falls out and why, and what the candidates give."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from falqon_fx import FalqonConfig, _compat
from falqon_fx.kernels import hardware
from falqon_fx.kernels.gemm.forms import PROBLEM
from falqon_fx.kernels.gemm.launch import Piece, Product
from falqon_fx.kernels.gemm.tiles import GemmProblem, gemm_specs
from falqon_fx.kernels.products import activation_cast, adapters, dispatch, inductor
from falqon_fx.kernels.products import contest as contests
from falqon_fx.kernels.products.choice import Choices, refuses, run_once
from falqon_fx.kernels.products.contest import Contest, Options
from falqon_fx.report.kernels import architecture_of
from falqon_fx.site.numerics import E4M3, E5M2
from falqon_fx.site.spec import SiteSpec
from tests.sites import needs_row_scales, randn, takes_row_scales
from tests.tolerances import Approx

F32, BF16 = torch.float32, torch.bfloat16


def fp8(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return randn(rows, columns, seed=seed).to(dtype)


def positive(rows: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed)) + 0.1


def exact(q, scale, piece, *dtypes):
    """O of a piece in float64, with the bound of a float32 accumulator and the roundings."""
    y = (Approx.exact(q.double()) @ Approx.exact(piece.weight.double()).t()).rounded(F32)
    y = (y * Approx.exact(scale.double())).rounded(F32)
    y = (y * Approx.exact(piece.scale.double().t())).rounded(F32)
    if piece.left is not None:
        y = y.addmm(Approx.exact(piece.left), Approx.exact(piece.right).t(), F32)
    if piece.bias is not None:
        y = (y + Approx.exact(piece.bias)).rounded(F32)
    return y.rounded(*dtypes)


def exact_grad_x(product):
    """dL/dx of a site in float64; a product of bfloat16 operands is rounded before it is scaled."""
    y = Approx.exact(product.q.double()) @ Approx.exact(product.weight.double())
    scaled = y.rounded(F32, BF16) * Approx.exact(product.q_scale.double())
    return scaled.rounded(F32, BF16)


def choose(contest: Contest, wanted: str = "auto"):
    """What the first call decides where each candidate takes the same time."""
    return Choices("card", run_once).get(contest.key, contest.candidates, wanted)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path))


def forward(rank: int = 16, k: int = 64, out: int = 48, **change) -> Contest:
    w = Piece(fp8(out, k, E4M3, 0), positive(out, 1), **change)
    a = Piece(fp8(rank, k, E4M3, 2), positive(rank, 3))
    q, scale = fp8(20, k, E4M3, 4), positive(20, 5)
    return dispatch.forward(q, scale, [w, a], 1, BF16, BF16, Options())


@needs_row_scales
def test_o_by_the_library_and_o_a_by_a_generated_kernel():
    w = Piece(fp8(48, 64, E4M3, 0), positive(48, 1))
    a = Piece(fp8(16, 64, E4M3, 2), positive(16, 3))
    q, scale = fp8(20, 64, E4M3, 4), positive(20, 5)
    contest = dispatch.forward(q, scale, [w, a], 1, BF16, BF16, Options())
    (name,) = [name for name in contest.candidates if name.startswith("scaled_mm+triton:")]
    y, out_a = contest.candidates[name]()
    exact(q, scale, w, BF16).assert_holds(y)
    exact(q, scale, a, BF16).assert_holds(out_a)
    assert out_a.is_contiguous()
    # It is one of the library's, by name.
    assert choose(contest, "scaled_mm").winner in ("scaled_mm", name)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_rank_beyond_the_kernels_is_added_behind_them(dtype):
    """With the bias, and beside a piece of a smaller rank."""
    pieces = [
        Piece(fp8(48, 64, E4M3, i), positive(48, i), randn(48, seed=i), left, right)
        for i, rank in enumerate((300, 8))
        for left, right in [(randn(20, rank).to(dtype), randn(48, rank).to(dtype))]
    ]
    q, scale = fp8(20, 64, E4M3, 4), positive(20, 5)
    contest = dispatch.forward(q, scale, pieces, 0, dtype, dtype, Options())
    (name,) = [name for name in contest.candidates if name.startswith("triton")]
    for piece, y in zip(pieces, contest.candidates[name](), strict=True):
        # The product is rounded before the rest is added, and the sum before the bias is.
        y64 = (Approx.exact(q.double()) @ Approx.exact(piece.weight.double()).t()).rounded(F32)
        y64 = (y64 * Approx.exact(scale.double())).rounded(F32)
        y64 = (y64 * Approx.exact(piece.scale.double().t())).rounded(F32, dtype)
        y64 = y64.addmm(Approx.exact(piece.left), Approx.exact(piece.right).t(), dtype)
        (y64 + Approx.exact(piece.bias).rounded(dtype)).rounded(dtype).assert_holds(y)


@pytest.mark.parametrize("second", ["none", "float16"])
def test_biases_of_several_dtypes_are_added_in_float32(second):
    pieces = [Piece(fp8(48, 64, E4M3, i), positive(48, i)) for i in range(2)]
    pieces[0] = replace(pieces[0], bias=randn(48, seed=6))
    if second != "none":
        pieces[1] = replace(pieces[1], bias=randn(48, seed=7).half())
    q, scale = fp8(20, 64, E4M3, 4), positive(20, 5)
    contest = dispatch.forward(q, scale, pieces, 0, F32, F32, Options())
    choice = choose(contest, "triton")
    for piece, y in zip(pieces, contest.candidates[choice.winner](), strict=True):
        exact(q, scale, piece, F32).assert_holds(y)


def test_pieces_are_one_tensor_where_they_are_rows_of_it():
    """Not where their memory lies end to end by chance, as an allocator's blocks may."""
    memory = torch.zeros(2 * 48 * 64, dtype=torch.uint8)
    halves = [
        torch.frombuffer(memory.numpy(), dtype=torch.uint8, count=48 * 64, offset=i * 48 * 64)
        for i in range(2)
    ]
    apart = [half.view(48, 64).view(E4M3) for half in halves]
    assert apart[1].data_ptr() == apart[0].data_ptr() + apart[0].numel()
    whole = memory.view(96, 64).view(E4M3)
    q, scale = fp8(20, 64, E4M3, 4), positive(20, 5)
    for weights, one_tensor in (
        (apart, False),
        (whole.split(48), True),
        (whole[::2].split(24), False),
    ):
        pieces = [Piece(w, positive(len(w), 1)) for w in weights]
        contest = dispatch.forward(q, scale, pieces, 0, BF16, BF16, Options())
        assert f"one_tensor={one_tensor}" in contest.key


def grads_of_b(grad: Tensor, dtype: torch.dtype) -> Contest:
    """dL/dB of one adapter of rank 8."""
    out_a = randn(len(grad), 8)
    return adapters.adapter_grads([grad], out_a, [8], [1.0], [], [], dtype, "auto")


def test_dtypes_of_no_kernel_fall_to_the_next_with_the_reason():
    wide = torch.float64
    q, scale = fp8(20, 64, E4M3, 4), positive(20, 5)
    piece = Piece(fp8(48, 64, E4M3, 0), positive(48, 1))
    grad = randn(20, 48).double()
    product = Product(fp8(20, 48, E5M2, 0), scale, piece.weight)
    spec = str(SiteSpec("row", "pow2", "e5m2"))
    for contest, name, dtype in (
        (dispatch.forward(q, scale, [piece], 0, wide, wide, Options()), "out_dtype", wide),
        (dispatch.grad_x([product], None, None, wide, Options()), "out_dtype", wide),
        (grads_of_b(grad, F32), "grad_dtype", F32),
        (grads_of_b(grad.float(), wide), "out_dtype", wide),
        (activation_cast.cast_fp8(grad, E5M2, spec), "input_dtype", F32),
    ):
        choice = choose(contest)
        why = f"{name}='float64': expected one of float32, bfloat16, float16"
        assert choice.refused["triton"] == why
        assert contest.candidates[choice.winner]()[-1].dtype == dtype


def test_too_many_weights_at_once_say_so():
    w = [Piece(fp8(16, 64, E4M3, i), positive(16, i)) for i in range(9)]
    q, scale = fp8(20, 64, E4M3, 4), positive(20, 5)
    choice = choose(dispatch.forward(q, scale, w, 0, BF16, BF16, Options()))
    assert choice.refused["triton"] == "9 weights, more than 8"


@pytest.mark.parametrize(("k", "out"), [(64, 50), (50, 48)])
def test_sizes_that_the_library_does_not_take_fall_to_others(k, out):
    contest = forward(k=k, out=out)
    choice = choose(contest)
    for name in contest.candidates:
        assert (name in choice.seconds) != (name in choice.refused)
    assert "dequantize" in choice.seconds
    assert any(name.startswith("triton:") for name in choice.seconds)


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize(("out", "refused"), [(48, False), (50, True)])
def test_a_gpus_library_is_asked_for_multiples_of_16_alone(out, refused):
    """While a graph is traced nothing is tried: the first that isn't known to refuse is taken."""
    with FakeTensorMode(), torch.device("cuda"):
        q, scale = torch.empty(20, 64, dtype=E4M3), torch.empty(20, 1)
        w = Piece(torch.empty(out, 64, dtype=E4M3), torch.empty(out, 1))
        a = Piece(torch.empty(8, 64, dtype=E4M3), torch.empty(8, 1))
        for pieces, a_pieces in (([w], 0), ([w, a], 1)):
            found = dispatch.forward(q, scale, pieces, a_pieces, BF16, BF16, Options()).candidates
            names = [name for name in found if name.startswith("scaled_mm")]
            asked = [name for name in names if not refuses(found[name])]
            assert asked == ([] if refused or a_pieces else ["scaled_mm"])


@pytest.mark.parametrize("kernel", ["auto", "max-autotune", "inductor"])
def test_inductors_templates_are_tried_where_autotuning_was_asked_for(kernel):
    q, scale = fp8(20, 64, E4M3, 4), torch.tensor(0.5)
    w, options = Piece(fp8(48, 64, E4M3, 0), scale), Options(kernel=kernel)
    products = [Product(fp8(20, 48, E5M2, 0), scale, w.weight)]
    for contest, name in (
        (dispatch.forward(q, scale, [w], 0, BF16, BF16, options), "inductor"),
        (dispatch.grad_x(products, None, None, BF16, options), "inductor+transpose"),
    ):
        assert (name in contest.candidates) == (kernel != "auto")
        if kernel == "inductor":
            assert choose(contest, kernel).winner == name
            (y,) = contest.candidates[name]()
            if name == "inductor":
                exact(q, scale, w, BF16).assert_holds(y)
            else:
                exact_grad_x(products[0]).assert_holds(y)
        else:
            wanted = choose(contest, kernel)
            assert set(wanted.seconds) | set(wanted.refused) == set(contest.candidates)


def test_inductor_compiles_more_shapes_than_dynamo_does_of_one_function():
    scale = torch.tensor(0.5)
    inductor._compiled.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        for out in (16, 32, 48):
            q, w = fp8(20, 64, E4M3, 4), Piece(fp8(out, 64, E4M3, 0), scale)
            contest = dispatch.forward(q, scale, [w], 0, BF16, BF16, Options(kernel="inductor"))
            (y,) = contest.candidates["inductor"]()
            assert y.shape == (20, out)


def test_what_inductor_can_not_compile_falls_to_the_next_with_the_reason(monkeypatch):
    def broken(a, b, *args, **options):
        return torch.mm(a.to(BF16), b.t())

    monkeypatch.setattr(_compat, "scaled_mm", broken)
    inductor._compiled.cache_clear()
    q, scale = fp8(20, 64, E4M3, 4), torch.tensor(0.5)
    w = Piece(fp8(48, 64, E4M3, 0), scale)
    contest = dispatch.forward(q, scale, [w], 0, BF16, BF16, Options(kernel="max-autotune"))
    choice = choose(contest, "max-autotune")
    why = "a and b must have same reduction dim, but got [20, 64] X [48, 64]."
    assert choice.refused["inductor"] == why
    assert choice.winner != "inductor"
    torch._dynamo.reset()
    inductor._compiled.cache_clear()


def problem(**change) -> GemmProblem:
    made = replace(
        PROBLEM, rows=(4096,), a_pieces=0, out_dtype="float16", a_dtype="float32", rank=64
    )
    return replace(made, **change)


@pytest.mark.parametrize("where", [80, 89, 90, 100, 120])
def test_float32_factors_of_the_extra_term_stay_outside_of_kernels_on_gpus(where):
    assert {(s.extra, s.bias, s.out_dtype) for s in gemm_specs(problem(bias="float16"), where)} == {
        (0, "none", "float32")
    }
    of_16_bits = gemm_specs(problem(a_dtype="bfloat16", out_dtype="bfloat16"), where)
    assert {s.extra for s in of_16_bits} == {64}


@pytest.mark.parametrize("out_dtype", [torch.float16, F32])
def test_what_a_kernel_leaves_over_is_added(out_dtype):
    """As on a GPU, with the interpreter's tiles."""
    bias = randn(48, seed=6).to(out_dtype)
    piece = Piece(fp8(48, 64, E4M3, 0), positive(48, 1), bias, randn(20, 8), randn(48, 8))
    q, scale = fp8(20, 64, E4M3, 4), positive(20, 5)
    alone = problem(k=64, rows=(48,), rank=0, out_dtype="float32")
    (spec,) = gemm_specs(alone, 0)
    whole = replace(alone, rank=8, out_dtype=str(out_dtype).removeprefix("torch."))
    (y,) = dispatch._generated(q, scale, [piece], spec, (), None, whole)
    assert y.dtype == out_dtype
    exact(q, scale, piece, out_dtype).assert_holds(y)


@pytest.mark.parametrize("transpose", ["auto", "transient", "store", "kernel"])
def test_transpose_decides_what_dl_dx_is_chosen_from(transpose):
    products = [Product(fp8(20, 48, E5M2, 0), positive(20, 1), fp8(48, 64, E4M3, 2))]
    contest = dispatch.grad_x(products, None, None, BF16, Options(transpose=transpose))
    ends = {name.partition("+")[2] for name in contest.candidates}
    assert (
        ends
        == {
            "auto": {"", "transpose"},
            "transient": {"", "transpose"},  # "": decoded operands, which need no transpose
            "store": {"", "stored"},
            "kernel": {""},
        }[transpose]
    )
    bare = [n for n in contest.candidates if n.startswith("triton") and "+" not in n]
    assert bool(bare) == (transpose in ("auto", "kernel"))
    usable = [
        run
        for name, run in contest.candidates.items()
        if takes_row_scales() or not name.startswith("scaled_mm")
    ]
    for run in usable:
        exact_grad_x(products[0]).assert_holds(run()[0])


@pytest.mark.parametrize(
    ("capability", "warned"), [((8, 0), 1), ((8, 6), 1), ((8, 9), 0), ((9, 0), 0)]
)
def test_a_card_below_sm_89_is_told_once_what_it_loses(monkeypatch, capability, warned):
    hardware._warn_below_fp8.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    number = capability[0] * 10 + capability[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert hardware.architecture(torch.device("cuda", 0)) == number
    assert len(caught) == warned
    for item in caught:
        text = str(item.message)
        assert f"Old Card (sm_{number}) has no FP8 tensor cores" in text
        assert "Memory is saved, time is not" in text
    hardware._warn_below_fp8.cache_clear()


def test_cards_with_the_tensor_cores_of_others_get_their_kernels(monkeypatch):
    monkeypatch.setattr(contests, "runs_interpreted", lambda tensor: False)
    found = {}
    for number in (100, 103, 120, 121):
        monkeypatch.setattr(hardware, "_number", lambda device, number=number: number)
        found[number] = [name for name in forward().candidates if name.startswith("triton:")]
    assert found[103] == found[100] != found[120] != []
    assert found[121] == []  # Triton would decode FP8 there


def test_on_amd_only_what_has_been_tried_there(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for place in (contests, adapters):
        monkeypatch.setattr(place, "runs_interpreted", lambda tensor: False)
    monkeypatch.setattr(hardware, "_number", lambda device: 94)
    choice = choose(forward())
    assert choice.refused["triton"] == "no kernel has been tried on an AMD GPU"
    assert "dequantize" in choice.seconds
    choice = choose(grads_of_b(randn(8, 16), F32))
    assert choice.winner == "dequantize"
    assert architecture_of(torch.device("cuda", 0), FalqonConfig()) == 0
