from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from falqon_fx import FalqonError, RewriteReport, lowering
from falqon_fx.cli import main
from falqon_fx.repro import arguments, check
from tests.models import Stack

PASSES = ["copy", "normalize", "match", "plan", "autotune", "rewrite", "insert_updates", "verify"]
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


def test_the_structured_trace_shows_the_graph_behind_each_pass(tmp_path):
    run(TRAIN, TORCH_TRACE=str(tmp_path))
    found = artifacts(tmp_path)
    names = [name for name in found if name.startswith("falqon_")]
    assert names == [*(f"falqon_{i}_{name}" for i, name in enumerate(PASSES)), "falqon_report"]
    for i, name in enumerate(PASSES):
        text = found[f"falqon_{i}_{name}"]
        assert ("falqon.merged_linear(" in text) is (i >= PASSES.index("rewrite")), name
        assert ("falqon.proxy_update_(" in text) is (i >= PASSES.index("insert_updates")), name
        assert "blocks.0.up.base_layer.weight: f32[48, 32]" in text
    assert len(RewriteReport.from_json(found["falqon_report"]).sites) == 4


@pytest.mark.parametrize(("setting", "graphs"), [("falqon_fx", 0), ("+falqon_fx", len(PASSES))])
def test_torch_logs_shows_the_passes(setting, graphs):
    text = run(TRAIN, TORCH_LOGS=setting).stderr
    assert len(re.findall(r"graph after \w+:", text)) == graphs
    assert "4 sites rewritten, 0 rejected" in text
    assert ("falqon.merged_linear(" in text) is bool(graphs)


def test_nothing_is_rendered_unless_someone_looks():
    """In a process of its own: pytest itself listens to every log."""
    forbid = "import falqon_fx.passlog as log\nlog.listing = lambda *_: print('rendered')\n"
    assert run(forbid + TRAIN).stdout == ""
    look = run(
        forbid.replace("print('rendered')", "(print('rendered'), [])[1]") + TRAIN,
        TORCH_LOGS="+falqon_fx",
    )
    assert "rendered" in look.stdout


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
    before, after = ((dump / name).read_text() for name in ("0_copy.txt", "7_verify.txt"))
    assert "merged_linear" not in before
    assert after.count("falqon.merged_linear(") == 4
    assert len(RewriteReport.from_json((dump / "report.json").read_text()).sites) == 4
    assert {path.name for path in dump.iterdir() if path.is_dir()} == {
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")
    }
    assert "def merged_linear(" in (dump / "blocks.0.up" / "kernel.py").read_text()


def test_a_second_graph_gets_a_folder_of_its_own(dump):
    torch._dynamo.reset()
    torch.compile(Stack(1), backend="falqon", options={"inner": "eager"})(torch.randn(3, 32))
    assert (dump.parent / "graph_001" / "report.json").exists()


def test_a_repro_runs_alone(dump):
    code = (dump / "blocks.0.up" / "repro.py").read_text()
    assert run(code).stdout.startswith("right; O: ")


def test_the_command_checks_a_site_of_a_report(dump, tmp_path, capsys):
    report = str(dump / "report.json")
    assert main(["repro", report, "blocks.1.down", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["site"] == "blocks.1.down"
    assert set(found["ratios"]) == {"O", "O_A", "dL/dB"}
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("spec", ["row pow2 apply", "row amax hold", "tensor amax drop"])
def test_a_right_site_lies_within_its_bound(dtype, spec):
    full = f"{spec} e5m2 topk=10 stochastic seed=0 #0"
    result = check(96, 72, 8, 33, 2.0, dtype, "float32", full)
    assert result.right, result
    assert all(ratio > 1e-4 for ratio in result.ratios.values())  # the bound says something


@pytest.mark.parametrize("name", ["O", "O_A"])
def test_a_wrong_site_lies_outside(name, monkeypatch, dump, capsys):
    """A GEMM that loses 5 % of one result, as a wrong scale would."""
    whole = lowering.merged_linear

    def wrong(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        y, out_a = whole(*args)  # type: ignore[arg-type]
        return (y * 0.95, out_a) if name == "O" else (y, out_a * 0.95)

    monkeypatch.setattr(lowering, "merged_linear", wrong)
    report = RewriteReport.from_json((dump / "report.json").read_text())
    result = check(**arguments(report.sites[0]))  # type: ignore[arg-type]
    assert result.ratios[name] > 1
    assert not result.right
    assert main(["repro", str(dump / "report.json")]) == 3
    assert "WRONG" in capsys.readouterr().out


def test_a_dump_without_sites_has_nothing_to_check(tmp_path, capsys):
    file = tmp_path / "report.json"
    file.write_text(RewriteReport(()).to_json())
    assert main(["repro", str(file)]) == 1
    assert "holds no rewritten site" in capsys.readouterr().err
    with pytest.raises(FalqonError, match="No site was rewritten"):
        RewriteReport(()).to_svg("a")
