"""Hooks of mkdocs: files outside of docs/ join the site, and long paths in tables may break."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("benchmarks/results/*", "examples/*.png")
_CELL = re.compile(r"<td.*?</td>", re.DOTALL)
_SLASH = re.compile(r"(?<=[\w.])/(?=\w[^<]*</code>)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """``../NAME`` of a page in docs/ is NAME at the root of the repository and of the site."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = f"../{path.relative_to(ROOT).as_posix()}"
            file = File.generated(
                config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV
            )
            file.dest_uri = file.dest_uri.removeprefix("../")
            files.append(file)
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A long path would make its column as wide as itself."""
    return _CELL.sub(lambda cell: _SLASH.sub("/<wbr>", cell[0]), html)
