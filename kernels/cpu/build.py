"""The C++ beside a module here as compiled code, built by Inductor's compiler at need."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from falqon_fx import _compat

log = logging.getLogger(__name__)


def compiled(source: Path, functions: Sequence[str], without: str) -> Any | None:
    """The library made from a file, of which ``functions`` are called and return nothing; None
    where no compiler works, with the reason in the log and ``without``, what that costs.
    """
    try:
        library = _compat.compile_cpp(source.read_text())
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        log.warning(
            "falqon: %s. Remedy: install a C++ compiler, or name one with CXX=... Reason: %s",
            without,
            error,
        )
        return None
    for name in functions:
        getattr(library, f"falqon_{name}").restype = None
    return library
