"""A report as one HTML page that needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from falqon_fx.report.data import Audit, CastAudit, Graphs, Line, Rejected, Site
from falqon_fx.report.kernels import source
from falqon_fx.report.tables import common_prefix
from falqon_fx.report.text import FORMATS, options_text, pays_from, to_text
from falqon_fx.report.totals import sentence
from falqon_fx.report.views import Box, drawing, near, rows, stretch


def to_html(report: Graphs, audits: Sequence[Audit | CastAudit] = ()) -> str:
    """The page: the model's map, and on a click a layer's graph, kernel, costs and live state."""
    environment = Environment(
        loader=PackageLoader("falqon_fx.report", "."), autoescape=True, undefined=StrictUndefined
    )
    light, dark = (HtmlFormatter(style=s) for s in ("default", "github-dark"))
    return environment.get_template("report.html.jinja").render(
        title=report.title,
        sentence=sentence(report),
        costs=bool(report.sensitivity),
        text=to_text(report),
        # "<" could end the script element that holds the data.
        data=json.dumps(_data(report, audits), separators=(",", ":")).replace("<", "\\u003c"),
        light=light.get_style_defs(".code"),  # type: ignore[no-untyped-call]
        dark=dark.get_style_defs(".code"),  # type: ignore[no-untyped-call]
    )


def _data(report: Graphs, audits: Sequence[Audit | CastAudit]) -> dict[str, Any]:
    items = [*_sites(report), *_unchanged("rejected", report.rejected)]
    items += _unchanged("left", report.left)
    items = [{**item, "cost": report.sensitivity.get(item["path"])} for item in items]
    live: dict[str, list[dict[str, Any]]] = {}
    for audit in audits:
        live.setdefault(audit.site, []).append(asdict(audit))
    kernels = {site.kernel: site for site in reversed(report.sites)}
    return {
        "items": items,
        "prefix": common_prefix([item["path"] for item in items]),
        "blocks": _blocks(report.modules, items),
        "kernels": {name: _source(site) for name, site in kernels.items()},
        "live": live,
    }


def _sites(report: Graphs) -> Iterator[dict[str, Any]]:
    for graph in report.graphs:
        all_rows = rows(graph)
        siblings: dict[int, list[str]] = {}
        for site in graph.sites:
            siblings.setdefault(site.group, []).append(site.path)
        for site in graph.sites:
            yield {
                "path": site.path,
                "state": "adapter" if site.adapters else "frozen",
                "row": _row(site),
                "facts": [
                    *_facts(site, siblings[site.group], report.options),
                    *_casts(site, report.sensitivity),
                ],
                "speedup": [*site.cost.speedup.items()] if site.cost else [],
                "diff": [
                    [row.kind, _side(site, row.before), _side(site, row.after)]
                    for row in stretch(graph, all_rows, site)
                ],
                "graph": [_boxes(boxes) for boxes in drawing(graph, all_rows, site)],
                "kernel": site.kernel,
            }


def _boxes(boxes: Sequence[Box]) -> list[list[Any]]:
    return [[b.row, b.column, int(b.marked), b.line.text.strip(), b.reads] for b in boxes]


def _unchanged(state: str, items: Sequence[Rejected]) -> Iterator[dict[str, Any]]:
    for item in items:
        facts = [["why", item.reason], ["remedy", item.remedy], ["line", str(item.source or "")]]
        yield {"path": item.site, "state": state, "row": [], "facts": facts}


def _row(site: Site) -> list[float | str | None]:
    """A line of the page's table: W, rank, kB before and after, how many times as fast."""
    memory, cost = site.memory, site.cost
    kilobytes: list[float | None] = [None, None]
    if memory:
        kilobytes = [round(count / 1e3, 1) for count in (memory.before, memory.after)]
    return [_size(site), site.rank, *kilobytes, round(cost.gain, 2) if cost else None]


def _side(site: Site, line: Line | None) -> str:
    return near(site, [line])[0].text if line else ""


def _source(site: Site) -> str:
    """What runs a site, highlighted."""
    return str(highlight(source(site), PythonLexer(), HtmlFormatter(nowrap=True)))


