"""``falqon-fx repro`` and ``falqon-fx kernels``: one site rebuilt and checked; what runs it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from falqon_fx.errors import FalqonError
from falqon_fx.report.data import Site
from falqon_fx.report.kernels import source
from falqon_fx.report.report import RewriteReport
from falqon_fx.report.repro import arguments as repro_arguments
from falqon_fx.report.repro import check, script
from falqon_fx.report.views import find_site


def add_parser(commands: Any) -> None:
    """Add both commands to the subparsers of `falqon_fx.cli.main`."""
    text = "Rebuild one site of a report with random data and check it; exits with 3 if wrong."
    parser = commands.add_parser("repro", help=text, description=text)
    parser.set_defaults(run=run_repro)
    _add_report(parser)
    parser.add_argument("--tokens", type=int, help="by default those of the report, at most 4096")
    parser.add_argument("--device", help="by default the site's, or the CPU where there is no GPU")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the program, don't run it"
    )
    text = "The kernel that runs each site of a report, why it was chosen, and its source."
    parser = commands.add_parser("kernels", help=text, description=text)
    parser.set_defaults(run=run_kernels)
    _add_report(parser)
    parser.add_argument("--source", action="store_true", help="print the source as well")


def _add_report(parser: Any) -> None:
    parser.add_argument(
        "report", type=Path, metavar="REPORT", help="of falqon-fx explain --json, or FALQON_DUMP's"
    )
    parser.add_argument("site", nargs="?", metavar="SITE", help="a path (default: the first site)")
    parser.add_argument("--json", action="store_true")


def _read(path: Path) -> RewriteReport:
    try:
        return RewriteReport.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise FalqonError(
            str(path), f"is no report ({error})", "Write one with falqon-fx explain --json"
        ) from error


def _site(arguments: argparse.Namespace) -> Site:
    report = _read(arguments.report)
    if not report.sites:
        raise FalqonError(str(arguments.report), "holds no rewritten site", "See its rejections")
    return find_site(report, arguments.site or report.sites[0].path)[1]


def run_repro(arguments: argparse.Namespace) -> int:
    """Check one site, or write the program that does."""
    site = _site(arguments)
    if arguments.write:
        arguments.write.write_text(script(site), encoding="utf-8")
        return 0
    chosen: dict[str, Any] = repro_arguments(site, arguments.tokens)
    if arguments.device:
        chosen["device"] = arguments.device
    result = check(**chosen)
    if arguments.json:
        print(json.dumps({"site": site.path, **asdict(result)}))
    else:
        print(f"{site.path}: {result}")
    return 0 if result.right else 3


def run_kernels(arguments: argparse.Namespace) -> int:
    """List the kernels of a report's sites."""
    report = _read(arguments.report)
    sites = [_site(arguments)] if arguments.site else list(report.sites)
    chosen: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        chosen.setdefault((site.kernel, site.kernel_reason), []).append(site)
    rows = [
        {
            "kernel": name,
            "why": why,
            "sites": [site.path for site in members],
            **({"source": source(members[0])} if arguments.source else {}),
        }
        for (name, why), members in chosen.items()
    ]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(f"{row['kernel']}: {len(row['sites'])} sites, first {row['sites'][0]}. {row['why']}")
        print(row.get("source", ""), end="")
    return 0
