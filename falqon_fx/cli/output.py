"""Files that a command writes because it was asked to."""

from __future__ import annotations

from pathlib import Path

from falqon_fx.errors import FalqonError


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
