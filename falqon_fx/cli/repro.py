"""``falqon-fx repro`` and ``falqon-fx kernels``: one site rebuilt and checked; what runs it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from falqon_fx.errors import FalqonError, one_line, printable
from falqon_fx.report.data import Site
from falqon_fx.report.kernels import source
from falqon_fx.report.report import ReportError, RewriteReport
from falqon_fx.report.repro import arguments as repro_arguments
from falqon_fx.report.repro import check, script
from falqon_fx.report.views import find_site
from falqon_fx_cli.exit_codes import DONE, FOUND
from falqon_fx_cli.output import write_text


def _read(path: Path) -> RewriteReport:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(str(path), str(error)) from error
    return RewriteReport.from_json(text, str(path))


def _site(arguments: argparse.Namespace) -> Site:
    report = _read(arguments.report)
    if not report.sites:
        raise FalqonError(str(arguments.report), "holds no rewritten site", "See its rejections")
    return find_site(report, arguments.site or report.sites[0].path)[1]


def run_repro(arguments: argparse.Namespace) -> int:
    """Check one site, or write the program that does."""
    site = _site(arguments)
    if arguments.write:
        write_text(arguments.write, script(site))
        if arguments.json:
            print(json.dumps({"site": site.path, "written": str(arguments.write)}))
        return DONE
    chosen: dict[str, Any] = repro_arguments(site, arguments.tokens)
    if arguments.device:
        chosen["device"] = arguments.device
    result = check(**chosen)
    if arguments.json:
        print(json.dumps({"site": site.path, **asdict(result)}))
    else:
        print(f"{one_line(site.path)}: {result}")
    return DONE if result.right else FOUND


def run_kernels(arguments: argparse.Namespace) -> int:
    """List the kernels of a report's sites."""
    report = _read(arguments.report)
    sites = [_site(arguments)] if arguments.site else list(report.sites)
    chosen: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        chosen.setdefault((site.kernel, site.kernel_reason), []).append(site)
    rows: list[dict[str, Any]] = [
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
        return DONE
    for row in rows:
        first = f"{len(row['sites'])} sites, first {row['sites'][0]}. {row['why']}"
        print(one_line(f"{row['kernel']}: {first}"))
        print(printable(row.get("source", "")), end="")  # whatever the cache folder holds
    return DONE
