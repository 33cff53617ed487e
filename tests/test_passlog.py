from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError, RewriteReport
from falqon_fx.ops import lowering
from falqon_fx.passes import pipeline
from falqon_fx.report.repro import arguments, check
from falqon_fx.site.spec import SiteSpec
from falqon_fx_cli.main import main
from tests import fresh
from tests.models import Stack

PASSES = list(pipeline.PASSES)
LAST = f"{len(PASSES) - 1}_{PASSES[-1]}.txt"
TRAIN = """
import torch
from tests.models import Stack
torch.manual_seed(0)
model = torch.compile(Stack(), backend="falqon", options={"inner": "eager"})
model(torch.randn(3, 32)).sum().backward()
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def artifacts(folder: Path) -> dict[str, str]:
    """Name and payload of each artifact in a structured trace, as tlparse reads it: a JSON line,
    then the payload, each of its lines after a tab.
    """
    (file,) = folder.glob("*.log")
    found: dict[str, str] = {}
    name = ""
    for line in file.read_text().splitlines():
        if line.startswith("\t"):
            if name:
                found[name] += line[1:] + "\n"
            continue
        record = json.loads(line[line.index("{") :]) if "{" in line else {}
        name = record.get("artifact", {}).get("name", "")
        if name:
            found[name] = ""
    return found


# In a process of its own: pytest itself listens to every log.
SAYS_WHAT_IT_RENDERS = """
import falqon_fx.report.passlog as log
listing = log.listing
log.listing = lambda *given: (print("rendered"), listing(*given))[1]
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """What a process says, and the folder of its structured trace."""
    folder = tmp_path_factory.mktemp("trace")
    code = SAYS_WHAT_IT_RENDERS + TRAIN
    return run(code, TORCH_TRACE=str(folder), TORCH_LOGS="+falqon_fx"), folder


def test_the_structured_trace_shows_the_graph_behind_each_pass(traced):
    found = artifacts(traced[1])
    names = [name for name in found if name.startswith("falqon_")]
    assert names == [*(f"falqon_{i}_{name}" for i, name in enumerate(PASSES)), "falqon_report"]
    for i, name in enumerate(PASSES):
        text = found[f"falqon_{i}_{name}"]
        assert ("falqon.merged_linear(" in text) is (i >= PASSES.index("rewrite")), name
        assert ("falqon.proxy_update(" in text) is (i >= PASSES.index("insert_operands")), name
        assert "blocks.0.up.base_layer.weight: f32[48, 32]" in text
    assert len(RewriteReport.from_json(found["falqon_report"]).sites) == 4


REPORTED = "4 sites rewritten (4 with an adapter), 0 rejected, 0 left"


def test_torch_logs_shows_the_passes_and_renders_nothing_else(traced):
    """A graph is rendered once for the log and once for the trace."""
    done, _ = traced
    assert done.stdout.count("rendered") == 2 * len(PASSES)
    assert len(re.findall(r"graph after \w+:", done.stderr)) == len(PASSES)
    assert REPORTED in done.stderr
    assert "falqon.merged_linear(" in done.stderr


@pytest.mark.slow
def test_without_details_torch_logs_renders_nothing():
    done = run(SAYS_WHAT_IT_RENDERS + TRAIN, TORCH_LOGS="falqon_fx")
    assert "rendered" not in done.stdout
    assert REPORTED in done.stderr
    assert "graph after" not in done.stderr


