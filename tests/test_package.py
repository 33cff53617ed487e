from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import falqon_fx
from tests import fresh
from tests.scripts import load

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

PUBLIC = {
    "Adapter",
    "Audit",
    "BlocksReport",
    "CompiledReport",
    "compile_blocks",
    "load_compiled",
    "save_compiled",
    "FalqonConfigError",
    "FalqonError",
    "GraphReport",
    "falqon",
    "watch",
    "save_fp8",
    "save_adapter",
    "save_checkpoint",
    "prequantize",
    "merge_and_unload",
    "load_checkpoint",
    "load",
    "PrequantizeReport",
    "ExportReport",
    "CheckpointState",
    "CheckpointReport",
    "FalqonConfig",
    "MergedAdapter",
    "MeshPlan",
    "PrepareReport",
    "Rejected",
    "RewriteReport",
    "RewriteResult",
    "Site",
    "adapters",
    "explain",
    "flush",
    "prepare",
    "restore",
    "rewrite",
}


def run(code: str, cwd: Path) -> str:
    """What a fresh process prints that does not stand in the source folder."""
    done = fresh.run(code, cwd=cwd, path=(), warnings="ignore")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name(name):
    assert hasattr(falqon_fx, name)
    assert name in falqon_fx.__all__


def test_all_names_exist():
    assert len(set(falqon_fx.__all__)) == len(falqon_fx.__all__)
    missing = [name for name in falqon_fx.__all__ if not hasattr(falqon_fx, name)]
    assert missing == []


def test_names_that_are_imported_late_have_the_homes_that_a_type_checker_sees():
    tree = ast.parse(Path(falqon_fx.__file__).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    found = [n for n in block.body if isinstance(n, ast.ImportFrom)]
    seen = {n.module: tuple(a.name for a in n.names) for n in found}
    assert seen == falqon_fx._HOMES
    assert set(falqon_fx.__all__) <= set(dir(falqon_fx))
    with pytest.raises(AttributeError, match="has no attribute 'prepared'"):
        _ = falqon_fx.prepared


SLOW = ("sympy", "rich", "jinja2", "pygments", "triton", "transformers", "peft", "torch.export")


@pytest.mark.parametrize("name", ["falqon_fx", "falqon_fx.backend"])
def test_importing_loads_no_slow_library(name, tmp_path):
    """sympy is for symbols, rich for tables, Jinja and Pygments for pages and kernels."""
    code = f"import sys, torch; before = set(sys.modules); import {name}"
    loaded = run(f"{code}; print(*(sys.modules.keys() - before))", tmp_path).split()
    assert "falqon_fx.ops.merged_linear" in loaded
    assert [m for m in loaded if m.startswith(SLOW)] == []
    if name == "falqon_fx":  # the ops and what they stand on
        rooms = {m.split(".")[1] for m in loaded if m.startswith("falqon_fx.")}
        assert rooms & {"backend", "passes", "model", "files", "cost"} == set()


def test_importing_registers_all_ops_and_the_backend_once(tmp_path):
    """Modules that are imported later add none, so a saved graph loads after the import alone."""
    code = """
import torch, falqon_fx, importlib, pkgutil
def ops():
    return {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("falqon::")}
first = ops()
import falqon_fx.backend
from torch._dynamo.backends.registry import lookup_backend
same = lookup_backend("falqon") is falqon_fx.backend.falqon
print(same, torch._dynamo.list_backends().count("falqon"))
for module in pkgutil.walk_packages(falqon_fx.__path__, "falqon_fx."):
    try:
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    except ModuleNotFoundError as missing:  # the trainer that a plugin is for
        if missing.name.startswith("falqon"):
            raise
print(len(first), sorted(ops() - first))
"""
    same, times, count, later = run(code, tmp_path).split(maxsplit=3)
    assert (same, times) == ("True", "1")
    assert int(count) >= 16
    assert later == "[]"


def test_a_saved_graph_loads_after_the_import_alone(tmp_path):
    class Layer(nn.Module):  # without annotations, which fx would save
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(64, 64).requires_grad_(False)
            self.a, self.b = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    x = torch.randn(4, 64)
    result = falqon_fx.rewrite(fx.symbolic_trace(Layer()), [x])
    assert len(result.report.sites) == 1
    inputs = tuple(result.bind([x]))
    torch.save(result.gm, tmp_path / "graph.pt")
    torch.export.save(torch.export.export(result.gm, inputs), tmp_path / "graph.pt2")
    torch.save((inputs, result.gm(*inputs)), tmp_path / "expected.pt")
    code = """
import falqon_fx, torch
inputs, expected = torch.load("expected.pt")
for graph in (torch.load("graph.pt", weights_only=False), torch.export.load("graph.pt2").module()):
    print(torch.equal(graph(*inputs)[0], expected[0]))
"""
    assert run(code, tmp_path).split() == ["True", "True"]


def test_entry_points_are_what_is_installed():
    (program,) = (e for e in entry_points(group="console_scripts") if e.name == "falqon-fx")
    assert program.value == "falqon_fx_cli.main:main"
    assert callable(program.load())


def test_entry_point_is_registered_once():
    found = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "falqon"]
    assert [e.value for e in found] == ["falqon_fx.backend:falqon"]
    assert callable(found[0].load())


