"""The command line: ``falqon-fx explain | cost | export | prequantize | repro | kernels``, also as
``python -m falqon_fx``. All commands take --json.

Exit codes: 0 done; 1 a `FalqonError`: the model or the options can't be used as asked; 2 a wrong
command line; 3 ``explain --check`` found rejected or no sites, or ``repro`` a difference.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import faulthandler
import json
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from falqon_fx_cli import commands
from falqon_fx_cli.exit_codes import FAILED, USAGE


class Parser(argparse.ArgumentParser):
    """Names the nearest valid word where a word is unknown."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs, allow_abbrev=False)

    def unknown(self, word: str) -> NoReturn:
        """Leave with `USAGE` and the nearest option."""
        options = [o for action in self._actions for o in action.option_strings]
        self.error(f"unknown argument {word!r}; the nearest is {nearest(word, options)!r}")


def nearest(word: str, known: Sequence[str]) -> str:
    """The member of ``known`` that is most like ``word``."""
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser and those of its commands."""
    parser = Parser(prog="falqon-fx", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for add in commands.ALL:
        add(subparsers)
    return parser, subparsers.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if argv is None:  # a program: a mapped file that is cut off kills it with a message
        with contextlib.suppress(RuntimeError, ValueError, OSError):  # stderr is closed
            faulthandler.enable()
    words = list(sys.argv[1:] if argv is None else argv)
    parser, known = make_parser()
    if not words:
        parser.print_help()
        return USAGE
    if not words[0].startswith("-") and words[0] not in known:
        near = nearest(words[0], [*known])
        parser.error(f"unknown command {words[0]!r}; the nearest is {near!r}")
    arguments, rest = parser.parse_known_args(words)
    if rest:
        known[arguments.command].unknown(rest[0])
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    """What a command does is imported here and no earlier, and torch with it."""
    from falqon_fx.errors import FalqonError

    try:
        return int(pkgutil.resolve_name(arguments.run)(arguments))
    except FalqonError as error:
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        print(f"falqon-fx: {error}", file=sys.stderr)
        return FAILED
