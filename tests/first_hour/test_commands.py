"""Every command of the README and of docs/ is one that there is: run as it stands, where it takes
seconds and nothing from elsewhere, or held against what it names.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import falqon_fx
from falqon_fx_cli.main import main
from tests.models import tiny_llama
from tests.pages import GUIDES, PAGES, ROOT, commands

OF_OTHERS = {
    "accelerate": "tests/distributed/test_recipes.py runs what it launches",
    "git": "the address is not this project's to know",
    "ollama": "no package of it on PyPI",
    "pre-commit": "changes the repository",
    "swift": "ms-swift is not installed",
    "torchrun": "tests/distributed/test_recipes.py runs what it launches",
    "transformers": "wants a server, and a terminal",
    "tune": "wants a model from the hub; test_integrations.py compiles as it does",
    "vllm": "has a torch of its own: tests/test_vllm.py",
}
NOT_HERE = {
    "falqon-fx --install-completion": "changes the shell of the user",
    "falqon-fx cost --calibrate cuda": "wants a GPU",
    "falqon-fx cost --step": "without --card it is of the card at hand, if that is a known one",
    "python llama.cpp/convert_hf_to_gguf.py merged --outfile merged.gguf": "of llama.cpp",
}
SITE = "base_model.model.model.layers.0.mlp.up_proj"
FOUND = sorted({c for p in PAGES if not p.is_relative_to(GUIDES) for c in commands(p)})


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MODEL or BASE, ADAPTER and REPORT, as the commands name them."""
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    report = falqon_fx.explain(model, input_ids=torch.zeros(1, 8, dtype=torch.int64))
    for name in ("REPORT", "OTHER"):
        Path(name).write_text(report.to_json())
    model.save_pretrained("adapter")
    base = model.unload()
    for name in ("MODEL", "BASE"):
        transformers.LlamaForCausalLM.save_pretrained(base, name)
    (tmp_path / "ADAPTER").symlink_to("adapter")
    return tmp_path


def runs(words: list[str]) -> None:
    """One of falqon-fx; a command whose arguments are left out shows its help."""
    alone = len(words) == 2 and words[1] in ("cost", "export", "prequantize", "repro")
    words = [SITE if word == "SITE" else word for word in words]
    assert main([*words[1:], *(["--help"] if alone else [])]) == 0


def is_made(words: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def installs(words: list[str]) -> None:
    """The extras are those of pyproject.toml, and the list is there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        wanted = re.fullmatch(r"\.\[(.+)\]", word)
        if wanted:
            assert set(wanted[1].split(",")) <= extras["optional-dependencies"].keys()
        elif word.endswith(".txt"):
            assert (ROOT / word).is_file()
        else:
            assert word.startswith("-"), word


def is_there(words: list[str]) -> None:
    """A script, or tests; a script knows the options."""
    if words[1:2] == ["-X"]:
        return
    if words[1] == "-m":
        files = [words[2].replace(".", "/").removeprefix("falqon_fx/") + ".py"]
    else:
        files = [word for word in words[1:] if "/" in word]
    assert files
    for file in files:
        assert (ROOT / file).exists(), file
    if words[0] == "python":
        options = [word.strip("[]") for word in words[2:] if word.strip("[").startswith("--")]
        source = "".join((ROOT / file).read_text() for file in files)
        assert [option for option in options if option not in source] == []


WAYS: dict[str, Callable[[list[str]], None]] = {
    "falqon-fx": runs,
    "make": is_made,
    "pip": installs,
    "python": is_there,
    "pytest": is_there,
}


def test_there_are_commands():
    assert {command.split()[0] for command in FOUND} >= {*WAYS, "vllm", "git"}
    assert {*NOT_HERE} <= {*FOUND}


def those_of(program: str) -> list[list[str]]:
    found = [shlex.split(c) for c in FOUND if c.split()[0] == program and c not in NOT_HERE]
    assert found
    return found


@pytest.mark.parametrize("program", [program for program in WAYS if program != "falqon-fx"])
def test_the_commands_are_right(program):
    for words in those_of(program):
        WAYS[program](words)


def test_those_of_the_library_run(folders, capsys):
    for words in those_of("falqon-fx"):
        runs(words)
    for out in ("fp8-model", "OUT"):
        assert (folders / out / "config.json").is_file()


def test_of_the_others_it_is_said_why_they_are_not_run():
    assert {c.split()[0] for c in FOUND} <= {*WAYS, *OF_OTHERS}
