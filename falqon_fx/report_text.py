"""A report as tables that fit 100 columns; equal sites of many layers share a row."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from falqon_fx.report import GraphReport, Rejected, RewriteReport, Site, Source

WIDTH = 100
_Item = TypeVar("_Item", Site, Rejected)


def to_text(report: RewriteReport) -> str:
    """Sites, rejections, graphs, and what the numbers rest on."""
    # Reasons hold brackets such as [in, out]: no markup, no emoji codes.
    console = Console(
        width=WIDTH, file=io.StringIO(), record=True, markup=False, emoji=False, highlight=False
    )
    title = f"{len(report.sites)} sites rewritten, {len(report.rejected)} rejected"
    top = _common_prefix([*map(_path, report.sites), *map(_path, report.rejected)])
    if top:
        title += f" (paths below {top[:-1]})"
    console.print(_sites(report.sites, title, len(top)))
    if report.rejected:
        console.print(_rejected(report.rejected, len(top)))
    if any(graph.before or graph.ended_by for graph in report.graphs):
        console.print(_graphs(report.graphs))
    for line in [*_totals(report), *report.notes]:
        console.print(line)
    return console.export_text()


def _common_prefix(paths: Sequence[str]) -> str:
    """The modules above all sites, with the last dot; none where it is short anyway."""
    parts = [path.split(".")[:-1] for path in paths]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts))
    prefix = "".join(f"{column[0]}." for column in same)
    return prefix if len(set(paths)) > 1 and len(prefix) > 12 else ""


def _sites(sites: Sequence[Site], title: str, cut: int) -> Table:
    table = _table(title, "module", "W", "r", "scaling", "tokens", "MB", "ms", "gain", "pays from")
    for paths, site in _alike(sites):
        memory, cost = site.memory, site.cost
        table.add_row(
            paths[cut:],
            f"{site.out_features}x{site.in_features}",
            str(site.rank),
            f"{site.scaling:g}",
            site.tokens,
            f"{memory.before / 1e6:.3g} > {memory.after / 1e6:.3g}" if memory else "",
            f"{cost.seconds_before * 1e3:.3g} > {cost.seconds_after * 1e3:.3g}" if cost else "",
            f"{cost.gain:.2f}" if cost else "",
            _tokens(cost.break_even) if cost else "",
        )
    return table


def _tokens(break_even: int | None) -> str:
    return "never" if break_even is None else f"{break_even} tokens" if break_even > 1 else "always"


def _rejected(items: Sequence[Rejected], cut: int) -> Table:
    table = _table("left exactly as they were", "module", "why", "remedy", "line")
    for paths, item in _alike(items):
        table.add_row(paths[cut:], item.reason, item.remedy, place(item.source))
    return table


def _graphs(graphs: Iterable[GraphReport]) -> Table:
    table = _table("graphs", "graph", "sites", "ops", "passes, s", "ended by", "line")
    for i, graph in enumerate(graphs):
        why = graph.ended_by
        table.add_row(
            str(i),
            str(len(graph.sites)),
            f"{graph.nodes_before} > {graph.nodes_after}",
            f"{sum(graph.pass_seconds.values()):.2f}",
            "return" if why is None else why.reason,
            "" if why is None else place(why.source),
        )
    return table


def _totals(report: RewriteReport) -> list[str]:
    lines = []
    # A weight used twice in one model is kept once.
    kept = {site.path: site.memory for site in report.sites if site.memory}
    if kept:
        before, after = (sum(getattr(m, side) for m in kept.values()) for side in _SIDES)
        lines.append(
            f"weights: {before / 1e6:.6g} MB before, {after / 1e6:.6g} MB after "
            f"({after / before:.3f}) once prepare() has freed the base weights"
        )
    costs = [site.cost for site in report.sites if site.cost]
    if costs:
        old, new = (sum(c.seconds_before for c in costs), sum(c.seconds_after for c in costs))
        lines.append(
            f"predicted for {costs[0].card} ({costs[0].variant}): {old * 1e3:.4g} ms of a step in "
            f"these sites before, {new * 1e3:.4g} ms after ({old / new:.2f} times as fast)"
        )
    kernels = {(site.kernel, site.kernel_reason) for site in report.sites if site.kernel}
    lines.extend(f"kernel {name}: {why}" for name, why in sorted(kernels))
    specs = sorted({site.spec for site in report.sites})
    lines.extend(f"options: {spec}" for spec in specs)
    return lines


_SIDES = ("before", "after")


def place(source: Source | None) -> str:
    """``folder/file.py:12``: enough to find the line, short enough for a table."""
    if source is None:
        return ""
    return f"{'/'.join(source.file.split('/')[-2:])}:{source.line}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _alike(items: Sequence[_Item]) -> list[tuple[str, _Item]]:
    """Items that differ in one number of their paths alone, as one: ``layers.{0..79}.q_proj``."""
    groups: dict[object, list[_Item]] = {}
    for item in items:
        groups.setdefault(_facts(item), []).append(item)
    rows: list[tuple[str, _Item]] = []
    for group in groups.values():
        merged = _range([_path(item) for item in group])
        if merged is None:
            rows.extend((_path(item), item) for item in group)
        else:
            rows.append((merged, group[0]))
    return rows


def _path(item: Site | Rejected) -> str:
    return item.path if isinstance(item, Site) else item.site


def _facts(item: Site | Rejected) -> object:
    pattern = re.sub(r"\d+", "#", _path(item))
    if isinstance(item, Site):
        cost = item.cost and tuple(sorted(item.cost.speedup.items()))
        bare = replace(item, path=pattern, nodes=(), group=0, cost=None)
        return bare, cost
    return replace(item, site=pattern)


def _range(paths: list[str]) -> str | None:
    numbers = [[int(n) for n in re.findall(r"\d+", path)] for path in paths]
    varying = [i for i, column in enumerate(zip(*numbers)) if len(set(column)) > 1]
    if len(paths) == 1:
        return paths[0]
    if len(varying) != 1:
        return None
    (place,) = varying
    values = sorted(n[place] for n in numbers)
    if values != list(range(values[0], values[0] + len(values))):
        return None
    spans = [*re.finditer(r"\d+", paths[0])][place].span()
    return f"{paths[0][: spans[0]]}{{{values[0]}..{values[-1]}}}{paths[0][spans[1] :]}"
