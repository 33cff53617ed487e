"""Which sites have a weight of a shape, for the headers of generated kernels (they are for people).

A kernel serves every site of its sizes; who compiled first is no part of what it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import pairwise

Shape = tuple[int | None, int | None]  # [out, in] of W; None: any

_SHOWN = 12
_paths: dict[tuple[int, int], dict[str, None]] = {}


def announce(out: int, features: int, path: str) -> None:
    """There is a site at ``path`` with W [out, features]."""
    _paths.setdefault((out, features), {})[path] = None


def known() -> int:
    """How many sites there are: what was said of them before holds as long as this does."""
    return sum(map(len, _paths.values()))


def sites(shapes: Collection[Shape]) -> str:
    """The sites with one of ``shapes`` in words, those of different layers together; or ""."""
    found = [
        path
        for (out, features), paths in _paths.items()
        if any(o in (out, None) and f in (features, None) for o, f in shapes)
        for path in paths
    ]
    layers: dict[tuple[str, str], set[int]] = {}
    for path in found:
        head, number, tail = _split(path)
        layers.setdefault((head, tail), set()).update([] if number is None else [number])
    texts = [head + _ranges(sorted(numbers)) + tail for (head, tail), numbers in layers.items()]
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _split(path: str) -> tuple[str, int | None, str]:
    """``model.layers.3.mlp.up_proj`` → ("model.layers.", 3, ".mlp.up_proj")."""
    found = re.search(r"(?<![^.])\d+(?![^.])", path)
    if found is None:
        return path, None, ""
    return path[: found.start()], int(found[0]), path[found.end() :]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "{0-2,5}", [3] → "3"."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    return "{" + ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends)) + "}"
