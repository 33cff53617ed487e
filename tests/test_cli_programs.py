"""The command line as a program: help, completion, what is imported, and costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import sympy
import torch
from pydantic import TypeAdapter

from falqon_fx.cost.cards import Card
from falqon_fx_cli import commands
from falqon_fx_cli.main import main

transformers = pytest.importorskip("transformers")


def test_no_words_print_the_help(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert "Exit codes" in said.out + said.err


_LEAVE = """
import sys
from falqon_fx_cli.main import main
for words in {lines}:
    main(words)
print(*sorted(sys.modules), sep="\\n", file=sys.stderr)
"""


def test_help_imports_neither_the_library_nor_torch():
    """Nor do the version and a wrong word: the program answers in a tenth of a second."""
    names = [command.__name__ for command in commands.ALL]
    lines = [["--help"], ["--version"], *([name, "--help"] for name in names)]
    code = _LEAVE.format(lines=lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage: falqon-fx") == 1 + len(names)
    assert f"falqon-fx {version('falqon-fx')}" in done.stdout.splitlines()
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    slow = {"torch", "falqon_fx", "rich", "transformers", "numpy"}
    assert loaded & {"typer", *slow} == {"typer"}
    code = _LEAVE.format(lines=[["explian"], ["cost", "--tokens", "x"]])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Did you mean 'explain'?" in done.stderr
    assert {"torch", "falqon_fx"} & set(done.stderr.split()) == set()


def test_a_shell_completes_commands_options_and_values():
    """As bash asks; nothing slow is imported for it (the test above)."""

    def completed(line: str) -> list[str]:
        env = {"_FALQON_FX_COMPLETE": "complete_bash", "COMP_WORDS": line}
        env["COMP_CWORD"] = str(len(line.split(" ")) - 1)
        program = [Path(sys.executable).with_name("falqon-fx")]
        done = subprocess.run(
            program, env={**os.environ, **env}, capture_output=True, text=True, check=False
        )
        return done.stdout.split()

    assert completed("falqon-fx ex") == ["explain", "export"]
    assert completed("falqon-fx prequantize --gran") == ["--granularity"]
    assert completed("falqon-fx explain x --dtype b") == ["bfloat16"]


def test_cost_shows_the_papers_finding(capsys):
    layer = ["--in", "1024", "--out", "1024", "--adapter-dtype", "bfloat16", "--frozen-a"]
    assert main(["cost", "--card", "RTX 4090", *layer, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["card"] == "RTX 4090"
    assert found["break_even"]["merged"] == 1
    assert found["break_even"]["fp8_lora"] > 500
    row = next(r for r in found["seconds"] if r["tokens"] == 256)
    assert row["merged"] < row["lora"] < row["fp8_lora"]
    assert main(["cost", "--card", "RTX 4090", *layer]) == 0
    assert "pays from" in capsys.readouterr().out


def test_cost_of_a_trained_a_and_of_siblings(capsys):
    def merged(*words: str) -> float:
        assert main(["cost", "--card", "H100", "--tokens", "512", "--json", *words]) == 0
        (row,) = json.loads(capsys.readouterr().out)["seconds"]
        return float(row["merged"])

    assert merged("--frozen-a") < merged()
    assert merged("--siblings", "3") < merged()
    assert merged("--rank", "0") < merged("--rank", "8", "--frozen-a")


@pytest.mark.parametrize(
    ("card", "kind", "names"),
    [
        ("A100", "int8", ["lora", "merged"]),
        ("A100", "fp8", ["lora", "emulated"]),
        ("H100", "nvfp4", ["lora", "fp8_lora", "merged", "emulated"]),
    ],
)
def test_cost_knows_each_base(capsys, card, kind, names):
    words = ["--card", card, "--base-dtype", kind, "--tokens", "4096", "--json"]
    assert main(["cost", *words]) == 0
    (row,) = json.loads(capsys.readouterr().out)["seconds"]
    assert [*row] == ["tokens", *names]


def test_cost_lists_cards_and_formulas(capsys):
    assert main(["cost", "--cards", "--json"]) == 0
    listed = TypeAdapter(list[Card]).validate_json(capsys.readouterr().out)
    assert {"H100", "MI300X"} <= {card.name for card in listed}
    assert main(["cost", "--symbolic", "--json"]) == 0
    formulas = json.loads(capsys.readouterr().out)
    forward = sympy.sympify(formulas["merged forward"]["flops"].replace("in", "i"))
    n, i, out, r = sympy.symbols("n i out r")
    assert sympy.expand(forward - 2 * n * (i * out + i * r + r * out)) == 0
    assert formulas["merged update"]["flops"] == "0"
    for words in (["--cards"], ["--symbolic"]):
        assert main(["cost", *words]) == 0
        assert capsys.readouterr().out


def test_cost_without_a_known_card_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path))
    if torch.cuda.is_available():
        pytest.skip("this machine's card may be in the table")
    assert main(["cost"]) == 1
    assert "--calibrate" in capsys.readouterr().err


def test_a_program_that_dies_says_where():
    code = "import faulthandler, sys; sys.argv[1:] = []; import falqon_fx_cli.main as program; "
    code += "program.main(); assert faulthandler.is_enabled()"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_a_program_without_stderr_runs():
    code = "import sys; from falqon_fx_cli.main import main; sys.exit(main())"
    command = f"{sys.executable} -c '{code}' --help 2>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout[:6]) == (0, "Usage:")


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "falqon_fx", "cost", "--cards", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(done.stdout)) >= 7
