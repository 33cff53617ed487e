"""What is chosen from, what falls out and why, and what the candidates give."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from falqon_fx import FalqonConfig, rewrite, serving
from falqon_fx.kernels import dispatch, loader
from falqon_fx.kernels.choice import Choices, run_once
from falqon_fx.kernels.dispatch import Contest, Options
from falqon_fx.kernels.gemm import Piece, Product
from falqon_fx.kernels.tiles import GemmProblem, gemm_specs
from falqon_fx.numerics import E4M3, E5M2
from falqon_fx.passes.kernels import architecture_of
from tests.sites import randn, takes_row_scales
from tests.spellings import HandWritten, Spelling
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
    return dispatch.forward_contest(q, scale, [w, a], 1, BF16, BF16, Options())


@pytest.mark.skipif(not takes_row_scales(), reason="torch's _scaled_mm takes no row scales on CPU")
def test_o_by_the_library_and_o_a_by_a_generated_kernel():
    w = Piece(fp8(48, 64, E4M3, 0), positive(48, 1))
    a = Piece(fp8(16, 64, E4M3, 2), positive(16, 3))
    q, scale = fp8(20, 64, E4M3, 4), positive(20, 5)
    contest = dispatch.forward_contest(q, scale, [w, a], 1, BF16, BF16, Options())
    (name,) = [name for name in contest.candidates if name.startswith("scaled_mm+triton:")]
    y, out_a = contest.candidates[name]()
    exact(q, scale, w, BF16).assert_holds(y)
    exact(q, scale, a, BF16).assert_holds(out_a)
    assert out_a.is_contiguous()
    # It is one of the library's, by name.
    assert choose(contest, "scaled_mm").winner in ("scaled_mm", name)


def test_a_rank_beyond_the_kernels_falls_to_the_next_with_the_reason():
    piece = Piece(fp8(48, 64, E4M3, 0), positive(48, 1), None, randn(20, 300), randn(48, 300))
    q, scale = fp8(20, 64, E4M3, 4), positive(20, 5)
    contest = dispatch.forward_contest(q, scale, [piece], 0, F32, F32, Options())
    choice = choose(contest)
    assert not choice.winner.startswith("triton")
    assert choice.refused["triton"] == "rank 300, more than 256"
    assert "not triton: rank 300, more than 256" in str(choice)
    (y,) = contest.candidates[choice.winner]()
    exact(q, scale, piece, F32).assert_holds(y)
    with pytest.raises(ValueError, match=r"no kernel takes forward .*: triton: rank 300"):
        choose(contest, "triton")


def test_too_many_weights_at_once_say_so():
    w = [Piece(fp8(16, 64, E4M3, i), positive(16, i)) for i in range(9)]
    q, scale = fp8(20, 64, E4M3, 4), positive(20, 5)
    choice = choose(dispatch.forward_contest(q, scale, w, 0, BF16, BF16, Options()))
    assert choice.refused["triton"] == "9 weights, more than 8"


@pytest.mark.parametrize(("k", "out"), [(64, 50), (50, 48)])
def test_sizes_that_the_library_does_not_take_fall_to_others(k, out):
    contest = forward(k=k, out=out)
    choice = choose(contest)
    for name in contest.candidates:
        assert (name in choice.seconds) != (name in choice.refused)
    assert "dequantize" in choice.seconds
    assert any(name.startswith("triton:") for name in choice.seconds)


def problem(**change) -> GemmProblem:
    made = GemmProblem(
        n=4096,
        k=4096,
        rows=(4096,),
        a_pieces=0,
        x="e4m3",
        x_scale="row",
        w_scale="row",
        out_dtype="float16",
        a_dtype="float32",
        rank=64,
        one_tensor=True,
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
    contest = dispatch.grad_x_contest(products, None, None, BF16, Options(transpose=transpose))
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
    results = [run()[0] for run in usable]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize(
    ("capability", "warned"), [((8, 0), 1), ((8, 6), 1), ((8, 9), 0), ((9, 0), 0)]
)
def test_a_card_below_sm_89_is_told_once_what_it_loses(monkeypatch, capability, warned):
    dispatch._warn_below_fp8.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    number = capability[0] * 10 + capability[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert dispatch.architecture(torch.device("cuda", 0)) == number
    assert len(caught) == warned
    for item in caught:
        text = str(item.message)
        assert f"Old Card (sm_{number}) has no FP8 tensor cores" in text
        assert "Memory is saved, time is not" in text
    dispatch._warn_below_fp8.cache_clear()


def test_the_header_of_a_generated_file_names_the_sites_that_it_serves(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "_paths", {})
    monkeypatch.setattr(loader, "_served", {})
    dispatch._specs.cache_clear()
    loader.load.cache_clear()
    model = torch.fx.symbolic_trace(HandWritten(Spelling(out=48, features=64)))
    (site,) = rewrite(model, (randn(5, 64),)).report.sites
    for i in range(8):
        serving.announce(32, 64, f"layers.{i}.k_proj")
    options = Options(kernel="triton")
    q, scale = fp8(20, 64, E4M3, 0), positive(20, 1)
    w, k = (
        Piece(fp8(48, 64, E4M3, 2), positive(48, 3)),
        Piece(fp8(32, 64, E4M3, 4), positive(32, 5)),
    )
    dispatch.forward(q, scale, [w], 0, F32, F32, options)
    (only,) = tmp_path.glob("gemm*.py")
    assert f"# Serves: O of 1 site.\n# Sites: {site.path}\nimport triton\n" in only.read_text()
    dispatch.forward(q, scale, [w, k], 0, F32, F32, options)
    (both,) = set(tmp_path.glob("gemm*.py")) - {only}
    text = " ".join(line.strip("# ") for line in both.read_text().split("import")[0].splitlines())
    named = ", ".join([site.path, *(f"layers.{i}.k_proj" for i in range(5))])
    assert f"Sites: {named} and 3 more" in text
    grad = Product(fp8(20, 48, E5M2, 6), positive(20, 7), fp8(48, 64, E4M3, 8))
    dispatch.grad_x([grad], None, None, F32, replace(options, transpose="kernel"))
    (back,) = set(tmp_path.glob("gemm*.py")) - {only, both}
    assert f"# Sites: {site.path}\n" in back.read_text()
    loader.load.cache_clear()
    dispatch._specs.cache_clear()


def test_on_amd_only_what_has_been_tried_there(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(dispatch, "runs_interpreted", lambda tensor: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    choice = choose(forward())
    assert choice.refused["triton"] == "no kernel has been tried on an AMD GPU"
    assert "dequantize" in choice.seconds
    choice = choose(dispatch.grad_b_contest(randn(8, 16), randn(8, 4), 1.0, F32))
    assert choice.winner == "dequantize"
    assert architecture_of(torch.device("cuda", 0), FalqonConfig()) == 0
