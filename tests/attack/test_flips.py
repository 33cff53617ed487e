"""Flipped bytes, cut and swapped files, of every kind that is read: nothing, all, or an explained
refusal.

The files of a kind (`tests.attack.kinds`) are damaged one by one. `KINDS` says how many flips the
slow test makes of each; the fast one makes `FEW`. Nothing else may be written meanwhile, there or
around.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.attack import harness
from tests.attack.kinds import KINDS, Kind

FEW = 24


def damages(kind: Kind, count: int, seed: int) -> Iterator[Callable[[], harness.Verdict]]:
    """``count`` flips, and a tenth as many cuts, over the files in turn."""
    chance = random.Random(seed)
    for i in range(count + count // 10):
        path = kind.files[i % len(kind.files)]
        damage = harness.flipped if i < count else harness.cut
        yield functools.partial(kind.one, path, damage(path.read_bytes(), chance))


def swaps(kind: Kind) -> Iterator[Callable[[], harness.Verdict]]:
    for path, content in harness.swapped(kind.files):
        yield functools.partial(kind.one, path, content)


def made(name: str, around: Path) -> Kind:
    """A kind in a folder of its own, with what it mustn't touch beside it."""
    harness.place_victims(around)
    folder = around / "kind"
    folder.mkdir()
    kind = KINDS[name][0](folder)
    kind.around = around
    return kind


@pytest.mark.parametrize("name", KINDS)
def test_a_few_flips(tmp_path, name):
    kind = made(name, tmp_path)
    count = 8 if "prequantize" in name.split() else FEW  # which takes longer
    assert kind.attack() in ("whole", "before"), "undamaged"
    harness.counted(harness.verdicts([*damages(kind, count, seed=0)]))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_flips(tmp_path, name, capsys):
    """7,200 flips in all, 720 cuts, and every file with the content of every other one."""
    kind, count = made(name, tmp_path), KINDS[name][1]
    attacks = [*damages(kind, count, seed=1), *swaps(kind)]
    found = harness.counted(harness.verdicts(attacks))
    with capsys.disabled():
        print(f"\n{name}: {len(attacks)} damages, {dict(found)}")
