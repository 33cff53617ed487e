"""Which sites have a weight of a shape, for the headers of generated kernels (they are for people).

A kernel serves every site of its sizes; who compiled first is no part of what it is.
"""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 6
_paths: dict[tuple[int, int], dict[str, None]] = {}


def announce(out: int, features: int, path: str) -> None:
    """There is a site at ``path`` with W [out, features]."""
    _paths.setdefault((out, features), {})[path] = None


def sites(shapes: Iterable[tuple[int | None, int]]) -> str:
    """The sites with one of ``shapes`` (out None: any) in words, or ""."""
    wanted = set(shapes)
    found = [
        path
        for (out, features), paths in _paths.items()
        if (out, features) in wanted or (None, features) in wanted
        for path in paths
    ]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