def test_dynamo_knows_the_backend():
    assert "falqon" in torch._dynamo.list_backends()


def test_dynamo_finds_the_backend_without_an_import(tmp_path):
    """The name alone is enough: the user never imports falqon_fx."""
    code = """
import sys, torch
assert "falqon_fx" not in sys.modules
from torch._dynamo.backends.registry import lookup_backend
print(lookup_backend("falqon").__module__)
"""
    assert run(code, tmp_path) == "falqon_fx.backend"


def test_mapped_packages_import_from_anywhere(tmp_path):
    code = "from falqon_fx import kernels, passes; print(kernels.__file__); print(passes.__file__)"
    printed = map(Path, run(code, tmp_path).splitlines())
    for file, folder in zip(printed, ("kernels", "passes"), strict=True):
        assert file.samefile(import_module(f"falqon_fx.{folder}").__file__)
        assert file.parent.name == folder


def test_templates_ship_beside_the_code():
    kernels = Path(import_module("falqon_fx.kernels").__file__).parent
    assert len(list(kernels.rglob("*.jinja"))) == 13
    assert (Path(import_module("falqon_fx.report").__file__).parent / "report.html.jinja").exists()


def test_kernels_import_without_triton(tmp_path):
    """Specs and rendering work where Triton is not installed; only running a kernel needs it."""
    code = """
import sys
sys.modules["triton"] = None
import falqon_fx.kernels
print("imported")
"""
    assert run(code, tmp_path) == "imported"


def test_the_oldest_versions_that_are_tested_are_those_promised():
    for name in ("torch", "triton"):
        (wanted,) = (d for d in PROJECT["dependencies"] if d.startswith(f"{name}>="))
        oldest = wanted.partition(">=")[2].partition(";")[0]
        assert f"'{name}=={oldest}.*'" in (ROOT / "Makefile").read_text()


def test_package_is_typed():
    assert (Path(falqon_fx.__file__).parent / "py.typed").exists()


def test_version_is_that_of_pyproject_everywhere():
    """The command line prints it, too (test_cli.py)."""
    assert falqon_fx.__version__ == version("falqon-fx") == PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation


LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")


def test_the_page_of_the_package_leads_to_no_file_beside_it():
    """A package index has none. With an address of the repository each link has its file there."""
    readme = (ROOT / "README.md").read_text()
    files = LINK.findall(readme)
    assert files
    assert all((ROOT / file.partition("#")[0]).exists() for file in files)
    page = load(ROOT / "setup.py").page
    assert LINK.findall(page(readme, None, "1.0")) == []
    linked = page(readme, "https://example.org/falqon-fx", "1.0")
    assert LINK.findall(linked) == []
    for file in files:
        kind = "raw" if file.endswith(".png") else "blob"
        assert f"](https://example.org/falqon-fx/{kind}/v1.0/{file})" in linked
    render = pytest.importorskip("readme_renderer.markdown").render
    shown = render(page(readme, None, "1.0"))
    assert "<table>" in shown
    assert shown.count("<pre") == 3  # install, the example, a report


def texts_with_advice() -> Iterator[tuple[Path, str]]:
    """What a user reads: documents, and the sources with their messages."""
    for folder in ("", "docs", "docs/guides", "examples", "benchmarks", ".github/ISSUE_TEMPLATE"):
        yield from ((f, f.read_text()) for f in (ROOT / folder).glob("*.md"))
    for folder in ("falqon_fx", "passes", "kernels", "examples", "benchmarks"):
        yield from ((f, f.read_text()) for f in (ROOT / folder).rglob("*.py"))
    yield from ((f, f.read_text()) for f in (ROOT / "Makefile", ROOT / "Dockerfile"))


def test_what_is_said_to_install_is_there():
    """The package is on no index: it installs from a clone. Every extra that is named exists."""
    extras = set(PROJECT["optional-dependencies"])
    for file, text in texts_with_advice():
        assert not re.search(r"pip install[^\n]*[\s'\"]falqon-fx\b(?! @ git)", text), file
        assert not re.search(r"[\s'\"`]falqon-fx\[", text), file
        for names in re.findall(r"pip install [^\n]*?(?:\.|/src)\[([a-z,]+)\]", text):
            assert set(names.split(",")) <= extras, file
    for requirement in (r for extra in PROJECT["optional-dependencies"].values() for r in extra):
        if requirement.startswith("falqon-fx["):
            assert set(re.findall(r"[a-z]+", requirement.partition("[")[2])) <= extras


def test_the_extras_that_messages_name_exist():
    for file in ROOT.glob("falqon_fx/**/*.py"):
        for extra in re.findall(r'require\("[\w.]+", "(\w+)"\)', file.read_text()):
            assert extra in PROJECT["optional-dependencies"], file
