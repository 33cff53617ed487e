"""Who may import whom: the rooms of `docs/imports.py`, from the ground up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.scripts import load

PATH = Path(__file__).parents[1] / "docs" / "imports.py"
LIMIT = 400  # lines of a file


house = load(PATH)


def test_no_file_imports_in_a_circle():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in house.imports(name):
                visit(other, (*above, name))
            done.add(name)

    for name in house.MODULES:
        visit(name, ())


def test_nothing_is_imported_from_above():
    above = {
        name: found
        for name in house.MODULES
        if (found := [o for o in house.imports(name) if house.floor(o) > house.floor(name)])
    }
    assert above == {}


def private_names_of_torch(source: str) -> Iterator[str]:
    """`torch._C`, `torch._inductor` and the like; `torch.ops.aten._name` is an operation."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            path = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            yield from (part for part in path if part.startswith("_"))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (name for name in names if name.startswith("torch.") and "._" in name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            # Dynamo's settings and marks are what its documentation tells users to set.
            if node.value.id == "torch" and private and node.attr != "_dynamo":
                yield f"torch.{node.attr}"


def test_private_names_of_torch_are_imported_in_one_file():
    private = {n: [*private_names_of_torch(p.read_text())] for n, p in house.MODULES.items()}
    assert {name for name, found in private.items() if found} == {"falqon_fx._compat"}


def test_addresses_are_given_to_compiled_code_in_one_folder():
    """Beside that code stands what compares dtypes, shapes and layouts first
    (`tests/kernels/test_cpu_operands.py`, `test_cpu_experts.py`); nothing else can call it.
    """
    users = {n for n, p in house.MODULES.items() if "ctypes" in p.read_text()}
    files = ("build", "casts", "experts", "integers", "native", "samples")
    assert users == {f"falqon_fx.kernels.cpu.{name}" for name in files}


def test_files_are_short():
    """By what they test those of tests are found; what several share is a plain module."""
    root = Path(__file__).parents[1]
    files = [*house.MODULES.values(), *(root / "tests").rglob("*.py")]
    files += (root / "benchmarks").glob("*.py")
    assert [f.name for f in files if len(f.read_text().splitlines()) > LIMIT] == []


def test_the_picture_is_that_of_the_code():
    """`python docs/imports.py --write` draws it anew."""
    assert house.mermaid() in house.PAGE.read_text()


def test_docstrings_start_with_what_they_are_of():
    """Not with "Of a layer ...", "As the op ..." or "Those that ...", whose subject is missing."""
    without = re.compile(r"(As|By|For|From|Likewise|Of|Those|With)\b")
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    found = [
        (name, text.splitlines()[0])
        for name, path in house.MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds) and without.match(text := ast.get_docstring(node) or "")
    ]
    assert found == []
