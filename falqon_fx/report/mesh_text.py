"""What several processes would hold and move, as tables and lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from falqon_fx.report.mesh import LayerShards, Mesh, Traffic
from falqon_fx.report.tables import add_columns, add_row, alike, common_prefix, path_of, table

_SIZES = {"base": "W", "scales": "scales", "a": "A", "b": "B", "rest": "rest", "held": "process"}


def mesh_text(mesh: Mesh) -> Iterator[Table | str]:
    """Who holds what, what moves, and what these numbers don't say."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.axes.items() if size > 1)
    yield f"mesh: {axes or 'one process'}"
    yield _layers(mesh.layers)
    for line in _whole(mesh.layers):
        yield line
    yield (
        f"parameters of a process: {mesh.held / 1e6:.6g} MB, {mesh.held_before / 1e6:.6g} MB as it "
        f"was; {mesh.trained / 1e6:.6g} MB train (gradients as many, AdamW's states twice as many)"
    )
    if mesh.traffic:
        yield _traffic(mesh.traffic)
    gathers = [unit.gathered for unit in mesh.units]
    if gathers:
        yield f"the largest of {len(gathers)} gathered units: {max(gathers) / 1e6:.6g} MB"
    if mesh.seconds is not None:
        yield f"products of the sites of a process: {mesh.seconds * 1e3:.4g} ms a step, predicted"
    rates = {f"{t.link}: {t.source}; no transfer reaches it" for t in mesh.traffic if t.link}
    for line in [*sorted(rates), *mesh.notes]:
        yield line


def _layers(layers: Sequence[LayerShards]) -> Table:
    prefix = common_prefix([*map(path_of, layers)])
    unit, name = (1e3, "kB") if all(layer.held < 1e6 for layer in layers) else (1e6, "MB")
    cut, gathered = (any(getattr(layer, f) for layer in layers) for f in ("cut", "gathered"))
    title = f"{name} of a layer, what a process holds of it{', its part of a gather' * gathered}"
    title += f" (paths below {prefix[:-1]})" if prefix else ""
    fields = _SIZES | ({"gathered": "gather"} if gathered else {})
    made = table(title, "module", *["cut by"] * cut, *fields.values())
    for paths, layer in alike(layers):
        sizes = [getattr(layer, field) / unit for field in fields]
        cells = [f"{size:.3g}" if size else "-" for size in sizes]
        add_row(made, paths[len(prefix) :], *[layer.cut or "-"] * cut, *cells)
    return made


def _whole(layers: Sequence[LayerShards]) -> Iterator[str]:
    """What each process has all of: of all layers in one line where it is the same."""
    reasons: dict[str, list[str]] = {}
    prefix = common_prefix([*map(path_of, layers)])
    for paths, layer in alike(layers):
        reasons.setdefault(layer.whole, []).append(paths[len(prefix) :])
    for reason, modules in reasons.items():
        if reason:
            where = "every layer" if len(reasons) == 1 else ", ".join(modules)
            yield f"whole on every process: {reason} ({where})"


def _traffic(traffic: Sequence[Traffic]) -> Table:
    """A step's exchanges; times where a card is known."""
    known = any(one.seconds is not None for one in traffic)
    made = table("a step of a process", "exchange", "by", "along", "MB", "as it was")
    add_columns(made, "ms at least", "as it was", "over", shown=known)
    for one in traffic:
        row = [one.what, one.collective, one.axis, _size(one.bytes), _size(one.bytes_before)]
        if one.seconds is not None and one.seconds_before is not None:
            row += [f"{one.seconds * 1e3:.3g}", f"{one.seconds_before * 1e3:.3g}", one.link]
        add_row(made, *row)
    return made


def _size(count: int) -> str:
    return f"{count / 1e6:.6g}"
