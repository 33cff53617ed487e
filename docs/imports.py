"""The rooms of the library from the ground up, and which imports which: the graph in design.md.

python docs/imports.py          # prints it
python docs/imports.py --write  # puts it into design.md
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- imports: begin -->\n", "<!-- imports: end -->\n"
FOLDERS = {
    "falqon_fx": "falqon_fx",
    "passes": "falqon_fx.passes",
    "kernels": "falqon_fx.kernels",
    "falqon_fx/cli": "falqon_fx_cli",
}
# The longest name that fits a file counts. update="rows" has the same floors as the rest. What a
# CPU has as compiled code is below the numerics that call it.
LAYERS = (
    ("errors", "config", "_compat"),
    ("kernels.cpu", "kernels.cache"),
    ("site",),
    ("kernels",),
    ("ops",),
    ("report.data", "report.mesh", "report.checked"),
    ("cost",),
    ("report",),
    ("rows",),
    ("ops.decompositions",),
    ("passes",),
    ("model", "rows.model", "rows.prepared", "rows.unload"),
    ("rows.binding", "model.watching", "compile_warnings"),
    ("backend",),
    ("model.explain",),
    ("files",),
    ("falqon_fx_cli", "integrations"),
)
_OPENS = {"falqon_fx", "falqon_fx.__main__", "falqon_fx.trainer_checkpoints"}  # import anything


def modules() -> dict[str, Path]:
    """Every file of the library, by its dotted name."""
    found: dict[Path, str] = {}
    for folder, package in FOLDERS.items():  # a file below two of them has the latter's name
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[file] = ".".join([package, *(p for p in parts if p != "__init__")])
    return {name: file for file, name in found.items()}


MODULES = modules()


@functools.cache
def imports(name: str) -> frozenset[str]:
    """The modules of the library that a module imports anywhere, those for types alone included."""
    return frozenset(_imports(name))


def _imports(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for full in names:
            known = full if full in MODULES else full.rpartition(".")[0]
            if known in MODULES and known != name:
                yield known


def floor(name: str) -> int:
    """The layer that a module lies in; what only opens the house is above all."""
    if name in _OPENS:
        return len(LAYERS)
    own = name.removeprefix("falqon_fx.")
    fits = [
        (len(prefix), number)
        for number, layer in enumerate(LAYERS)
        for prefix in layer
        if own == prefix or own.startswith(f"{prefix}.")
    ]
    return max(fits)[1]


def mermaid() -> str:
    """The graph as text. An arrow points to what is imported; one that follows from others is left
    out.
    """
    reach: dict[int, set[int]] = {number: set() for number in range(len(LAYERS) + 1)}
    for name in MODULES:
        reach[floor(name)] |= {floor(other) for other in imports(name)} - {floor(name)}

    def beyond(one: int) -> set[int]:
        return {far for other in reach[one] for far in {other} | beyond(other)}

    names = [f'    L{number}["{", ".join(layer)}"]' for number, layer in enumerate(LAYERS)]
    arrows = [
        f"    L{number} --> L{other}"
        for number in range(len(LAYERS))
        for other in sorted(reach[number])
        if not any(other in beyond(between) for between in reach[number] - {other})
    ]
    return "\n".join(["```mermaid", "graph TD", *names, *arrows, "```", ""])


def main() -> None:
    """Print the graph, or write it."""
    if "--write" not in sys.argv[1:]:
        print(mermaid())
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + mermaid() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
