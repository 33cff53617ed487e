"""The program ``falqon-fx``, also as ``python -m falqon_fx``."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from falqon_fx_cli import commands

app = typer.Typer(
    rich_markup_mode=None,  # plain text: no boxes to cut messages, and no import of rich
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
for _command in commands.ALL:
    app.command()(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"falqon-fx {version('falqon-fx')}")
        raise typer.Exit


@app.callback()
def _program(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="print it and exit"),
    ] = False,
) -> None:
    """LoRA fine-tuning on an FP8 backbone: see what it would do, and write its files.

    All commands take --json. 'falqon-fx COMMAND --help' shows the options of each.

    Exit codes: 0 done; 1 the model or the options can't be used as asked; 2 a wrong command line; 3
    explain --check found rejected or no sites, or repro a difference.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if argv is None:  # a program: a mapped file that is cut off kills it with a message
        with contextlib.suppress(RuntimeError, ValueError, OSError):  # stderr is closed
            faulthandler.enable()
    try:
        app(args=None if argv is None else list(argv), prog_name="falqon-fx")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 0
    return 0
