"""``falqon-fx repro``, ``kernels`` and ``diff``: a site of a report, rebuilt and checked; what runs
it; what another report says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from falqon_fx.errors import FalqonError, one_line, printable
from falqon_fx.report.compare import compare
from falqon_fx.report.data import Site
from falqon_fx.report.kernels import source
from falqon_fx.report.report import ReportError, RewriteReport
from falqon_fx.report.repro import arguments as repro_arguments
from falqon_fx.report.repro import check, script
from falqon_fx.report.views import find_site
from falqon_fx_cli.exit_codes import DONE, FOUND
from falqon_fx_cli.output import print_json, write_text


def _read(path: Path) -> RewriteReport:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(str(path), str(error)) from error
    return RewriteReport.from_json(text, str(path))


def _find(path: Path, name: str | None) -> Site:
    report = _read(path)
    if not report.sites:
        raise FalqonError(str(path), "holds no rewritten site", "See its rejections")
    return find_site(report, name or report.sites[0].path)[1]


@dataclass(frozen=True)
class Repro:
    """What was given on the command line (`falqon_fx_cli.commands.repro`)."""

    report: Path
    site: str | None
    tokens: int | None
    device: Literal["cpu", "cuda"] | None
    write: Path | None
    as_json: bool

    def run(self) -> int:
        """Check one site, or write the program that does."""
        site = _find(self.report, self.site)
        if self.write:
            write_text(self.write, script(site))
            if self.as_json:
                print_json({"site": site.path, "written": self.write})
            return DONE
        chosen: dict[str, Any] = repro_arguments(site, self.tokens)
        if self.device:
            chosen["device"] = self.device
        result = check(**chosen)
        if self.as_json:
            print_json({"site": site.path, "right": result.right, **asdict(result)})
        else:
            print(f"{one_line(site.path)}: {result}")
        return DONE if result.right else FOUND


@dataclass(frozen=True)
class Kernels:
    """What was given on the command line (`falqon_fx_cli.commands.kernels`)."""

    report: Path
    site: str | None
    source: bool
    as_json: bool

    def run(self) -> int:
        """List the kernels of a report's sites."""
        sites = [_find(self.report, self.site)] if self.site else list(_read(self.report).sites)
        chosen: dict[tuple[str, str], list[Site]] = {}
        for site in sites:
            chosen.setdefault((site.kernel, site.kernel_reason), []).append(site)
        rows: list[dict[str, Any]] = [
            {
                "kernel": name,
                "why": why,
                "sites": [site.path for site in members],
                **({"source": source(members[0])} if self.source else {}),
            }
            for (name, why), members in chosen.items()
        ]
        if self.as_json:
            print_json(rows)
            return DONE
        for row in rows:
            first = f"{len(row['sites'])} sites, first {row['sites'][0]}. {row['why']}"
            print(one_line(f"{row['kernel']}: {first}"))
            print(printable(row.get("source", "")), end="")  # whatever the cache folder holds
        return DONE


@dataclass(frozen=True)
class Diff:
    """What was given on the command line (`falqon_fx_cli.commands.diff`)."""

    before: Path
    after: Path
    as_json: bool

    def run(self) -> int:
        """Compare two reports."""
        found = compare(_read(self.before), _read(self.after))
        if self.as_json:
            print_json(asdict(found))
        else:
            print(found, end="")
        return DONE
