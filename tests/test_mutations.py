"""What `benchmarks/mutations.py` needs of the tests: a file of them for each pass."""

from __future__ import annotations

import ast
import importlib
import random
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PASSES, BENCHMARKS = ROOT / "passes", ROOT / "benchmarks"


@pytest.fixture
def mutations(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("mutations")


def test_every_pass_has_tests_that_exist(mutations):
    files = {str(f.relative_to(PASSES)): f.read_text() for f in PASSES.rglob("*.py")}
    have_some = {f for f, text in files.items() if next(mutations.mutants(f, text), None)}
    assert {*mutations.TESTS} == have_some
    named = {*chain(*mutations.TESTS.values(), mutations.SHARED)}
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []


def test_faults_are_programs_other_than_the_file(mutations):
    for file in mutations.TESTS:
        text = (PASSES / file).read_text()
        for mutant in mutations.choose(file, text, 5, random.Random(0)):
            faulty = text[: mutant.start] + mutant.new + text[mutant.end :]
            assert ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(text)), mutant
