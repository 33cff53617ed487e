"""The README and the pages of docs/: what is code in them, what is a command, what is prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GUIDES = DOCS / "guides"  # run, and checked against a copy of the sources, by test_guides.py
PROGRAMS = (
    "accelerate", "falqon-fx", "git", "make", "ollama", "pip", "pre-commit", "pytest", "python",
    "swift", "torchrun", "transformers", "tune", "vllm",
)  # fmt: skip


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(page: Path) -> Iterator[str]:
    """Lines set off by four spaces, and code in a line, that begin with the name of a program and
    say more than it; what `&&` joins one by one, without settings before and comments behind.
    """
    text = prose(page)
    written = re.findall(r"^    (\S.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    for line in written:
        for part in line.partition("  #")[0].split("&&"):
            command = re.sub(r"^(\w+=\S+ )+", "", part.strip())
            if command.split(" ")[0] in PROGRAMS and " " in command:
                yield command
