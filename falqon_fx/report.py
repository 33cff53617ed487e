"""What the passes did and why: data first, text second."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Site:
    """One Linear+LoRA subgraph that was rewritten."""

    path: str
    out_features: int
    in_features: int
    rank: int
    scaling: float
    dropout: float
    out_dtype: str
    spec: str


@dataclass(frozen=True)
class Rejected:
    """One LoRA-like subgraph that was left exactly as it was."""

    site: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.site}: {self.reason}. {self.remedy}."


@dataclass(frozen=True)
class GraphReport:
    """One graph that went through the passes."""

    sites: tuple[Site, ...]
    rejected: tuple[Rejected, ...]
    nodes_before: int
    nodes_after: int
    pass_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RewriteReport:
    """All graphs of a compilation; prints as a table."""

    graphs: tuple[GraphReport, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        return tuple(item for graph in self.graphs for item in graph.rejected)

    def __str__(self) -> str:
        table = Table(title=f"{len(self.sites)} sites rewritten, {len(self.rejected)} rejected")
        for column in ("module", "weight", "rank", "scaling", "out"):
            table.add_column(column, overflow="fold")
        for site in self.sites:
            shape = f"{site.out_features} x {site.in_features}"
            table.add_row(site.path, shape, str(site.rank), f"{site.scaling:g}", site.out_dtype)
        for item in self.rejected:
            table.add_row(item.site, "rejected", "", "", f"{item.reason}. {item.remedy}.")
        # Reasons hold brackets such as [in, out]: no markup, no emoji codes.
        console = Console(
            width=100, file=io.StringIO(), record=True, markup=False, emoji=False, highlight=False
        )
        console.print(table)
        return console.export_text()


def common_path(names: list[str]) -> str:
    """The deepest module that holds all of a site's parameters."""
    common: list[str] = []
    for column in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common) or names[0]
