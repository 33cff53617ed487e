"""The README and docs/: their code runs, their links lead to files, their lists are complete."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import peft
import pytest
import torch
import transformers

import falqon_fx
from falqon_fx import FalqonConfig
from tests.models import lora_b, tiny_llama
from tests.parameters import slow
from tests.scripts import load

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GUIDES = DOCS / "guides"  # run, and checked against a copy of the sources, by test_guides.py
SOURCES = tuple(file.parent.name for file in ROOT.glob("*/__init__.py"))
FOLDERS = (*SOURCES, "benchmarks", "docs", "examples", "tests")
SITES = 7  # of a layer of Llama: q, k, v, o, gate, up, down


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# -- code ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_readmes_first_block_is_the_quickstart():
    """Which `tests/test_quickstart.py` runs."""
    source = (ROOT / "examples" / "quickstart.py").read_text().split('"""\n\n', 1)[1]
    first = blocks(ROOT / "README.md")[0]
    written = [line for line in first.splitlines() if line]
    assert written == [line.replace("# %% ", "# ") for line in source.splitlines() if line]


def test_the_readmes_other_block_runs():
    names = given()
    (_, code) = blocks(ROOT / "README.md")
    exec(code, names)
    was_explained(names)


@pytest.mark.parametrize("inner", ["eager", slow("inductor")])
def test_the_loop_runs_from_nothing_to_a_saved_adapter(inner, tmp_path, capsys):
    (code,) = (code for code in blocks(DOCS / "trainers.md") if "for step in" in code)
    if inner != FalqonConfig().inner:
        call = 'compile(backend="falqon"'
        assert code.count(call) == 1
        code = code.replace(call, f"{call}, options={{'inner': {inner!r}}}")
    names: dict[str, Any] = {}
    exec(code, names)
    printed = re.findall(r"^(\d+) (\d+\.\d+)$", capsys.readouterr().out, re.MULTILINE)
    losses = [float(loss) for _, loss in printed]
    assert [int(step) for step, _ in printed] == list(range(20))
    assert losses == sorted(losses, reverse=True)
    assert len(falqon_fx.adapters(names["model"])) == 2 * SITES

    base = transformers.LlamaForCausalLM(names["base"].config)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    trained = [b.detach() for b in lora_b(names["model"])]
    assert all(b.any() for b in trained)
    assert all(map(torch.equal, [b.detach() for b in lora_b(loaded)], trained))


def given() -> dict[str, Any]:
    """What a block of docs/ may take as there."""
    ids = torch.randint(0, 64, (4, 10))
    return {
        "torch": torch,
        "falqon_fx": falqon_fx,
        "model": tiny_llama(layers=1),
        "tokenizer": lambda text, return_tensors: types.SimpleNamespace(input_ids=ids),
        "batch": {"input_ids": ids, "labels": ids},
        "data": [{"input_ids": row, "labels": row} for row in ids],
        "config": FalqonConfig(inner="eager"),
    }


def runs_in_fp8(names: dict[str, Any]) -> None:
    names["model"](**names["batch"])
    assert len(falqon_fx.adapters(names["model"])) == SITES


def was_trained(names: dict[str, Any]) -> None:
    assert len(falqon_fx.adapters(names["model"])) == SITES
    assert all(b.any() for b in lora_b(names["model"]))


def was_saved(names: dict[str, Any]) -> None:
    was_trained(names)
    assert list(Path("checkpoint").iterdir())


def was_watched(names: dict[str, Any]) -> None:
    was_trained(names)
    assert {type(audit) for audit in names["seen"].history} == {falqon_fx.Audit}


def was_explained(names: dict[str, Any]) -> None:
    assert len(names["report"].sites) == SITES
    assert "<html" in Path("report.html").read_text()


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "docs/checkpoints.md": was_saved,
    "docs/inspecting.md": was_explained,
    "docs/first-step.md": runs_in_fp8,
    "docs/matching.md": runs_in_fp8,
    "docs/method.md": was_watched,
    "docs/options.md": runs_in_fp8,
    "docs/trainers.md": was_trained,
}
BLOCKS = [
    pytest.param(name_of(page), code, id=f"{page.stem}-{number}")
    for page in PAGES
    if page.is_relative_to(DOCS) and not page.is_relative_to(GUIDES)
    for number, code in enumerate(blocks(page))
    if "for step in" not in code  # the loop, above
]


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_a_block_of_the_docs_runs(page, code):
    names = given()
    if page == "docs/matching.md":  # the call changes nothing where there are no experts
        names["model"].compile(backend="falqon", options={"config": names["config"]})
    exec(code, names)
    CHECKS[page](names)


def test_the_trainers_page_has_four_ways():
    assert len(blocks(DOCS / "trainers.md")) == 4


def test_the_arithmetic_of_distributed_training_is_right():
    """The table of docs/distributed.md, as the text above it says how."""
    page = (DOCS / "distributed.md").read_text()
    table = page.split("## Which to choose")[1].split("\n| model |")[1].split("\n\n")[0]
    rows = [row.split(" | ")[1:] for row in table.splitlines()[2:]]
    assert len(rows) == 4
    for row in rows:
        numbers = [float(cell.rstrip(" |")) for cell in row]
        layers, hidden, wide, keys, vocabulary = numbers[:5]
        weights = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * wide)
        scales = 4 * layers * (3 * hidden + 2 * keys + 2 * wide)
        dense = 2 * 2 * vocabulary * hidden
        adapters = 64 * layers * (4 * hidden + 2 * (hidden + keys) + 3 * (hidden + wide))
        inputs = 2 * 4096 * hidden * layers
        held = weights + scales + dense + 16 * adapters
        wanted = [
            weights + scales + dense, 2 * weights + dense, 16 * adapters, inputs, held + inputs,
            held / 8 + inputs, held / 64 + inputs,
        ]  # fmt: skip
        assert numbers[5:12] == [round(value / 1e9, 1) for value in wanted]
        assert numbers[12] == round(2 * (weights + scales) / 1e9)


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