@pytest.fixture
def dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What FALQON_DUMP leaves of one graph."""
    monkeypatch.setenv("FALQON_DUMP", str(tmp_path))
    torch._dynamo.reset()
    torch.compile(Stack(), backend="falqon", options={"inner": "eager"})(torch.randn(3, 32))
    return tmp_path / "graph_000"


def test_the_dump_holds_graphs_report_kernels_and_repros(dump):
    assert {file.name for file in dump.glob("*.txt")} == {
        f"{i}_{name}.txt" for i, name in enumerate(PASSES)
    }
    before, after = ((dump / name).read_text() for name in ("0_copy.txt", LAST))
    assert "merged_linear" not in before
    assert after.count("falqon.merged_linear(") == 4
    report = RewriteReport.from_json((dump / "report.json").read_text())
    assert len(report.sites) == 4
    assert report.options["update"] == "adapter"
    assert {path.name for path in dump.iterdir() if path.is_dir()} == {
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")
    }
    assert "def merged_linear(" in (dump / "blocks.0.up" / "kernel.py").read_text()


def test_a_second_graph_gets_a_folder_of_its_own(dump):
    torch.compile(Stack(1), backend="falqon", options={"inner": "eager"})(torch.randn(3, 32))
    assert (dump.parent / "graph_001" / "report.json").exists()


def test_a_repro_runs_alone(dump):
    code = (dump / "blocks.0.up" / "repro.py").read_text()
    assert fresh.run(code).stdout.startswith("right; O: ")


def test_the_command_checks_a_site_of_a_report(dump, tmp_path, capsys):
    report = str(dump / "report.json")
    assert main(["repro", report, "blocks.1.down", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["site"] == "blocks.1.down"
    assert set(found["ratios"]) == {"O", "O_A", "dL/dA", "dL/dB", "dL/dx"}
    assert (found["device"], found["kernel"], found["note"]) == ("cpu", "aten", "")
    assert main(["repro", report, "--write", str(tmp_path / "r.py")]) == 0
    assert "check(" in (tmp_path / "r.py").read_text()
    assert main(["repro", report, "blocks.1.dwon"]) == 1
    assert "'blocks.1.down'" in capsys.readouterr().err
    assert main(["repro", str(dump / "0_copy.txt")]) == 1
    assert "is no report" in capsys.readouterr().err


def test_the_command_lists_kernels_with_their_reason(dump, capsys):
    report = str(dump / "report.json")
    assert main(["kernels", report, "--source"]) == 0
    text = capsys.readouterr().out
    assert "aten: 4 sites, first blocks.0.up" in text
    assert "def merged_linear(" in text
    assert main(["kernels", report, "blocks.1.up", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["sites"] == ["blocks.1.up"]
    assert row["why"]


def spec_of(**options: str) -> str:
    return str(SiteSpec.from_config(FalqonConfig(**options)))


RESULTS = {"O", "O_A", "dL/dA", "dL/dB", "dL/dx"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": "amax", "grad_dtype": "e4m3"},
        {"granularity": "tensor"},
        {"granularity": "tensor", "scale": "amax"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("site", "results"),
    [
        ({}, RESULTS),
        ({"train_a": False}, RESULTS - {"dL/dA"}),
        ({"adapters": 0, "rank": 0}, {"O", "dL/dx"}),
        ({"adapters": 3, "dropout": 0.1}, RESULTS | {"dL/dx_A"}),
    ],
    ids=["A trained", "A frozen", "no adapter", "three adapters, dropout"],
)
def test_a_right_site_lies_within_its_bound(dtype, options, site, results):
    given = {"rank": 8, "adapter_dtype": "float32", "spec": spec_of(**options), **site}
    result = check(96, 72, tokens=33, scaling=2.0, dtype=dtype, **given)
    assert result.right, result
    assert result.ratios.keys() == results
    assert all(ratio > 1e-3 for ratio in result.ratios.values())  # the bound says something


@pytest.mark.parametrize("place", [0, 1], ids=["O", "O_A"])
def test_a_product_that_is_wrong_by_a_twentieth_lies_outside(place, monkeypatch, dump, capsys):
    """As a wrong scale would make it."""
    whole = lowering.merged_linear

    def wrong(*args: Any) -> list[torch.Tensor]:
        results = whole(*args)
        results[place] = results[place] * 0.95
        return results

    monkeypatch.setattr(lowering, "merged_linear", wrong)
    report = RewriteReport.from_json((dump / "report.json").read_text())
    result = check(**arguments(report.sites[0]))
    assert result.ratios[["O", "O_A"][place]] > 1
    assert not result.right
    assert main(["repro", str(dump / "report.json")]) == 3
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(
    ("name", "result"),
    [("grad_a", "dL/dA"), ("grad_b", "dL/dB"), ("merged_linear_grad_x", "dL/dx")],
)
def test_a_gradient_that_is_wrong_by_a_twentieth_lies_outside(name, result, dtype, monkeypatch):
    """In every dtype: no sum of the random data cancels, so the bound stays below that."""
    whole = getattr(lowering, name)
    monkeypatch.setattr(lowering, name, lambda *args: whole(*args) * 0.95)
    found = check(96, 72, 8, 33, 2.0, dtype, "float32", spec_of())
    assert {n for n, ratio in found.ratios.items() if ratio > 1} == {result}


def test_a_site_of_a_gpu_is_checked_on_the_cpu_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with torch.device("meta"):
        model, x = Stack(), torch.randn(3, 32)
    report = falqon_fx.explain(model, x, config=FalqonConfig(card="H100"))
    given = arguments(report.sites[0])
    assert given["device"] == "cuda"
    assert str(given["kernel"]).startswith("triton:")
    result = check(**given)
    assert result.right
    assert (result.device, result.kernel) == ("cpu", given["kernel"])
    assert f"on cpu (there is no GPU here, so {result.kernel} was not run)" in str(result)


def test_a_dump_without_sites_has_nothing_to_check(tmp_path, capsys):
    file = tmp_path / "report.json"
    file.write_text(RewriteReport(()).to_json())
    assert main(["repro", str(file)]) == 1
    assert "holds no rewritten site" in capsys.readouterr().err
    with pytest.raises(FalqonError, match="No site was rewritten"):
        RewriteReport(()).to_svg("a")
