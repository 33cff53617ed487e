"""Graphs before and after: as rows side by side, as a text diff, as SVG."""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from falqon_fx.errors import FalqonError, one_line
from falqon_fx.report.data import GraphReport, Graphs, Line, Site

CONTEXT = 3  # unchanged rows shown around changed ones


@dataclass(frozen=True)
class Row:
    """A node before and after; one side is missing where the passes removed or added it."""

    before: Line | None
    after: Line | None

    @property
    def kind(self) -> str:
        """What became of it: "gone", "new", "changed" (other operands) or "same"."""
        if self.before is None or self.after is None:
            return "new" if self.before is None else "gone"
        return "same" if self.before.text == self.after.text else "changed"

    @property
    def node(self) -> str:
        line = self.before or self.after
        assert line is not None
        return line.node


def rows(graph: GraphReport) -> list[Row]:
    """Both listings merged by the nodes' names, which the passes keep, in time linear in them."""
    kept = {line.node for line in graph.before} & {line.node for line in graph.after}
    result: list[Row] = []
    after = iter(graph.after)
    for line in graph.before:
        if line.node not in kept:
            result.append(Row(line, None))
            continue
        for other in after:
            if other.node in kept:
                if other.node != line.node:  # the passes never reorder what they keep
                    problem = f"its graph has {other.node} before {line.node}, or one of them twice"
                    raise FalqonError("report", problem, "Write it anew")
                result.append(Row(line, other))
                break
            result.append(Row(None, other))
    result.extend(Row(None, other) for other in after)
    return result


def around(
    all_rows: Sequence[Row], nodes: Iterable[str], context: int = CONTEXT
) -> tuple[int, int]:
    """The stretch of rows [first, last) that holds all ``nodes`` and what replaced them."""
    wanted = set(nodes)
    places = [i for i, row in enumerate(all_rows) if row.before and row.node in wanted]
    if not places:
        return 0, 0
    last = places[-1] + 1
    while last < len(all_rows) and all_rows[last].kind == "new":
        last += 1
    return max(0, places[0] - context), min(len(all_rows), last + context)


def replacing(graph: GraphReport, all_rows: Sequence[Row], site: Site) -> list[Row]:
    """What replaces a site: the op that it shares with its siblings, where the first one stood."""
    siblings = [other.nodes for other in graph.sites if other.group == site.group]
    first, last = min(around(all_rows, nodes, 0) for nodes in siblings)
    new = [row for row in all_rows[first:last] if row.kind == "new"]
    # What the passes insert at the head of the graph may stand there, too.
    ops = [i for i, row in enumerate(new) if row.after and _OP in row.after.text]
    return new[ops[-1] :] if ops else []


_OP = " = falqon.merged_linear("
_GAP_ROW = Row(Line("", "..."), Line("", "..."))


def stretch(graph: GraphReport, all_rows: Sequence[Row], site: Site) -> list[Row]:
    """The rows around a site and what replaces it, with gaps for what belongs to neither."""
    first, last = around(all_rows, site.nodes)
    new = replacing(graph, all_rows, site)
    own, known = list(all_rows[first:last]), {row.node for row in new}
    if new and new[0] not in own:
        own = [*new, _GAP_ROW, *(row for row in own if row.node not in known)]
    result: list[Row] = []
    for row in own:
        if row.kind != "new" or row.node in known:
            result.append(row)
        elif result[-1:] != [_GAP_ROW]:
            result.append(_GAP_ROW)
    return result


def near(site: Site, lines: Iterable[Line]) -> list[Line]:
    """The lines with the site's own parameters named from the site on."""
    own = f"{site.path}."
    return [replace(line, text=line.text.replace(own, "")) for line in lines]


def to_diff(report: Graphs, width: int = 160) -> str:
    """All graphs side by side in ``width`` columns; what stays the same is folded."""
    half = (width - 3) // 2
    lines: list[str] = []
    for i, graph in enumerate(report.graphs):
        lines.append(f"graph {i}: {len(graph.sites)} sites")
        for item in _fold(rows(graph)):
            if isinstance(item, int):
                lines.append(f"  ... {item} unchanged")
                continue
            mark = {"same": " ", "gone": "-", "new": "+", "changed": "~"}[item.kind]
            left, right = (_fit(line, half - 1) for line in (item.before, item.after))
            lines.append(f"{mark} {left} {right}".rstrip())
    return "\n".join(lines) + "\n"


def _fold(all_rows: Sequence[Row]) -> Iterator[Row | int]:
    """The rows within `CONTEXT` of a change, and the lengths of what lies between."""
    near: set[int] = set()
    for i, row in enumerate(all_rows):
        if row.kind != "same":
            near.update(range(i - CONTEXT, i + CONTEXT + 1))
    hidden = 0
    for i, row in enumerate(all_rows):
        if i not in near:
            hidden += 1
            continue
        if hidden:
            yield hidden
            hidden = 0
        yield row
    if hidden:
        yield hidden


def _fit(line: Line | None, width: int) -> str:
    text = one_line(line.text) if line else ""
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


def find_site(report: Graphs, path: str) -> tuple[GraphReport, Site]:
    """The site at ``path`` and its graph.

    Raises:
        FalqonError: no such site; the message names the nearest.
    """
    known = {site.path: (graph, site) for graph in report.graphs for site in graph.sites}
    if path not in known:
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
        remedy = f"The nearest is {near[0]!r}" if near else "No site was rewritten"
        raise FalqonError(path, "is no rewritten site", remedy)
    return known[path]


