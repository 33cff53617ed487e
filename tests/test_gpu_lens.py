"""benchmarks/gpu_lens.py: what a small layer launches on a GPU, from Inductor's code for one."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._triton import has_triton

from falqon_fx.cost.step.decoder import Decoder
from falqon_fx.cost.step.figures import figures_for
from falqon_fx.cost.step.launches import Timer
from falqon_fx.cost.step.layer import Step, kept
from falqon_fx.cost.step.whole import layer_of
from tests.parameters import slow
from tests.versions import needs_build_without_driver

pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = needs_build_without_driver
TINY = Decoder("tiny", 256, 512, 1, 4, 4, 64, 32000, "lens.models")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Of a layer of "tiny". The casts of ours: the attention's output, its dL/dv, and the gradient that
# comes from outside of the graph; those of PEFT: dL/dO times the scaling, where nothing before it
# can take that up. PEFT adds the adapter's part to v and to the attention's gradient by itself. The
# bytes tell a tensor that one launch stores twice.
COUNTS = {
    # run: launches, python_ops, passes, casts, bytes_written
    "falqon": (49, 0, 0, 3, 1_694_200),
    "falqon_frozen_a": (45, 0, 0, 3, 1_646_072),
    "falqon_fp8": (52, 0, 0, 3, 1_617_808),
    "falqon_nvfp4": (49, 0, 0, 3, 1_694_200),
    "inductor": (73, 0, 2, 2, 2_346_520),
    # After `prepare`, without a calibration and with 16 ranks and 16 channels.
    "falqon_prepared": (49, 0, 0, 3, 1_694_200),
    "falqon_calibrated": (56, 0, 0, 6, 2_137_240),
    "falqon_calibrated_fp8": (59, 0, 0, 5, 1_875_536),
    "falqon_int8": (111, 0, 0, 10, 4_158_200),
    "falqon_int8_calibrated": (159, 0, 0, 12, 4_723_352),
}


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def seen(benchmarks, tmp_path_factory):
    """The numbers of a run for a small layer, as the file has them."""
    found: dict[str, Any] = {}

    def of(run: str) -> Any:
        if run not in found:
            file = tmp_path_factory.mktemp("lens") / "lens.json"
            size = ["--model", "tiny", "--tokens", "64", "--rank", "8", "--no-host"]
            files = ["--json", str(file), "--text", str(file.with_suffix(".md"))]
            importlib.import_module("gpu_lens").main([*size, "--runs", run, *files])
            found[run] = json.loads(file.read_text())["runs"][run]
        return found[run]

    return of


# Each run takes 7 seconds: the fast tests have what is the default, and what it is compared with.
RUNS = [run if run in ("falqon", "inductor") else slow(run) for run in COUNTS]
each_run = pytest.mark.parametrize("run", RUNS)


@each_run
def test_counts(seen, run):
    names = ("launches", "python_ops", "passes", "casts", "bytes_written")
    assert tuple(seen(run)[name] for name in names) == COUNTS[run]


def test_launches_of_peft_and_inductor(seen):
    run = seen("inductor")
    attention = "_scaled_dot_product_flash_attention"
    assert launched(run, "forward") == {"triton": 6, "mm": 21, attention: 1}
    assert launched(run, "backward") == {"triton": 7, "mm": 35, f"{attention}_backward": 3}


def by_library(name: str, file: Path) -> dict[str, Any]:
    """A run whose products are the library's."""
    size = ["--model", "tiny", "--tokens", "64", "--rank", "16", "--no-host"]
    files = ["--json", str(file), "--text", str(file.with_suffix(".md"))]
    words = ["--kernel", "scaled_mm", "--runs", name, *files]
    importlib.import_module("gpu_lens").main([*size, *words])
    run: dict[str, Any] = json.loads(file.read_text())["runs"][name]
    return run


@pytest.mark.slow
def test_the_library_adds_in_place(benchmarks, tmp_path):
    """O of seven sites, and dL/dx of the four groups; each would be a copy and an addition."""
    run = by_library("falqon", tmp_path / "lens.json")
    for direction, count in (("forward", 7), ("backward", 4)):
        names = launched(run, direction)
        assert (names["addmm_"], names["addmm"], names["copy of addmm"]) == (count, 0, 0)


@pytest.mark.slow
def test_the_library_reads_w_with_room_for_adapters(benchmarks, tmp_path):
    """The arithmetic counts as many launches. RoPE stores the most of what Inductor writes, two
    activations; [W | b] of the least site would be 256 x 272.
    """
    run = by_library("falqon_fp8", tmp_path / "lens.json")
    step = Step(TINY, 1, 64, 16, "fp8", transpose="store")
    theirs_win = figures_for("H100").given(["own_gemm=1", "summed_gemm=1"])
    launches = layer_of("falqon", step, Timer(theirs_win))
    assert run["launches"] == sum(one.kernels for one in launches)
    ahead = [one for one in run["forward"]["launches"] if one["kernel"].startswith("triton_poi")]
    assert max(one["writes"] for one in ahead) == 2 * 2 * 64 * 256 < 256 * 272


