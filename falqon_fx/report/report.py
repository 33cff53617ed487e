"""What the passes did and why: data first (`falqon_fx.report.data`), text second.

The JSON of a report (`RewriteReport.to_json`) is its tree, field by field, which pydantic reads
strictly; its schema is `json_schema`. Sizes that are symbols of Dynamo are strings such as "s77",
all else is plain JSON.

What makes a table or a page (rich, Jinja, Pygments) is imported where one is made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from falqon_fx.errors import FalqonError
from falqon_fx.report.checked import STRICT, read, schema
from falqon_fx.report.data import Audit, CastAudit, Graphs
from falqon_fx.site.spec import parse_spec


@dataclass(frozen=True)
class RewriteReport(Graphs):
    """All graphs of a compilation; prints as tables that fit 100 columns.

    A layer in two graphs, as on both sides of a graph break, stands in the lists of both.

    Attributes:
        options: the config in force.
        modules: paths of all modules that hold parameters of their own, the map of the model.
        notes: what `explain` did or assumed on its own account.
        mesh: what training on several processes would hold and move, where `explain` was asked.
        sensitivity: the rise of the loss per label, in nats, that the casts of each site are
            expected to cost, the largest first; where `explain` had a calibration.
        schema: counts up when a field changes its meaning or goes.
    """

    __pydantic_config__ = STRICT

    schema: Literal[2] = 2

    def __str__(self) -> str:
        from falqon_fx.report.text import to_text

        return to_text(self)

    def to_html(self, audits: Sequence[Audit | CastAudit] = ()) -> str:
        """One self-contained page: the model's map, each site's graph, kernel, costs, live state.

        ``audits`` is the history of a `falqon_fx.watch`.
        """
        from falqon_fx.report.page import to_html

        return to_html(self, audits)

    def to_diff(self, width: int = 160) -> str:
        """The graphs before and after side by side, unchanged stretches folded."""
        from falqon_fx.report.views import to_diff

        return to_diff(self, width)

    def to_svg(self, path: str) -> str:
        """The graph around the site at ``path``, before and after, as an SVG image.

        Raises:
            FalqonError: no such site; the message names the nearest.
        """
        from falqon_fx.report.views import to_svg

        return to_svg(self, path)

    def to_json(self, *, graphs: bool = False, indent: int | None = None) -> str:
        """The report as JSON (`json_schema`); the text of the graphs only if asked for."""
        tree = asdict(self)
        for site, plain in zip(self.sites, (s for g in tree["graphs"] for s in g["sites"])):
            plain["options"] = site.options
        for graph in tree["graphs"] if not graphs else ():
            graph["before"] = graph["after"] = []
        return json.dumps(tree, indent=indent)

    @classmethod
    def from_json(cls, text: str, name: str = "the report") -> RewriteReport:
        """The inverse of `to_json`; ``name``, such as the file's, stands in the error.

        Raises:
            ReportError: it is none, or one of another schema.
        """
        try:
            report = read(cls, text)
        except ValueError as error:
            raise ReportError(name, str(error)) from error
        assert isinstance(report, cls)
        for site in report.sites:
            try:
                parse_spec(site.spec)
            except ValueError as error:
                problem = f"the spec of site {site.path!r} is {site.spec!r}"
                raise ReportError(name, problem) from error
        return report


class ReportError(FalqonError, ValueError):
    """A text that is no report."""

    def __init__(self, name: str, problem: str) -> None:
        remedy = "Write one with falqon-fx explain --json"
        super().__init__(name, f"is no report ({problem})", remedy)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `RewriteReport.to_json`."""
    known = schema(RewriteReport)
    options = {"type": "object", "additionalProperties": {"type": "string"}}
    known["$defs"]["Site"]["properties"]["options"] = options  # for who reads it without the spec
    return known
