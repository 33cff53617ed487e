"""Each pass on record: its time, and the graph behind it wherever torch users look for one.

* ``TORCH_TRACE=dir``: artifacts ``falqon_<n>_<pass>`` in torch's structured trace (for tlparse)
* ``TORCH_LOGS="+falqon_fx"``: the same as log lines (without "+", one line per graph)
* ``FALQON_DUMP=dir``: files, among them one ``repro.py`` per site (`falqon_fx.report.repro`)
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from torch import fx

from falqon_fx import _compat
from falqon_fx.report.kernels import source
from falqon_fx.report.listing import listing
from falqon_fx.report.report import RewriteReport
from falqon_fx.report.repro import script

log = logging.getLogger(__name__)


class PassLog:
    """The passes over one graph, each with the seconds that it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._folder = _folder()

    def add(self, name: str, seconds: float, gm: fx.GraphModule) -> None:
        """Put a pass and the graph behind it on record."""

        def text() -> str:
            return "".join(f"{line.text}\n" for line in listing(gm))

        label = f"{len(self.seconds)}_{name}"
        self.seconds[name] = seconds
        _compat.trace_artifact(f"falqon_{label}", text)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("graph after %s:\n%s", name, text())
        if self._folder is not None:
            (self._folder / f"{label}.txt").write_text(text(), encoding="utf-8")

    def finish(self, report: RewriteReport) -> None:
        """Put the report on record, and the sites' kernels and repros."""
        _compat.trace_artifact("falqon_report", lambda: report.to_json(indent=1))
        log.info("%s, passes %.3f s", report.title, sum(self.seconds.values()))
        if self._folder is None:
            return
        (self._folder / "report.json").write_text(report.to_json(indent=1), encoding="utf-8")
        for site in report.sites:
            folder = self._folder / _file_name(site.path)
            folder.mkdir(exist_ok=True)
            (folder / "repro.py").write_text(script(site), encoding="utf-8")
            (folder / "kernel.py").write_text(source(site), encoding="utf-8")


def _file_name(path: str) -> str:
    """A name below the folder, whatever a module is called; file systems take 255 bytes."""
    return re.sub(r"^\.|[^\w.-]", "_", path, flags=re.ASCII)[-200:] or "_"


def _folder() -> Path | None:
    """A new folder below ``$FALQON_DUMP``: one per graph, in the order of compilation."""
    root = os.environ.get("FALQON_DUMP")
    if not root:
        return None
    number = 0
    while True:
        folder = Path(root) / f"graph_{number:03}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        return folder