def launched(run, direction):
    return Counter(
        "triton" if launch["kernel"].startswith("triton_") else launch["kernel"]
        for launch in run[direction]["launches"]
    )


def test_what_the_kernels_in_the_graph_write(seen):
    """O of gate and up is stored once, and the parts of the adapters' gradients add up to float32
    gradients of A [8, in] and B [out, 8].
    """
    run = seen("falqon")
    stored = [part["writes"] for part in run["forward"]["launches"] if part["kernel"] == "gemm"]
    assert 2 * 64 * 512 * 2 in stored
    added = [part["writes"] for part in run["backward"]["launches"] if part["kernel"] == "add_up"]
    sites = [(256, 256)] * 4 + [(256, 512)] * 2 + [(512, 256)]
    assert sum(added) == sum(4 * 8 * (size_in + size_out) for size_in, size_out in sites)


@pytest.mark.parametrize("run", RUNS[:5])  # which knows no calibration
def test_the_arithmetic_of_a_step_counts_what_is_seen_here(seen, run):
    """`falqon-fx cost --step` counts no scales of rows (4 bytes to 256 features and more). With
    adapters in FP8 b has its 8 columns in rows of 16.
    """
    step = Step(TINY, 1, 64, 8, transpose="store")
    if run == "falqon_fp8":
        step = replace(step, adapter_dtype="fp8")
    name = {"falqon_fp8": "falqon", "inductor": "peft"}.get(run, run)
    ours_win = figures_for("H100").given(["own_gemm=1e18", "summed_gemm=1e18"])
    launches = sum(one.kernels for one in layer_of(name, step, Timer(ours_win)))
    assert launches == seen(run)["launches"]
    tolerance = (6 if run == "falqon_fp8" else 4) / 256
    assert kept(step, name) == pytest.approx(seen(run)["kept_bytes"], rel=tolerance)


@pytest.fixture
def passes(benchmarks):
    """For 64 tokens and sites of 32 features; a weight of 64 x 64, and O that a product stored."""
    of = importlib.import_module("lens.passes")
    weight, out = torch.empty(64, 64), torch.empty(64, 64)
    sorting = of.Passes(of.Tokens(1, 64, 32), [weight])
    assert sorting.sort("mm", ["aten.mm"], [torch.empty(64, 64), weight], [out]) == "product"
    return sorting, weight, out


@pytest.mark.parametrize(
    ("kernel", "ops", "read", "kind"),
    [
        ("triton_0", ["aten.add", "aten.view"], ["out"], "pass"),
        ("copy", ["aten.copy_"], ["out"], "pass"),
        ("add_up", [], ["out"], "pass"),
        ("addmm", ["aten.addmm"], ["out", "x"], "pass"),
        ("addmm_", ["aten.addmm_"], ["out", "x"], "pass"),
        ("mm", ["aten.mm"], ["out", "weight"], "product"),
        ("zero_", ["aten.zero_"], [], "pass"),
        ("triton_1", ["falqon.merged_linear"], ["x"], "cast"),
        ("triton_2", ["falqon.merged_linear", "aten.silu"], ["out"], ""),
        ("triton_3", ["falqon.merged_linear", "aten.add"], ["out", "x"], ""),
        ("transpose", [], ["weight"], ""),
    ],
)
def test_kinds_of_launches(passes, kernel, ops, read, kind):
    sorting, weight, out = passes
    given = {"weight": weight, "out": out, "x": torch.empty(64, 64)}
    reads = [given[name] for name in read]
    assert sorting.sort(kernel, ops, reads, [torch.empty(64, 64)]) == kind


def test_a_buffer_is_what_was_written_last(passes):
    sorting, weight, out = passes
    assert sorting.sort("triton_0", ["aten.silu"], [torch.empty(64, 64)], [out]) == ""
    assert sorting.sort("triton_1", ["falqon.merged_linear"], [out], []) == "cast"
    copy = torch.empty(64, 64)
    assert sorting.sort("transpose", [], [weight], [copy]) == ""
    assert sorting.sort("transpose", [], [copy], [torch.empty(64, 64)]) == ""


@pytest.mark.parametrize("trained", [True, slow(False)])
def test_kept_for_backward(seen, trained):
    """A token: q, k, v, the attention's output and what the two norms read, of 256 in bfloat16;
    gate and up, of 512; O_A of seven sites, of 8; float32 of four heads and of the two norms. Where
    A trains, the FP8 x of four groups of sites with its scale.
    """
    of_a_token = 2 * (6 * 256 + 2 * 512 + 7 * 8) + 4 * (4 + 2)
    of_a_token += (3 * 256 + 512 + 4 * 4) if trained else 0
    run = seen("falqon" if trained else "falqon_frozen_a")
    assert sum(size for _, shape, size in run["kept"] if 64 in shape) == 64 * of_a_token


@each_run
def test_inputs_are_fit_for_cuda_graphs(seen, run):
    for direction in ("forward", "backward"):
        assert seen(run)[direction]["no_cuda_graph"] == ""
        assert seen(run)[direction]["mutated_not_static"] == []


def test_no_card_is_left_behind(seen):
    assert seen("falqon")
    assert not has_triton()
    assert torch.empty(2, requires_grad=True).sum().backward() is None
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
