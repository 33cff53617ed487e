"""Two reports side by side: what became of each layer, as after another option or version."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from falqon_fx.report.data import Graphs, Site
from falqon_fx.report.tables import add_row, common_prefix, merged_paths, table
from falqon_fx.report.text import adapter_text, new_console, print_table
from falqon_fx.report.totals import predicted_seconds, weight_bytes

ABSENT = "not there"


@dataclass(frozen=True)
class Change:
    """What a layer was and is; ``what`` names the fact that changed."""

    path: str
    what: str
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """All that differs between two reports; prints as a table. Equal reports have no changes."""

    changes: tuple[Change, ...]
    totals: tuple[Change, ...]

    def __str__(self) -> str:
        if not self.changes and not self.totals:
            return "No difference.\n"
        console = new_console()
        prefix = common_prefix([change.path for change in self.changes])
        alike: dict[tuple[str, str, str], list[str]] = {}
        for change in self.changes:
            facts = change.what, change.before, change.after
            alike.setdefault(facts, []).append(change.path[len(prefix) :])
        rows = [(path, *f) for f, paths in alike.items() for path in merged_paths(paths)]
        layers = f"layer below {prefix[:-1]}" if prefix else "layer"
        totals = [(t.what, t.before, t.after) for t in self.totals]
        for titles, cells in (((layers, "what"), rows), (("in all",), totals)):
            if cells:
                made = table(None, *titles, "before", "after")
                for row in cells:
                    add_row(made, *row)
                print_table(made, console)
        return console.export_text()


def compare(before: Graphs, after: Graphs) -> Comparison:
    """What differs, layer by layer and in all."""
    old, new = _facts(before), _facts(after)
    changes = [
        Change(path, what, was, now)
        for path in dict.fromkeys([*old, *new])
        for what, was, now in _differences(old.get(path), new.get(path))
    ]
    totals = [Change("", *found) for found in _differences(_totals(before), _totals(after))]
    return Comparison(tuple(changes), tuple(totals))


def _differences(
    old: dict[str, str] | None, new: dict[str, str] | None
) -> Iterator[tuple[str, str, str]]:
    """What differs; the state alone where one report lacks the layer or has it in another."""
    was, now = ((facts or {}).get("state", ABSENT) for facts in (old, new))
    if was != now:
        yield "state", was, now
        return
    for what in dict.fromkeys([*(old or {}), *(new or {})]):
        before, after = ((facts or {}).get(what, "") for facts in (old, new))
        if before != after:
            yield what, before, after


def _facts(report: Graphs) -> dict[str, dict[str, str]]:
    """What the reports are compared by, for each layer."""
    found: dict[str, dict[str, str]] = {}
    for state, items in (("left", report.left), ("rejected", report.rejected)):
        found |= {item.site: {"state": f"{state}: {item.reason}"} for item in items}
    return found | {site.path: _of_site(site) for site in report.sites}


def _of_site(site: Site) -> dict[str, str]:
    facts = {
        "state": "FP8 with an adapter" if site.adapters else "FP8, frozen",
        "W": f"{site.out_features} x {site.in_features} {site.base_dtype}",
        "experts": str(site.experts),
        "adapter": adapter_text(site),
        "trains": site.trains or "nothing",
        "kernel": site.kernel,
        **{f"option {name}": value for name, value in site.options.items()},
    }
    if site.memory:
        facts["bytes"] = f"{site.memory.after:,}"
    if site.cost:
        facts["predicted"] = f"{site.cost.seconds_after * 1e6:.1f} us on {site.cost.card}"
    return facts


def _totals(report: Graphs) -> dict[str, str]:
    size, time = weight_bytes(report), predicted_seconds(report)
    breaks = sum(graph.ended_by is not None for graph in report.graphs)
    return {
        "layers": report.title,
        "weights once prepared": f"{size[1] / 1e6:.6g} MB" if size else "unknown",
        "predicted for a step": f"{time[1] * 1e3:.4g} ms" if time else "unknown",
        "graphs": f"{len(report.graphs)}, {breaks} of them ended by a break",
        **{f"option {name}": value for name, value in report.options.items()},
    }
