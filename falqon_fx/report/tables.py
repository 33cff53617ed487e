"""Tables of a report: layers that differ in the numbers of their paths alone share a row."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from falqon_fx.errors import one_line, printable
from falqon_fx.report.data import Rejected, Site
from falqon_fx.report.mesh import LayerShards

Item = TypeVar("Item", Site, Rejected, LayerShards)


class Folded:
    """The text of a cell. A line ends at a space; in a word that is longer than a line, as paths
    are, behind a dot, a slash, an underscore, a comma or an opening bracket.
    """

    def __init__(self, text: str) -> None:
        # What a report of a file holds may hold what terminals obey.
        self._lines = printable(text).splitlines() or [""]
        pieces = (piece.strip() for line in self._lines for piece in _PIECE.findall(line))
        self.least, self.most = max(map(cell_len, pieces)), max(map(cell_len, self._lines))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self.least, self.most)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._lines:
            for part in _fold(line, max(1, options.max_width)):
                yield Text(part)


_WORD = re.compile(r"\s*\S+")
_PIECE = re.compile(r"\s*[^\s._/,\[(]*[._/,\[(]*")


def _fold(text: str, width: int) -> list[str]:
    """The lines of at most ``width`` cells that a line becomes."""
    lines = [""]
    for word in _WORD.findall(text):
        fits = cell_len(word.strip()) <= width
        for piece in [word] if fits else filter(None, _PIECE.findall(word)):
            if lines[-1] and cell_len(lines[-1] + piece) > width:
                lines.append("")
                piece = piece.lstrip()
            first, *rest = chop_cells(piece, width)
            lines[-1] += first
            lines += rest
    return lines


def add_columns(into: Table, *names: str, shown: bool = True) -> None:
    """Empty columns; none unless ``shown``."""
    for name in names if shown else ():
        into.add_column(name, overflow="fold")


def table(title: str | None, *columns: str) -> Table:
    """An empty table."""
    made = Table(title=title and one_line(title), title_justify="left")
    add_columns(made, *columns)
    return made


def fit(made: Table, width: int) -> None:
    """Give the first column, the paths, the room that the others leave of ``width``: at least that
    of the longest name, and not more than half.
    """

    def size(column: Column, field: str) -> int:
        folded = (cell if isinstance(cell, Folded) else Folded(str(cell)) for cell in column.cells)
        sizes: list[int] = [getattr(c, field) for c in (Folded(str(column.header)), *folded)]
        return max(sizes)

    paths, *others = made.columns
    room = width - 3 * len(made.columns) - 1  # a border and two spaces each
    least = max(size(paths, "least"), room // len(made.columns))
    left = room - sum(size(column, "most") for column in others)
    paths.width = min(size(paths, "most"), max(left, min(least, room // 2)))


def add_row(into: Table, *cells: str) -> None:
    """A line of a table."""
    into.add_row(*map(Folded, cells))


def path_of(item: Site | Rejected | LayerShards) -> str:
    """The module that a row is about."""
    return item.site if isinstance(item, Rejected) else item.path


def common_prefix(paths: Sequence[str]) -> str:
    """The modules above all sites, with the last dot; none where it is short anyway."""
    parts = [path.split(".")[:-1] for path in paths]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts))
    prefix = "".join(f"{column[0]}." for column in same)
    return prefix if len(set(paths)) > 1 and len(prefix) > 12 else ""


def alike(items: Sequence[Item]) -> list[tuple[str, Item]]:
    """Items that differ in the numbers of their paths alone, as one: ``layers.{0..79}.q_proj``."""
    groups: dict[object, list[Item]] = {}
    seen: dict[str, int] = {}
    for item in items:
        path = path_of(item)
        seen[path] = seen.get(path, 0) + 1
        groups.setdefault((_facts(item), seen[path]), []).append(item)  # each use has its row
    return [
        (paths, group[0])
        for group in groups.values()
        for paths in _merged([path_of(item) for item in group])
    ]


def _facts(item: Site | Rejected | LayerShards) -> object:
    pattern = _NUMBER.sub("#", path_of(item))
    if isinstance(item, Site):
        cost = item.cost and tuple(sorted(item.cost.speedup.items()))
        bare = replace(item, path=pattern, nodes=(), group=0, cost=None)
        return bare, cost
    if isinstance(item, LayerShards):
        return replace(item, path=pattern, unit=_NUMBER.sub("#", item.unit))
    return replace(item, site=pattern)


def merged_paths(paths: Sequence[str]) -> list[str]:
    """Different paths as few texts: those of one pattern as one, if they are all it stands for."""
    patterns: dict[str, list[str]] = {}
    for path in paths:
        patterns.setdefault(_NUMBER.sub("#", path), []).append(path)
    return [text for same in patterns.values() for text in _merged(same)]


def _merged(paths: Sequence[str]) -> list[str]:
    """Different paths of one pattern as one text, if they are all that it stands for."""
    columns = [*zip(*(map(int, _NUMBER.findall(path)) for path in paths))]
    choices = [sorted(set(column)) for column in columns]
    if math.prod(map(len, choices)) != len(paths):
        return [*paths]
    texts = iter(choices)

    def text(found: re.Match[str]) -> str:
        numbers = next(texts)
        return found[0] if len(numbers) == 1 else f"{{{ranges(numbers)}}}"

    return [_NUMBER.sub(text, paths[0])]


_NUMBER = re.compile(r"\d{1,18}")  # Python refuses to read very long ones


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → "0..2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{p[0]}..{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
