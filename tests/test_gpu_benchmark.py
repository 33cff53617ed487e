"""benchmarks/gpu.py without a GPU: its whole flow at toy sizes, how its targets are computed."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sites import takes_row_scales

pytest.importorskip("peft")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# numpy, which the interpreter computes with, announces what hashing does on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


@pytest.fixture(scope="module")
def benchmark():
    """Import a module of benchmarks/, whose scripts import each other by plain name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
def test_the_whole_flow_at_toy_sizes(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path / "cache"))
    results = set((BENCHMARKS / "results").iterdir())
    assert benchmark("gpu").main(["--tiny", "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert set((BENCHMARKS / "results").iterdir()) == results
    files = {
        file.suffix: file for file in (tmp_path / "out").iterdir() if "kernels" not in file.name
    }
    assert set(files) == {".json", ".csv", ".png", ".md"}
    content = json.loads(files[".json"].read_text())
    assert not content["failures"]
    assert not content["dropped"]
    assert {t["verdict"] for t in content["targets"]} == {"not measured"}
    assert {c["what"] for c in content["checked"]} >= {
        "O",
        "O of siblings",
        "O_A",
        "O_A of several",
        "O, adapter, bias",
        "O of siblings, adapters, bias",
        "O, O_A",
        "dL/dx",
        "dL/dx, adapter",
        "dL/dx of siblings",
        "dL/dx of siblings, one adapter",
        "O of NVFP4",
        "dL/dx of NVFP4",
        "dL/dB, dL/dA",
        "Wᵀ",
        "cast",
        "casts of adapters",
        "update",
        "three steps",
    }
    library = {"scaled_mm", "scaled_mm+triton"} if takes_row_scales() else set()
    kinds = {c["kernel"].split(":")[0] for c in content["checked"]}
    assert kinds >= {"triton", "dequantize", "inductor", "inductor+transpose"} | library
    with files[".csv"].open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["checkpointing"] for row in rows if row["contender"] == "falqon"] == [
        "False",
        "True",
    ]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert {"falqon, A frozen", "falqon, nvfp4", "falqon, rows"} <= {
        row["contender"] for row in rows
    }
    assert {u["what"] for u in content["updates"]} == {"casts", "rows"}
    page = files[".md"].read_text()
    assert page.count("not measured") == len(content["targets"])
    assert "nan" not in page


def test_what_the_budget_cannot_pay_is_named(benchmark):
    budget = benchmark("gpu_measure").Budget(100.0)
    assert budget.run("first", "a", lambda: "done", guess=90.0) == "done"
    assert budget.run("second", "a", lambda: "again", guess=200.0) == "again"  # the first was quick
    assert budget.run("third", "b", lambda: "never", guess=200.0) is None
    assert budget.dropped == ["third"]


def step(benchmark, **change):
    names = [f.name for f in dataclasses.fields(benchmark.StepRow)]
    fields: dict[str, Any] = dict.fromkeys(names, 0.0)
    fields |= {"shape": "llama-7b", "batch": 1, "length": 4096, "rank": 16, "contender": "falqon"}
    fields |= {"checkpointing": False, "whole_seconds": 1.0, "linear_bytes_ratio": 0.505}
    return benchmark.StepRow(**(fields | change))


def kernel(benchmark, what, candidate, seconds, **change):
    fields = {
        "what": what,
        "candidate": candidate,
        "mode": "row",
        "accumulation": "fast",
        "tokens": 4096,
        "out": 4096,
        "features": 4096,
        "rank": 16,
        "seconds": seconds,
        "spread": 0.0,
        "how": "calls",
        "of_library": 1.0 / seconds,
        "of_ceiling": 0.5,
        "chosen": True,
    }
    return benchmark.KernelRow(**(fields | change))


def test_targets(benchmark):
    steps_module, kernels_module = benchmark("gpu_steps"), benchmark("gpu_kernels")
    steps = [
        step(steps_module),
        step(steps_module, contender="peft + inductor", whole_seconds=1.7),
        step(steps_module, contender="peft + inductor, fp32 adapter", whole_seconds=1.6),
        step(steps_module, contender="nf4", whole_seconds=2.3),
        step(steps_module, shape="llama-3-8b", whole_seconds=0.2),
        step(steps_module, shape="llama-3-8b", whole_seconds=0.27, checkpointing=True),
    ]
    kernels = [
        kernel(kernels_module, "O alone", kernels_module.LIBRARY, 1.0, chosen=False),
        kernel(kernels_module, "O alone", "triton:a", 0.9),
        kernel(kernels_module, "O alone", "triton:b", 2.0, chosen=False),
        kernel(kernels_module, "O_A", "triton:a", 0.05),
        kernel(kernels_module, "O with the adapter", "triton:a", 1.0),
        kernel(kernels_module, "O with the adapter", "scaled_mm", 3.0, chosen=False),
    ]
    updates = [
        kernels_module.UpdateRow("casts", "llama-7b", 16, 224, 0.0004, 0.0),
        kernels_module.UpdateRow("casts", "llama-7b", 64, 224, 0.0006, 0.0),
        kernels_module.UpdateRow("rows", "llama-7b", 16, 224, 0.0002, 0.0, 0.0),
    ]
    found = benchmark("gpu_targets").targets(steps, kernels, updates)
    by_name = {t.what: t for t in found}
    assert len(by_name) == len(found) == 15

    def check(name, value, verdict):
        assert by_name[name].found == (None if value is None else pytest.approx(value))
        assert by_name[name].verdict == verdict

    # The faster of the two adapters counts.
    check("7B, sequence 4096: speed against bf16 PEFT + inductor", 1.6, "missed")
    check("7B, 8k tokens of sequence <= 1024: the same", None, "not measured")
    check("7B: speed against NF4, compiled", None, "not measured")
    check("7B: speed against NF4 as bitsandbytes runs", 2.3, "met")
    check("Llama-3-8B, rank 16, 4096: tokens/s", 4096 / 0.2, "met")
    check("the same with checkpointing: tokens/s", 4096 / 0.27, "missed")
    check("forward: the chosen plan against _scaled_mm, geometric mean", 1 / 1.05, "met")
    check("the same, the least", 1 / 1.05, "met")
    check("our own kernel against _scaled_mm, tensorwise", None, "not measured")
    check("the same, rowwise", 1 / 0.9, "met")
    check("casts of all adapters / step, 7B, 4k tokens", 0.0004, "met")
    check("casts of all adapters, 7B, rank 64, ms", 0.6, "missed")
    check('update="rows": update of all sites, 7B, ms', 0.2, "met")
    check("FP8 linears / their bf16 bytes, 7B, rank 16", 0.505, "met")
    check("FP8 linears / their bf16 bytes, 7B, rank 64", None, "not measured")
