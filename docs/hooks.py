"""Files outside of docs/ that pages link to: they join the site under the same relative links."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
OUTSIDE = ("benchmarks/results/*", "examples/*.png")


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
