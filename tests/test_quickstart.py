"""examples/quickstart.py as a user runs it, and its notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.scripts import load

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_notebook_is_the_script():
    """`python examples/notebook.py` runs and writes it anew."""
    script = load(EXAMPLES / "notebook.py")
    wanted, found = script.notebook(), nbformat.read(script.NOTEBOOK, as_version=4)
    nbformat.validate(found)
    assert [cell.source for cell in found.cells] == [cell.source for cell in wanted.cells]


def test_the_notebook_shows_what_it_printed():
    """Each cell was run, in order, without an error; those that say or plot something show it."""
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [str(cell.outputs) for cell in cells]
    assert not [output for output in shown if "'output_type': 'error'" in output]
    assert not [output for output in shown if "Warning" in output or "/site-packages/" in output]
    for cell, output in zip(cells, shown, strict=True):
        assert ("->" in output) == ("\nsay(" in f"\n{cell.source}"), cell.source
        assert ("image/png" in output) == ("pyplot.plot" in cell.source), cell.source
        assert ("Training Loss" in output) == ("trainer.train()" in cell.source), cell.source


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {"MPLBACKEND": "Agg", "FALQON_CACHE": str(folder / "cache")}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_from_nothing_to_a_served_adapter(tmp_path):
    printed = run([sys.executable, str(EXAMPLES / "quickstart.py")], tmp_path)
    answers = [line.partition(" -> ")[2] for line in printed.splitlines() if " -> " in line]
    before, after, in_peft = answers
    assert len({before, after}) == 2
    assert in_peft
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "fp8-model" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    losses = [float(part.split("'")[0]) for part in printed.split("{'loss': '")[1:]]
    assert len(losses) == 30
    # Batches of 8 differ among themselves; the mean of ten falls far below that of the first ten.
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    script = load(EXAMPLES / "notebook.py")
    done = script.run(script.notebook(), tmp_path)
    assert (tmp_path / "adapter").is_dir()
    assert sum("->" in str(cell.get("outputs", "")) for cell in done.cells) == 3
