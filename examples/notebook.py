"""examples/quickstart.ipynb: the cells of examples/quickstart.py, run, with what they print.

    python examples/notebook.py

A cell begins at each ``# %% title``. Progress bars and warnings are left out.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat

SCRIPT = Path(__file__).with_name("quickstart.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
INSTALL = """In a clone of the repository, before this is opened (in Colab: in its terminal):

    pip install '.[examples]' && pip install --no-deps -r requirements-nodeps.txt"""
KEPT = {"text/plain", "text/html", "image/png"}


def notebook() -> Any:
    """The notebook as it has not been run."""
    head, *parts = SCRIPT.read_text(encoding="utf-8").split("# %% ")
    title = head.strip().strip('"').splitlines()[0]
    new = nbformat.v4
    cells = [new.new_markdown_cell(f"# {title}\n\n{INSTALL}")]
    for part in parts:
        heading, code = part.split("\n", 1)
        cells.append(new.new_markdown_cell(f"## {heading}"))
        cells.append(new.new_code_cell(code.strip()))
    for number, cell in enumerate(cells):
        cell.id = str(number)  # nbformat's own are random
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run(content: Any, folder: Path) -> Any:
    """The notebook run in ``folder``, without bars, warnings and times."""
    client = nbclient.NotebookClient(
        content, timeout=3600, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_clean, cell.outputs) if output]
    content.metadata.pop("language_info", None)
    content.metadata.pop("widgets", None)
    return content


def _clean(output: Any) -> Any:
    """What is kept of an output; None where that is nothing."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    data = output.get("data", {})
    if any("widget" in kind for kind in data):
        return None
    if not (said := data.get("text/plain", "").strip()) or "Warning: " in said:
        return None
    output.data = {kind: value for kind, value in data.items() if kind in KEPT}
    return output if output.data else None


def main() -> None:
    """Run it and write it."""
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(run(notebook(), Path(folder)), NOTEBOOK)
    print(f"Written: {NOTEBOOK}")


if __name__ == "__main__":
    main()
