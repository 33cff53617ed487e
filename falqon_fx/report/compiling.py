"""A line when a compile that takes long begins, while it goes on, and when it ends.

It goes to the logger ``falqon_fx`` where that has a handler for INFO, else to stderr;
``logging.getLogger("falqon_fx").setLevel("WARNING")`` silences it. What is quick says nothing, and
of several processes the first alone speaks.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from falqon_fx.errors import printable
from falqon_fx.report.data import GraphReport

log = logging.getLogger("falqon_fx")
FIRST, EVERY = 3.0, 30.0  # seconds until the first line, and between the next ones


@contextmanager
def told(graph: GraphReport, number: int) -> Iterator[None]:
    """Tell of the compile within, of a graph that is the ``number``-th of its code, from 0."""
    start, ended, begun = time.perf_counter(), threading.Event(), threading.Event()

    def tell() -> None:
        if ended.wait(FIRST):
            return
        begun.set()
        say(f"falqon: {_title(graph, number)}")
        while not ended.wait(EVERY):
            say(f"falqon: still compiling, {time.perf_counter() - start:.0f} s")

    thread = threading.Thread(target=tell, name="falqon-compiling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if begun.is_set():
        say(f"falqon: compiled in {time.perf_counter() - start:.0f} s")


def _title(graph: GraphReport, number: int) -> str:
    count = len(graph.sites)
    layers = {m[0] for site in graph.sites if (m := re.match(r"(?:.*?\.)?\d+(?=\.)", site.path))}
    what = f"{len(layers)} layers as one graph" if len(layers) > 1 else "a graph"
    text = f"compiling {what}, {count} site{'s' * (count != 1)}; "
    if number == 0:
        return text + "this happens once"
    return text + f"it is graph {number + 1} of its code: a size, the mode or an adapter changed"


def say(text: str) -> None:
    """Print or log a line."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
        return
    text = printable(text)
    if log.isEnabledFor(logging.INFO) and log.hasHandlers():
        log.info(text)
    elif log.level <= logging.INFO:  # nobody has set it higher
        _print(text)


def _print(text: str) -> None:
    from rich.console import Console
    from rich.control import Control
    from rich.segment import ControlType

    console = Console(stderr=True)
    if console.is_terminal:  # over a progress bar, which is drawn anew below
        console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
    console.print(text, soft_wrap=True, highlight=False, markup=False)
