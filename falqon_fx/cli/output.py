"""What a command writes: JSON on the terminal, and files because it was asked to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from falqon_fx.errors import FalqonError


def print_json(data: Any) -> None:
    """Print data as JSON that any parser takes: what is no number (NaN, Inf) is null."""
    print(json.dumps(_plain(data), indent=1, allow_nan=False))


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(name): _plain(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, Path):
        return str(data)
    if isinstance(data, float) and data - data != 0:
        return None
    return data


def write_text(path: Path, text: str) -> None:
    """Write a file of the user's.

    Raises:
        FalqonError: it can't be written there.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        problem = f"it can't be written ({error.strerror})"
        raise FalqonError(str(path), problem, "Name another file") from error
