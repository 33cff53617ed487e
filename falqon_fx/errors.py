"""Errors and warnings that name the site, what is wrong, and the remedy; text that a terminal
can't obey.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence


def one_line(text: str) -> str:
    """``text``, which may come from a file, with the Python escape of all that isn't printable:
    control characters, line ends, marks that turn the direction of reading.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable(text: str) -> str:
    """The same for text that may have several lines."""
    return "\n".join(map(one_line, text.split("\n")))


class FalqonError(RuntimeError):
    """A model, parameter or environment that falqon can't train rightly.

    Raised before anything is changed. The attributes hold names as they are, the message holds them
    printable.
    """

    def __init__(self, site: str, problem: str, remedy: str) -> None:
        self.site, self.problem, self.remedy = site, problem, remedy
        text = f"{printable(problem)}. {printable(remedy)}."
        super().__init__(f"{one_line(site)}: {text}" if site else text)


class NoKernelError(ValueError):
    """No kernel, or not the one that was asked for, takes a product; it knows no path of a site."""


def named(sites: Sequence[str]) -> str:
    """Paths of sites on one line; of many the first."""
    more = f" and {len(sites) - 3} others" if len(sites) > 3 else ""
    return one_line(", ".join(sites[:3])) + more


@functools.cache
def warn_once(text: str, stacklevel: int = 3, kind: type[Warning] = UserWarning) -> None:
    """Warn of something once, until ``torch._dynamo.reset()``. Python's own "once" forgets whenever
    someone uses `warnings.catch_warnings`, as torch does in each compilation.
    """
    warnings.warn(printable(text), kind, stacklevel=stacklevel)


class SiteError(FalqonError):
    """What an op found wrong with the site at ``index`` of its lists; it knows no paths.

    The backend raises it again under the site's path.
    """

    def __init__(self, index: int, problem: str, remedy: str) -> None:
        self.index = index
        super().__init__(f"site {index}", problem, remedy)


class PassError(FalqonError):
    """An invariant that a rewritten graph breaks at ``place``: a bug of the passes, never of the
    model.
    """

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(
            place,
            f"the rewritten graph is wrong: {problem}",
            "This is a bug of falqon-fx: report it with what FALQON_DUMP=FOLDER writes. Until then "
            "the option exclude leaves a layer as it was",
        )


class FalqonConfigError(FalqonError, ValueError):
    """An unknown option, or a value outside what the option takes."""

    def __init__(self, option: str, problem: str, remedy: str) -> None:
        super().__init__(f"option {option!r}", problem, remedy)
