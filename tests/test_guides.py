"""The guides in docs/guides, followed to the letter on a copy of the sources.

In a guide, a block behind "In `FILE`, a new file:" is that file, and one behind "In `FILE`:" an
edit of it, with "@@" between its hunks. The commands of a block "sh" have to fail where the
sentence before them says so, else to pass. What a block "text" shows, the commands before it print.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton

from falqon_fx.kernels.matrix import read
from falqon_fx.passes.pipeline import PASSES

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("add-*.md"))
SOURCES = ("falqon_fx", "passes", "kernels", "tests", "benchmarks", "docs")
_BLOCK = re.compile(r"^(?P<lead>[^\n]*)\n\n```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.M | re.S)
_FILE = re.compile(r"In `([\w/.]+)`(, a new file)?:$")


@dataclass(frozen=True)
class Block:
    """A block of a guide and the sentence before it."""

    lead: str
    kind: str
    body: str

    @property
    def slow(self) -> bool:
        return "takes minutes" in self.lead


def blocks(guide: Path) -> Iterator[Block]:
    for found in _BLOCK.finditer(guide.read_text(encoding="utf-8")):
        yield Block(**found.groupdict())


@dataclass
class Checkout:
    """A copy of the sources, laid out as an installed package: `passes` and `kernels` are within
    falqon_fx, and nothing else of the root can be imported.
    """

    root: Path
    path: Path
    printed: str = ""

    @classmethod
    def below(cls, folder: Path) -> Checkout:
        root, path = folder / "root", folder / "path"
        for name in SOURCES:
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        for name in ("passes", "kernels"):
            (root / "falqon_fx" / name).symlink_to(root / name)
        path.mkdir()
        (path / "falqon_fx").symlink_to(root / "falqon_fx")
        return cls(root, path)

    def follow(self, block: Block) -> None:
        """Do what a block says."""
        file = _FILE.search(block.lead)
        if block.kind == "sh":
            self.run(block)
        elif block.kind == "text":
            for line in block.body.splitlines():
                assert line in self.printed, self.printed
        elif block.kind == "diff":
            assert file is not None, block.lead
            self.edit(self.root / file[1], block.body)
        else:
            assert file is not None, block.lead
            assert not (self.root / file[1]).exists()
            (self.root / file[1]).write_text(block.body, encoding="utf-8")

    def edit(self, file: Path, diff: str) -> None:
        text = file.read_text(encoding="utf-8")
        for hunk in diff.split("@@\n"):
            lines = [line or " " for line in hunk.splitlines()]
            old, new = ([li[1:] for li in lines if li[0] in marks] for marks in (" -", " +"))
            before, after = ("".join(f"{line}\n" for line in side) for side in (old, new))
            assert text.count(before) == 1, f"{file.name} has {text.count(before)} times:\n{before}"
            text = text.replace(before, after)
        file.write_text(text, encoding="utf-8")

    def run(self, block: Block) -> None:
        done = self.call(f"set -e\n{block.body}")
        self.printed = done.stdout + done.stderr
        assert (done.returncode != 0) == block.lead.endswith("fails:"), self.printed

    def call(self, command: str) -> subprocess.CompletedProcess[str]:
        own = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.path),
            "FALQON_CACHE": str(self.path / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.root,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
        )


def follow(guide: Path, folder: Path, take: Callable[[Block], bool]) -> None:
    if guide.stem == "add-a-kernel" and read()[0] != triton.__version__:
        pytest.skip(f"kernels/compiled.csv is of Triton {read()[0]}")
    checkout = Checkout.below(folder)
    for block in blocks(guide):
        if take(block):
            checkout.follow(block)
    style = checkout.call("ruff check . && ruff format --check .")
    assert style.returncode == 0, style.stdout


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_what_a_guide_says_works(guide, tmp_path):
    follow(guide, tmp_path, lambda block: not block.slow)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_what_a_guide_changes_fits_the_sources(guide, tmp_path):
    """Without its commands."""
    follow(guide, tmp_path, lambda block: block.kind not in ("sh", "text"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "guide", [g for g in GUIDES if any(b.slow for b in blocks(g))], ids=lambda guide: guide.stem
)
def test_so_does_what_takes_minutes(guide, tmp_path):
    follow(guide, tmp_path, lambda block: True)


def test_each_guide_fails_first_and_passes_then():
    for guide in GUIDES:
        commands = [block for block in blocks(guide) if block.kind == "sh"]
        assert commands[0].lead == "It fails:", guide
        assert not commands[-1].lead.endswith("fails:"), guide


def test_the_place_of_the_pass_is_the_one_that_its_guide_names():
    (number,) = re.findall(r"falqon_(\d+)_few_tokens", GUIDES[-1].read_text())
    assert int(number) == [*PASSES].index("autotune") + 1


def test_files_that_a_guide_speaks_of_exist():
    made = {m[1] for guide in GUIDES for b in blocks(guide) if (m := _FILE.search(b.lead))}
    for guide in GUIDES:
        for name in re.findall(
            r"`((?:falqon_fx|passes|kernels|tests|benchmarks)/[\w/.]+)`", guide.read_text()
        ):
            assert name in made or (ROOT / name).exists(), f"{guide.name}: {name}"
