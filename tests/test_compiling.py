"""The lines that tell of a compile: few, and none for what is quick."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from falqon_fx.report import compiling
from falqon_fx.report.data import GraphReport, Site
from tests.models import LoraLinear


def report(*paths: str) -> GraphReport:
    sites = tuple(Site(path, 8, 8, 4, 1.0, 0.0, "torch.float32", "") for path in paths)
    return GraphReport(sites, (), 0, 0)


LAYERS = [f"model.layers.{i}.mlp.{name}" for i in range(3) for name in ("experts.0", "experts.1")]


@pytest.fixture
def lines(monkeypatch):
    """What is said; the clock that decides when runs a thousand times as fast."""
    said: list[str] = []
    monkeypatch.setattr(compiling, "_print", said.append)
    monkeypatch.setattr(compiling, "FIRST", 0.003)
    monkeypatch.setattr(compiling, "EVERY", 0.03)
    return said


def until(condition) -> None:
    turn = threading.Event()
    while not condition():
        turn.wait(0.001)


def test_a_long_compile_says_when_it_begins_goes_on_and_ends(lines):
    with compiling.told(report(*LAYERS), 0):
        until(lambda: len(lines) == 2)
    assert lines[0] == "falqon: compiling 3 layers as one graph, 6 sites; this happens once"
    assert lines[1].startswith("falqon: still compiling, ")
    assert lines[-1].startswith("falqon: compiled in ")
    assert not any(t.name == "falqon-compiling" for t in threading.enumerate())


def test_another_graph_of_the_same_code_says_why(lines):
    with compiling.told(report("mlp.up"), 2):
        until(lambda: lines)
    assert lines[0].startswith("falqon: compiling a graph, 1 site; it is graph 3 of its code: ")


def test_what_is_quick_says_nothing(lines, monkeypatch):
    monkeypatch.setattr(compiling, "FIRST", 3600.0)
    model = LoraLinear(8, 8)
    torch.compile(model, backend="falqon", options={"inner": "eager"})(torch.randn(2, 8))
    assert lines == []


def test_an_error_is_not_called_compiled(lines):
    def breaks() -> None:
        with compiling.told(report(), 0):
            until(lambda: lines)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        breaks()
    assert not any("compiled in" in line for line in lines)


def test_it_goes_where_logs_go_and_can_be_silenced(lines, caplog):
    compiling.say("one")
    with caplog.at_level(logging.INFO, "falqon_fx"):
        compiling.say("two")
    with caplog.at_level(logging.WARNING, "falqon_fx"):
        compiling.say("three")
    assert lines == ["one"]
    assert caplog.messages == ["two"]


def test_a_line_is_one_on_stderr(capsys):
    compiling.say("x" * 300 + " [bold]")
    assert capsys.readouterr().err == "x" * 300 + " [bold]\n"
