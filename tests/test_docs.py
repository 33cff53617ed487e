"""The README and docs/: their links lead to files, their lists are complete. That their code and
their commands run is in tests/first_hour/.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import falqon_fx
from falqon_fx import FalqonConfig
from tests.pages import DOCS, GUIDES, PAGES, ROOT, name_of, prose
from tests.scripts import load

SOURCES = tuple(file.parent.name for file in ROOT.glob("*/__init__.py"))
FOLDERS = (*SOURCES, "benchmarks", "docs", "examples", "tests")


# -- links and names -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page):
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[\w-]+\]: (\S+)$", text, re.M)
    paths = [link.partition("#")[0] for link in links if "://" not in link]
    missing = [path for path in paths if path and not (page.parent / path).exists()]
    assert missing == []


@pytest.mark.parametrize("page", [p for p in PAGES if not p.is_relative_to(GUIDES)], ids=name_of)
def test_files_that_are_named_exist(page):
    words = [word for code in re.findall(r"`([^`\n]+)`", prose(page)) for word in code.split()]
    named = [word.partition("::")[0] for word in words if word.startswith(FOLDERS)]
    missing = [path for path in named if "/" in path and not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_exist(page):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", prose(page))
    missing = [test for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
    assert missing == []
    assert named or name_of(page) != "docs/compare.md"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_labels_of_links_are_defined_once_and_used(page):
    text = re.sub(r"`[^`\n]*`", "``", prose(page))
    defined = re.findall(r"^\[([\w-]+)\]: ", text, re.MULTILINE)
    assert sorted(defined) == sorted(set(re.findall(r"\]\[([\w-]+)\]", text)))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_readme_links_to_every_page():
    readme = (ROOT / "README.md").read_text()
    pages = {name_of(page) for page in DOCS.rglob("*.md")} - {"docs/index.md", "docs/changelog.md"}
    assert {page for page in pages if f"]({page})" not in readme} == set()


# -- lists that the source decides -----------------------------------------------------------------


def test_the_options_page_is_generated_from_the_source():
    """`python docs/options.py --write` writes it anew."""
    script = load(DOCS / "options.py")
    assert script.options() in script.PAGE.read_text()


def literals(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from literals(part)


@pytest.mark.parametrize(("option", "hint"), get_type_hints(FalqonConfig).items())
def test_the_options_page_names_the_option_and_its_values(option, hint):
    sections = (DOCS / "options.md").read_text().split("\n### ")
    (section,) = [text for text in sections if text.startswith(f"`{option}`\n")]
    assert [value for value in literals(hint) if f'`"{value}"`' not in section] == []


def environment_reads(path: Path) -> Iterator[str]:
    """The names that a file reads from the environment; one that isn't a literal as its source."""
    reads: list[ast.expr] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("environ.get", "environ.pop", "environ.setdefault", "getenv")
        ):
            reads.append(node.args[0])
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            reads.append(node.slice)
    return (ast.unparse(name).strip("'") for name in reads)


def test_the_environment_page_names_what_the_source_reads():
    files = [file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")]
    read = {name for file in files for name in environment_reads(file)}
    page = (DOCS / "environment.md").read_text()
    section = page.split("## Read by falqon-fx\n")[1].split("\n## ")[0]
    assert {"falqon_fx", "passes", "kernels"} <= set(SOURCES)
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == read


def test_the_api_page_has_every_public_name():
    listed = re.findall(r"^::: falqon_fx\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(falqon_fx.__all__)


# -- the site --------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    options = (tmp_path / "options" / "index.html").read_text()
    assert 'id="adapter_dtype"' in options
    assert "Cast every frozen linear layer" in (tmp_path / "api" / "index.html").read_text()
    for file in ("examples/inspect_rewrite.png", "benchmarks/results/peft-suite/index.html"):
        assert (tmp_path / file).exists()
