"""The program that `falqon-fx repro --write` makes of a report: what the report says is data."""

from __future__ import annotations

import ast
import dataclasses
import io
import tokenize
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falqon_fx import FalqonError, GraphReport, RewriteReport, Site
from falqon_fx.report.kernels import source
from falqon_fx.report.passlog import _file_name
from falqon_fx.report.repro import check, script
from falqon_fx_cli.main import main
from tests.hostile import NAMES, TEXTS

SPEC = "row pow2 e5m2 bfloat16 auto fast auto #0123456789ab"
SITE = Site("model.q_proj", 576, 576, 16, 2.0, 0.0, "bfloat16", SPEC)
TEXT_FIELDS = [f.name for f in dataclasses.fields(Site) if f.type == "str"]
# A stack of experts is refused before a program is made.
INTEGERS = [f.name for f in dataclasses.fields(Site) if f.type == "int" and f.name != "experts"]

HOSTILE = st.builds(
    lambda texts, numbers, scaling: dataclasses.replace(SITE, **texts, **numbers, scaling=scaling),
    st.fixed_dictionaries(dict.fromkeys(TEXT_FIELDS, TEXTS)),
    st.fixed_dictionaries({name: st.integers(-(2**63), 2**63) for name in INTEGERS}),
    st.floats(allow_nan=False, allow_infinity=False),
)


class _Blank(ast.NodeTransformer):
    """A program without the values of its literals."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant(0)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        assert isinstance(node.op, ast.USub)
        assert isinstance(node.operand, ast.Constant)
        return ast.Constant(0)


def shape(text: str) -> tuple[str, int]:
    """All of a program but the values of its literals, and its number of comments."""
    comments = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == 64]
    return ast.dump(_Blank().visit(ast.parse(text))), len(comments)


def literals(text: str) -> set[Any]:
    return {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}


@given(HOSTILE)
def test_no_report_adds_a_statement_a_call_or_a_comment(site):
    assert shape(script(site)) == shape(script(SITE))
    assert {site.path, site.spec, site.kernel, abs(site.scaling)} <= literals(script(site))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["path", "out_dtype", "x_dtype", "kernel"])
def test_a_report_from_a_file_writes_no_code(field, name, tmp_path, capsys):
    report = tmp_path / "evil.json"
    site = dataclasses.replace(SITE, **{field: name})
    report.write_text(RewriteReport((GraphReport((site,), (), 9, 3),)).to_json())
    written = main(["repro", str(report), "--write", str(tmp_path / "r.py")]) == 0
    if any("\ud800" <= letter <= "\udfff" for letter in name):  # no JSON has half a character
        assert not written
        return
    assert written
    assert shape((tmp_path / "r.py").read_text(encoding="utf-8")) == shape(script(SITE))


@given(TEXTS)
def test_the_source_of_a_kernel_that_a_report_names_is_one_comment(name):
    text = source(dataclasses.replace(SITE, kernel=f"triton:{name}", architecture=90))
    assert text.startswith("# triton:")
    assert len(text.splitlines()) == 1


def test_no_kernel_of_a_report_reads_outside_the_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "victim-0.py").write_text("secret")
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path / "cache"))
    for name in ("../victim", str(tmp_path / "victim"), "**/victim", "../*"):
        site = dataclasses.replace(SITE, kernel=f"triton:{name}", architecture=90)
        assert "secret" not in source(site)


@given(TEXTS)
def test_the_dumps_folders_are_inside_of_it(name):
    file = _file_name(name)
    assert "/" not in file
    assert file not in ("", ".", "..")
    assert len(file.encode()) <= 255


@pytest.mark.parametrize(
    "changed",
    [
        {"out": 0},
        {"features": -5},
        {"tokens": 0},
        {"out": 2**62, "features": 2**62},
        {"tokens": 2**60},
        {"adapters": 5, "rank": 4},
        {"adapters": -1},
        {"dropout": 1.0},
        {"dropout": float("nan")},
        {"dtype": "hub"},
        {"x_dtype": "load"},
        {"base_dtype": "\x1b[2J"},
        {"adapter_dtype": "int8"},
    ],
    ids=str,
)
def test_what_is_no_site_is_refused(changed):
    given: dict[str, Any] = {"out": 8, "features": 8, "rank": 4, "tokens": 8, "scaling": 1.0}
    given |= {"dtype": "float32", "adapter_dtype": "float32", "spec": SPEC, **changed}
    with pytest.raises(FalqonError, match="repro: "):
        check(**given)