_BOX, _GAP, _HIGH = 300, 24, 46
_ACROSS = 3  # boxes in a row
_STYLE = """
text { font: 12px ui-monospace, monospace; fill: #1f2328 } .h { font-weight: bold }
rect { fill: #f6f8fa; stroke: #8c959f } .gone rect { fill: #ffebe9; stroke: #cf222e }
.new rect { fill: #dafbe1; stroke: #1a7f37 } path { stroke: #57606a; fill: none }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } rect { fill: #21262d }
.gone rect { fill: #4c1a1d } .new rect { fill: #12381d } path { stroke: #8b949e } }
"""


def to_svg(report: Graphs, path: str) -> str:
    """The nodes of a site with their inputs on the left, what stands there afterwards on the right.

    Raises:
        FalqonError: no such site.
    """
    graph, site = find_site(report, path)
    before, after = drawing(graph, rows(graph), site)
    left = _draw(before, "gone", 20)
    right = _draw(after, "new", left.width + 60)
    width, height = left.width + right.width + 80, max(left.height, right.height) + 60
    title = _escape(path)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img" '
        f'viewBox="0 0 {width} {height}"><title>{title}, before and after</title>'
        f'<style>{_STYLE}</style><text class="h" x="20" y="24">before</text>'
        f'<text class="h" x="{left.width + 60}" y="24">after</text>{left.text}{right.text}</svg>'
    )


def _escape(text: str) -> str:
    """Text for an SVG image: XML has no control characters, not even escaped."""
    return html.escape(one_line(text))


@dataclass(frozen=True)
class _Drawing:
    text: str
    width: int
    height: int


@dataclass(frozen=True)
class Box:
    """A node of a drawing: where it stands, and the places among the boxes of what it reads."""

    line: Line
    row: int
    column: int
    marked: bool
    reads: tuple[int, ...]


def drawing(graph: GraphReport, all_rows: Sequence[Row], site: Site) -> tuple[list[Box], list[Box]]:
    """The nodes of a site with their inputs, and what replaces it."""
    new = {row.node for row in replacing(graph, all_rows, site)}
    before, after = (near(site, lines) for lines in (graph.before, graph.after))
    return layout(before, set(site.nodes)), layout(after, new)


def layout(lines: Sequence[Line], marked: set[str]) -> list[Box]:
    """Marked nodes and their inputs in layers, of as many rows as they need: a node lies below all
    that it reads.
    """
    inputs = {line.node: line.inputs for line in lines}
    level: dict[str, int] = {}
    for line in lines:
        if line.node in marked:
            level[line.node] = 1 + max((level[s] for s in line.inputs if s in level), default=0)
    for node in [*level]:
        for source in inputs[node]:
            if source not in marked:  # beside what reads it first
                level[source] = min(level.get(source, level[node] - 1), level[node] - 1)
    drawn = sorted((x for x in lines if x.node in level), key=lambda x: x.node not in marked)
    number = {line.node: i for i, line in enumerate(drawn)}
    layers: dict[int, list[str]] = {}
    for line in drawn:
        layers.setdefault(level[line.node], []).append(line.node)
    places: dict[str, tuple[int, int]] = {}
    first = 0
    for _, nodes in sorted(layers.items()):
        places |= {n: (first + i // _ACROSS, i % _ACROSS) for i, n in enumerate(nodes)}
        first += -(-len(nodes) // _ACROSS)
    return [
        Box(
            line,
            *places[line.node],
            line.node in marked,
            tuple(number[s] for s in line.inputs if s in number and line.node in marked),
        )
        for line in drawn
    ]


def _draw(boxes: Sequence[Box], kind: str, x0: int) -> _Drawing:
    places = [(x0 + b.column * (_BOX + _GAP), 40 + b.row * (_HIGH + _GAP)) for b in boxes]
    edges = [_edge(places[i], place) for b, place in zip(boxes, places) for i in b.reads]
    drawn = [_box(b.line, *place, kind if b.marked else "") for b, place in zip(boxes, places)]
    width = (1 + max((b.column for b in boxes), default=0)) * (_BOX + _GAP)
    height = (1 + max((b.row for b in boxes), default=0)) * (_HIGH + _GAP)
    return _Drawing("".join(edges + drawn), width, height)


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    (x1, y1), (x2, y2) = start, end
    x1, y1, x2 = x1 + _BOX // 2, y1 + _HIGH, x2 + _BOX // 2
    middle = (y1 + y2) // 2
    return f'<path d="M{x1} {y1}C{x1} {middle} {x2} {middle} {x2} {y2}"/>'


def _box(line: Line, x: int, y: int, kind: str) -> str:
    head, _, call = line.text.strip().partition(" = ")
    lines = [
        head if len(head) <= 40 else head[:39] + "…",
        call if len(call) <= 40 else call[:39] + "…",
    ]
    texts = "".join(
        f'<text x="{x + 8}" y="{y + 19 + 17 * i}">{_escape(t)}</text>' for i, t in enumerate(lines)
    )
    return (
        f'<g class="{kind}"><title>{_escape(line.text.strip())}</title>'
        f'<rect x="{x}" y="{y}" width="{_BOX}" height="{_HIGH}" rx="4"/>{texts}</g>'
    )
