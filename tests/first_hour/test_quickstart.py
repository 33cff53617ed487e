"""The notebook of examples/quickstart.py; test_wheel.py runs the script."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.scripts import load

EXAMPLES = Path(__file__).parents[2] / "examples"


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


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    script = load(EXAMPLES / "notebook.py")
    done = script.run(script.notebook(), tmp_path)
    assert (tmp_path / "adapter").is_dir()
    assert sum("->" in str(cell.get("outputs", "")) for cell in done.cells) == 3
