"""Names that a terminal would obey, or rich would take for markup, through each view."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from rich.console import Console
from torch import nn

import falqon_fx
from falqon_fx import Audit, FalqonConfig, FalqonError, GraphReport, Rejected, RewriteReport, Site
from falqon_fx.errors import one_line, printable
from falqon_fx.files.export_report import ExportReport, FlushReport
from falqon_fx.model.prepare_report import PrepareReport
from falqon_fx.model.watching import _view
from falqon_fx.report.data import GraphBreak, Line, Note, Source
from falqon_fx.rows import drift
from falqon_fx_cli.main import main
from tests.hostile import NAMES, TEXTS, obeyed
from tests.models import LoraLinear

SPEC = "row pow2 e5m2 bfloat16 auto fast auto #0123456789ab"
ESCAPE, MARKUP = "\x1b]0;x\x07", "[red]"
SHOWN = r"\x1b]0;x\x07"


@given(TEXTS)
def test_what_is_not_printable_is_shown_by_its_python_escape(text):
    assert one_line(text).isprintable()
    assert not obeyed(printable(text))
    assert printable(printable(text)) == printable(text)
    assert text.isprintable() == (one_line(text) == text)


def report(name: str) -> RewriteReport:
    """A report that holds a name wherever it can hold one."""
    at = Source(name, 7, name, name)
    site = Site(
        *(name, 64, 32, 4, 2.0, 0.1, name, SPEC, at),
        x_shape=(name,),
        tokens=name,
        x_dtype=name,
        base_dtype=name,
        adapter_dtype=name,
        kernel=name,
        kernel_reason=name,
        nodes=("n",),
    )
    other = dataclasses.replace(site, path=f"other.{name}")
    refused = Rejected(name, name, name, at)
    line = Line("n", f"{name} = falqon.merged_linear({name})")
    graph = GraphReport(
        *((site, other), (refused,), 9, 3, (refused,), (Note(name, name),)),
        ended_by=GraphBreak(name, at),
        before=(line,),
        after=(dataclasses.replace(line, node="m"),),
    )
    return RewriteReport((graph,), {"update": "rows", "topk": name}, (name,), (name,))


AUDIT = Audit("", 3, 3.0, 2.0, 1.0, 1, 5.0, 0.0, 0.0, 8, (1, 2))


def live_view(name: str) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100)
    console.print(_view([dataclasses.replace(AUDIT, site=name)]))
    return console.file.getvalue()  # type: ignore[attr-defined]


def warned(act: Callable[[], None]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return "\n".join(str(w.message) for w in caught)


def export_report(name: str) -> str:
    flushed = FlushReport(0, 0, 0.0, 0.0)
    return str(ExportReport("out", "fp8", {}, {name: name}, flushed, (), 0, (name,)))


VIEWS: dict[str, Callable[[str], str]] = {
    "error": lambda name: str(FalqonError(name, name, name)),
    "text": lambda name: str(report(name)),
    "diff": lambda name: report(name).to_diff(),
    "image": lambda name: report(name).to_svg(name),
    "page": lambda name: report(name).to_html(),
    "rejection": lambda name: str(report(name).rejected[0]),
    "live view": live_view,
    "drift": lambda name: warned(lambda: drift.warn([name])),
    "prepare": lambda name: str(PrepareReport((), (), {name: name}, 0, 0)),
    "export": export_report,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("view", VIEWS)
def test_no_view_lets_a_name_through_that_a_terminal_obeys(view, name):
    assert not obeyed(VIEWS[view](name))


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_shows_the_name(view):
    assert SHOWN in VIEWS[view](ESCAPE)
    assert MARKUP in VIEWS[view](MARKUP)


def test_a_model_with_such_names_is_listed_logged_and_warned_of(caplog):
    model = nn.Sequential()
    model.add_module(ESCAPE, LoraLinear(32, 48))
    model.add_module(MARKUP, LoraLinear(48, 32))
    x = torch.randn(3, 32)
    shown = falqon_fx.explain(model, x)
    text = [line.text for graph in shown.graphs for line in (*graph.before, *graph.after)]
    assert not obeyed("\n".join([*text, str(shown), shown.to_diff(), shown.to_html()]))
    options = {"config": FalqonConfig(exclude=("*",)), "inner": "eager"}
    with caplog.at_level(logging.DEBUG, "falqon_fx"):
        said = warned(lambda: torch.compile(model, backend="falqon", options=options)(x))
    assert said
    assert not obeyed(said)
    logged = [r.getMessage() for r in caplog.records if r.name.startswith("falqon_fx")]
    assert logged
    assert not obeyed("".join(logged))


def test_the_commands_print_no_such_name(tmp_path, capsys):
    file = tmp_path / "report.json"
    tree = json.loads(report(ESCAPE).to_json())
    file.write_text(json.dumps(tree))
    for words in (["kernels"], ["kernels", "--source"], ["repro"], ["repro", f"{ESCAPE}x"]):
        main([words[0], str(file), *words[1:]])
        said = capsys.readouterr()
        assert not obeyed(said.out + said.err)
        assert SHOWN in said.out + said.err


@pytest.mark.parametrize("planted", ["file", "folder", "pipe", "nothing to read"])
def test_a_source_that_someone_planted_is_shown_printable(tmp_path, capsys, monkeypatch, planted):
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path))
    path = tmp_path / "mine-0123456789abcdef.py"
    if planted == "folder":
        path.mkdir()
    elif planted == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(f"x = 1\n{ESCAPE}\n".encode() + b"\xff\n")
    if planted == "nothing to read":
        monkeypatch.setattr(Path, "read_text", _only(Path.read_text, "report.json"))
    site = Site("a", 64, 32, 4, 2.0, 0.0, "float32", SPEC, kernel="triton:mine")
    file = tmp_path / "report.json"
    file.write_text(RewriteReport((GraphReport((site,), (), 9, 3),)).to_json())
    assert main(["kernels", str(file), "--source"]) == 0
    said = capsys.readouterr().out
    assert not obeyed(said)
    assert f"x = 1\n{SHOWN}\n" in said if planted == "file" else "is not on this machine" in said


def _only(read: Callable[..., str], name: str) -> Callable[..., str]:
    def reading(path: Path, *args: object, **named: object) -> str:
        if path.name != name:
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **named)

    return reading


def test_a_check_that_falls_back_to_the_cpu_names_the_kernel(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    site = Site(ESCAPE, 64, 32, 4, 2.0, 0.0, "float32", SPEC, kernel=ESCAPE, device="cuda")
    file = tmp_path / "report.json"
    file.write_text(RewriteReport((GraphReport((site,), (), 9, 3),)).to_json())
    assert main(["repro", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"so {SHOWN} was not run" in said
    assert not obeyed(said)
