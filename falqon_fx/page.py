"""A report as one HTML page that needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from falqon_fx.passes.kernels import source
from falqon_fx.report import Audit, Line, RewriteReport, Site
from falqon_fx.report_text import to_text
from falqon_fx.views import around, near, rows


def to_html(report: RewriteReport, audits: Sequence[Audit] = ()) -> str:
    """The page: the model's map, and on a click a site's graph, kernel, costs and live state."""
    environment = Environment(
        loader=PackageLoader("falqon_fx"), autoescape=True, undefined=StrictUndefined
    )
    light, dark = (HtmlFormatter(style=s) for s in ("default", "github-dark"))
    return environment.get_template("report.html.jinja").render(
        title=f"{len(report.sites)} sites rewritten, {len(report.rejected)} rejected",
        text=to_text(report),
        # "<" could end the script element that holds the data.
        data=json.dumps(_data(report, audits), separators=(",", ":")).replace("<", "\\u003c"),
        light=light.get_style_defs(".code"),  # type: ignore[no-untyped-call]
        dark=dark.get_style_defs(".code"),  # type: ignore[no-untyped-call]
    )


def _data(report: RewriteReport, audits: Sequence[Audit]) -> dict[str, Any]:
    sites: list[dict[str, Any]] = []
    for graph in report.graphs:
        all_rows = rows(graph)
        for site in graph.sites:
            first, last = around(all_rows, site.nodes)
            sites.append(
                {
                    "path": site.path,
                    "facts": _facts(site),
                    "speedup": [*site.cost.speedup.items()] if site.cost else [],
                    "diff": [
                        [row.kind, _side(site, row.before), _side(site, row.after)]
                        for row in all_rows[first:last]
                    ],
                    "kernel": site.kernel,
                }
            )
    live: dict[str, list[dict[str, Any]]] = {}
    for audit in audits:
        live.setdefault(audit.site, []).append(asdict(audit))
    refused = [
        {
            "path": r.site,
            "facts": [["why", r.reason], ["remedy", r.remedy], ["line", str(r.source or "")]],
        }
        for r in report.rejected
    ]
    kernels = {site.kernel: site for site in report.sites}
    return {
        "sites": sites,
        "refused": refused,
        "blocks": _blocks(report),
        "kernels": {name: _source(site) for name, site in kernels.items()},
        "live": live,
    }


def _side(site: Site, line: Line | None) -> str:
    return near(site, [line])[0].text if line else ""


def _source(site: Site) -> str:
    """What runs a site, highlighted."""
    return str(highlight(source(site), PythonLexer(), HtmlFormatter(nowrap=True)))


def _facts(site: Site) -> list[list[str]]:
    memory, cost = site.memory, site.cost
    facts = [
        ["weight", f"{site.out_features} x {site.in_features}, {site.base_dtype}"],
        ["rank, scaling", f"{site.rank}, {site.scaling:g} ({site.adapter_dtype})"],
        ["input", f"{site.x_dtype}[{', '.join(site.x_shape)}], group {site.group}"],
        ["output", site.out_dtype],
        ["options", site.spec],
        ["kernel", f"{site.kernel}: {site.kernel_reason}"],
        ["line", str(site.source or "unknown")],
    ]
    if memory:
        facts.append(["bytes", f"{memory.before:,} before, {memory.after:,} after prepare()"])
    if cost:
        pays = cost.break_even
        facts += [
            [
                "time",
                f"{cost.seconds_before * 1e6:.1f} us before, {cost.seconds_after * 1e6:.1f} us "
                f"after: {cost.gain:.2f} times as fast ({cost.card}, {cost.variant}, predicted)",
            ],
            ["FLOPs", f"{cost.flops_before:,} before, {cost.flops_after:,} after"],
            ["bytes moved", f"{cost.moved_before:,} before, {cost.moved_after:,} after"],
            ["pays from", "never" if pays is None else "always" if pays == 1 else f"{pays} tokens"],
        ]
    return facts


def _blocks(report: RewriteReport) -> list[dict[str, Any]]:
    """The modules of the model by block (``layers.0``), each with its state and index."""
    owners = {site.path: ("matched", i) for i, site in reversed([*enumerate(report.sites)])}
    owners |= {r.site: ("refused", i) for i, r in enumerate(report.rejected)}
    blocks: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    for module in report.modules:
        parts = module.split(".")
        above = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        path = next((p for p in above if p in owners), module)
        if path in seen:
            continue
        seen.add(path)
        found = re.match(r"(.*?\.\d+)\.(.+)", path)
        block, name = found.groups() if found else ("", path)
        state, index = owners.get(path, ("untouched", -1))
        blocks.setdefault(block, []).append({"name": name, "state": state, "index": index})
    return [{"name": name, "modules": modules} for name, modules in blocks.items()]