def _facts(site: Site, siblings: Sequence[str], config: dict[str, str]) -> list[list[str]]:
    memory, cost = site.memory, site.cost
    written = site.adapters > 0 and config.get("update") == "rows"
    fixed = "each step is written into it row by row" if written else "constant"
    others = [path.rpartition(".")[2] for path in siblings if path != site.path]
    shared = f", also read by {' and '.join(others)} in the same op" if others else ""
    form = FORMATS[site.options["base_dtype"]]
    facts = [
        ["W", f"{_size(site)}, {site.base_dtype} cast to {form}, {fixed}"],
        ["adapter", _adapter(site)],
        ["input", f"{site.x_dtype}[{', '.join(site.x_shape)}]{shared}"],
        ["output", site.out_dtype],
        ["options", options_text(site, config)],
        ["kernel", f"{site.kernel}: {site.kernel_reason}"],
        ["line", str(site.source or "unknown")],
    ]
    if memory:
        facts.append(["bytes", f"{memory.before:,} before, {memory.after:,} after prepare()"])
    if cost:
        facts += [
            [
                "time",
                f"{cost.seconds_before * 1e6:.1f} us before, {cost.seconds_after * 1e6:.1f} us "
                f"after: {cost.gain:.2f} times as fast ({cost.card}, {cost.variant}, predicted)",
            ],
            ["FLOPs", f"{cost.flops_before:,} before, {cost.flops_after:,} after"],
            ["bytes moved", f"{cost.moved_before:,} before, {cost.moved_after:,} after"],
            ["pays from", pays_from(cost.break_even)],
        ]
    return facts


def _casts(site: Site, sensitivity: dict[str, float]) -> Iterator[list[str]]:
    """What its casts cost, and what a calibration adds against that."""
    if site.path in sensitivity:
        value, every = sensitivity[site.path], sum(sensitivity.values())
        share = value / every if every else 0.0
        yield ["casts cost", f"{value:.2g} nats per label expected, {share:.1%} of all sites'"]
    if site.compensate or site.outliers:
        bought = f"rank {site.compensate} of W's cast error, {site.outliers} channels of x's"
        yield ["calibration", bought]


def _size(site: Site) -> str:
    each = f"{site.out_features} x {site.in_features}"
    return f"{site.experts} experts of {each}" if site.experts else each


def _adapter(site: Site) -> str:
    if not site.adapters:
        return "none: a frozen layer"
    one = f"rank {site.rank}, scaling {site.scaling:g}"
    text = one if site.adapters == 1 else f"{site.adapters}, rank {site.rank} together"
    dropped = f", dropout {site.dropout:g}" if site.dropout else ""
    verb = "train" if site.train_a and site.train_b else "trains"
    what = site.trains.replace(", ", " and ") or "nothing"
    return f"{text}{dropped}, {site.adapter_dtype}; {what} {verb}"


def _blocks(modules: Sequence[str], items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The modules of the model by block (``layers.0``), each with its state and the index of what
    there is to show of it; in the place of experts their stacks.
    """
    owners = {item["path"]: i for i, item in reversed([*enumerate(items)])}
    every = {path for module in modules for path in _above(module)}
    stacks: dict[str, list[str]] = {}
    for path in owners:
        if path not in every:
            stacks.setdefault(path.rpartition(".")[0], []).append(path)
    blocks: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    for module in modules:
        own = next((path for path in _above(module) if path in owners), None)
        around = _above(".".join(part for part in module.split(".") if part != "base_layer"))
        experts = next((stacks[path] for path in around if path in stacks), None)
        for path in experts if experts and own is None else [own or module]:
            if path in seen:
                continue
            seen.add(path)
            found = re.match(r"(.*?\.\d+)\.(.+)", path)
            block, name = found.groups() if found else ("", path)
            index = owners.get(path, -1)
            state = "untouched" if index < 0 else items[index]["state"]
            blocks.setdefault(block, []).append({"name": name, "state": state, "index": index})
    return [
        {"name": name, "label": ".".join(name.split(".")[-2:]) or "others", "modules": members}
        for name, members in blocks.items()
    ]


def _above(path: str) -> list[str]:
    """A module's path, and those of all around it."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
