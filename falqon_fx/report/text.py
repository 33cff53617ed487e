"""A report as tables that fit the terminal, at most 100 columns; equal sites of many layers share a
row.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from falqon_fx.report.data import GraphReport, Graphs, Rejected, Site, Source, sites_text
from falqon_fx.report.mesh_text import mesh_text
from falqon_fx.report.tables import (
    Folded,
    add_columns,
    add_row,
    alike,
    common_prefix,
    fit,
    path_of,
    ranges,
    table,
)
from falqon_fx.report.totals import predicted_seconds, weight_bytes

_LEAST, _MOST = 60, 100


def new_console() -> Console:
    """What a text is printed on: as wide as the terminal, within reason; 100 columns where there is
    none. Reasons hold brackets such as [in, out]: no markup, no emoji codes.
    """
    width = min(_MOST, max(_LEAST, shutil.get_terminal_size((_MOST, 0)).columns))
    return Console(
        width=width, file=io.StringIO(), record=True, markup=False, emoji=False, highlight=False
    )


def to_text(report: Graphs) -> str:
    """Sites, what stays as it was, graphs, and what the numbers rest on."""
    console = new_console()
    for part in _parts(report):
        if isinstance(part, Table):
            print_table(part, console)
        else:
            console.print(Folded(part))
    return console.export_text()


def print_table(made: Table, console: Console) -> None:
    """A table with its title, of which rich would break paths in mid-word."""
    if made.title:
        console.print(Folded(str(made.title)))
        made.title = None
    fit(made, console.width)
    console.print(made)


def _parts(report: Graphs) -> Iterator[Table | str]:
    """Tables and lines, from first to last."""
    yield report.title
    if report.sites:
        yield _sites(report.sites)
    for title, items in (
        ("rejected: left exactly as they were", report.rejected),
        ("frozen layers that stay as they are", report.left),
    ):
        if items:
            yield _unchanged(items, title)
    if report.sensitivity:
        yield _sensitive(report)
    if any(graph.before or graph.ended_by for graph in report.graphs):
        yield _graphs(report.graphs)
    yield from _totals(report)
    yield from report.notes
    yield from dict.fromkeys(str(note) for graph in report.graphs for note in graph.notes)
    copies = [copy for g in report.graphs for copy in (g.transposes, g.with_room)]
    yield from dict.fromkeys(str(copy) for copy in copies if copy)
    if report.mesh is not None:
        yield from mesh_text(report.mesh)


def _sites(sites: Sequence[Site]) -> Table:
    """A column where every site has the same is left out: tokens and what trains are below."""
    prefix = common_prefix([*map(path_of, sites)])
    title = f"paths below {prefix[:-1]}" if prefix else None
    tokens, trains = len({s.tokens for s in sites}) > 1, len(_trained(sites)) > 1
    known = any(site.cost for site in sites)
    size = "kB" if all(s.memory is None or s.memory.before < 1e6 for s in sites) else "MB"
    time = "us" if all(s.cost is None or s.cost.seconds_before < 1e-3 for s in sites) else "ms"
    made = table(title, "module", "W", "adapter")
    for name, shown in (("trains", trains), ("tokens", tokens)):
        add_columns(made, name, shown=shown)
    add_columns(made, size)
    add_columns(made, time, "gain", "pays from", shown=known)
    for paths, site in alike(sites):
        memory, cost = site.memory, site.cost
        row = [paths[len(prefix) :], _size_text(site), adapter_text(site)]
        row += [site.trains or "-"] * trains + [site.tokens] * tokens
        row.append(_change(memory.before, memory.after, _UNITS[size]) if memory else "")
        if cost:
            row.append(_change(cost.seconds_before, cost.seconds_after, _UNITS[time]))
            row += [f"{cost.gain:.2f}", pays_from(cost.break_even)]
        add_row(made, *row)
    return made


_SENSITIVE = 16  # layers whose casts cost most, of which a table tells


def _sensitive(report: Graphs) -> Table:
    """The layers whose casts are expected to cost most."""
    every, paths = sum(report.sensitivity.values()), report.most_sensitive(_SENSITIVE)
    made = table(
        f"expected rise of the loss by the casts: {every:.2g} nats per label in all, most in",
        *("module", "nats", "share", "together"),
    )
    together = 0.0
    for path in paths:
        value = report.sensitivity[path]
        together += value
        shares = (part / every if every else 0.0 for part in (value, together))
        add_row(made, path, f"{value:.2g}", *(f"{share:.1%}" for share in shares))
    return made


def _size_text(site: Site) -> str:
    each = f"{site.out_features}x{site.in_features}"
    return f"{site.experts} x {each}" if site.experts else each


_UNITS = {"kB": 1e3, "MB": 1e6, "us": 1e-6, "ms": 1e-3}


def _change(before: float, after: float, unit: float) -> str:
    return f"{before / unit:.3g} > {after / unit:.3g}"


def adapter_text(site: Site) -> str:
    """The adapters of a site: rank and scaling; and what a calibration adds to it."""
    text = "none" if site.adapters == 0 else f"r {site.rank}, s {site.scaling:g}"
    if site.adapters > 1:
        text = f"{site.adapters} of r {site.rank} in all"
    if site.compensate:
        text += f"; W's error r {site.compensate}"
    if site.outliers:
        text += f"; x's {site.outliers}"
    return text


def pays_from(break_even: int | None) -> str:
    """The tokens from which on a rewrite pays."""
    return "never" if break_even is None else f"{break_even} tokens" if break_even > 1 else "always"


def _unchanged(items: Sequence[Rejected], title: str) -> Table:
    """Layers of one reason share a row."""
    once = [*{(item.site, item.reason): item for item in items}.values()]
    prefix = common_prefix([*map(path_of, once)])
    title += f" (paths below {prefix[:-1]})" if prefix else ""
    lines = any(item.source for item in once)
    made = table(title, "module", "why", "remedy", *["line"] * lines)
    rows: dict[Rejected, list[str]] = {}
    for paths, item in alike(once):
        rows.setdefault(replace(item, site=""), []).append(paths[len(prefix) :])
    for item, modules in rows.items():
        row = [", ".join(modules), item.reason, item.remedy]
        add_row(made, *row, *[place(item.source)] * lines)
    return made


def _graphs(graphs: Sequence[GraphReport]) -> Table:
    """Graphs that end at one line and hold as many sites share a row."""
    made = table("graphs", "graph", "sites each", "ops", "passes, s", "ended by", "line")
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, graph in enumerate(graphs):
        why = graph.ended_by
        reason = "return" if why is None else why.reason
        facts = (str(len(graph.sites)), reason, place(None if why is None else why.source))
        alike.setdefault(facts, []).append(i)
    for (count, reason, line), numbers in alike.items():
        members = [graphs[i] for i in numbers]
        ops = (sum(getattr(graph, side) for graph in members) for side in _NODES)
        seconds = sum(sum(graph.pass_seconds.values()) for graph in members)
        ops_text = " > ".join(map(str, ops))
        add_row(made, ranges(numbers), count, ops_text, f"{seconds:.2f}", reason, line)
    return made


_NODES = ("nodes_before", "nodes_after")


def _totals(report: Graphs) -> list[str]:
    sites = report.sites
    lines = [*_what_trains(sites, report.options.get("update", "adapter")), *_casts(sites)]
    if len({site.tokens for site in sites if site.tokens}) == 1:
        lines.append(f"tokens in this call: {sites[0].tokens}")
    if size := weight_bytes(report):
        before, after = size
        lines.append(
            f"weights: {before / 1e6:.6g} MB before, {after / 1e6:.6g} MB after "
            f"({after / max(before, 1):.3f}) once prepare() has freed the base weights"
        )
    if time := predicted_seconds(report):
        (old, new), cost = time, next(site.cost for site in sites if site.cost)
        lines.append(
            f"predicted for {cost.card} ({cost.variant}): {old * 1e3:.4g} ms of a step in "
            f"these sites before, {new * 1e3:.4g} ms after ({old / new:.2f} times as fast)"
        )
    kernels = {(site.kernel, site.kernel_reason) for site in sites if site.kernel}
    lines.extend(f"kernel {name}: {why}" for name, why in sorted(kernels))
    lines.extend(sorted({f"options: {options_text(site, report.options)}" for site in sites}))
    return lines


def _what_trains(sites: Sequence[Site], update: str) -> list[str]:
    trained = _trained(sites)
    parts = [
        f"{k.replace(', ', ' and ') or 'nothing'} of {sites_text(n)}" for k, n in trained.items()
    ]
    lines = []
    if parts:
        where = ": each step is written into W row by row" if update == "rows" else ""
        lines.append(f"trains: {', '.join(parts)}{where}")
    constant = len(sites) - (sum(trained.values()) if update == "rows" else 0)
    if constant:
        base = {FORMATS[site.options["base_dtype"]] for site in sites}
        lines.append(f"constant: W of {sites_text(constant)}, cast to {' and '.join(base)} once")
    return lines


def _trained(sites: Sequence[Site]) -> dict[str, int]:
    """How many sites with adapters train what of them."""
    counts: dict[str, int] = {}
    for site in sites:
        if site.adapters:
            counts[site.trains] = counts.get(site.trains, 0) + 1
    return counts


# |dq(q(x)) - x| / |x| as norms, by format: measured on normal and on heavy-tailed values, rows with
# scales of their own; INT8 on normal values alone.
CAST_ERROR = {"e4m3": 0.026, "e5m2": 0.053, "int8": 0.009, "nvfp4": 0.095}
FORMATS = {"fp8": "FP8 (E4M3)", "int8": "INT8", "nvfp4": "NVFP4"}


def _casts(sites: Sequence[Site]) -> list[str]:
    """What the casts cost in accuracy."""
    adapted = any(site.adapters for site in sites)
    lines = []
    if any(site.options["base_dtype"] == "int8" for site in sites):
        operands = "W, x and A" if adapted else "W and x"
        return [
            f"INT8 costs: {operands} are {CAST_ERROR['int8']:.1%} off (root mean square), more "
            "where a few values of a row stand out; dL/dO is not cast"
        ]
    four_bits = any(site.options["base_dtype"] == "nvfp4" for site in sites)
    if four_bits:
        lines.append(f"NVFP4 costs: W is {CAST_ERROR['nvfp4']:.1%} off (root mean square)")
    for grad, b in sorted({(s.options["grad_dtype"], s.options["adapter_dtype"]) for s in sites}):
        names = [*([] if four_bits else ["W"]), "x", *(["A"] if adapted else [])]
        names += ["s·B"] if adapted and b == "fp8" else []
        operands = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        operands += " are" if len(names) > 1 else " is"
        lines.append(
            f"FP8 costs: {operands} {CAST_ERROR['e4m3']:.1%} off (E4M3, root mean square), "
            f"dL/dO {CAST_ERROR[grad]:.1%} ({grad.upper()}) where it meets W"
        )
    return lines


def options_text(site: Site, config: dict[str, str]) -> str:
    """The options in force at a site as ``name=value``; ``config`` is the report's."""
    rows = ("pending", "topk", "rounding", "seed") if config.get("update") == "rows" else ()
    names = ("update", "frozen", *rows)
    options = {name: config[name] for name in names if name in config} | site.options
    return " ".join(f"{name}={value}" for name, value in options.items())


def place(source: Source | None) -> str:
    """``folder/file.py:12``: enough to find the line, short enough for a table."""
    if source is None:
        return ""
    return f"{'/'.join(source.file.split('/')[-2:])}:{source.line}"
