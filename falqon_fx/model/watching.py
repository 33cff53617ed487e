"""`watch`: the audit of every optimizer step, live in the terminal, as JSONL, and for callbacks."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from io import FileIO
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from falqon_fx.errors import FalqonError, one_line
from falqon_fx.model.cast_audit import CastMeter
from falqon_fx.model.lora_layers import unwrap
from falqon_fx.report.data import Audit, CastAudit
from falqon_fx.rows import audit, drift
from falqon_fx.rows.audit import COLUMNS, WriteBackBatch
from falqon_fx.rows.model import adapters as rows_adapters
from falqon_fx.rows.state import MergedAdapter

Audits = Sequence[Audit] | Sequence[CastAudit]  # of one step
Callback = Callable[[Any], None]  # with the audits of a step
_Piece = tuple[list[Tensor], Tensor]  # `WriteBackBatch.applied` and `.table`
_SHOWN = 12  # sites in the live view: those that lose the largest share


class Watch:
    """Context manager: what each optimizer step did at each site of ``model``. With
    update="adapter", the default, what the casts of the adapters take (`CastAudit`); with
    update="rows" what the write-back did (`Audit`).

        with falqon_fx.watch(model, jsonl="audit.jsonl", live=True) as seen:
            train()
        report.to_html(seen.history)

    Callbacks, lines and the view come when the next step begins, since a graph writes it in pieces,
    and for the last step on leaving (or at `flush`). On an accelerator nothing waits for the device
    before that. Casts are measured behind each ``step()`` of an optimizer of torch's that has
    adapters of the model.

    With update="rows", after `falqon_fx.prepare`, a row is rounded anew whenever it is written, and
    drifts from the base weight: `Audit.drift` tells how far, and a warning names the sites where it
    passes 2.

    Args:
        model: the module or its compiled wrapper.
        jsonl: a file that gets one line per site and step, its audit, behind what it holds
            already, so that a resumed run continues it. Where it can't be written any
            more, a warning says so and training goes on.
        live: a table in the terminal (nothing where stderr is none).
        callbacks: called with the audits of each step: `tensorboard`, `wandb`, your own. With
            transformers' Trainer see `falqon_fx.integrations.transformers.WatchCallback`.
        keep: how many audits and row numbers `history` may hold together; beyond that the oldest
            steps leave it. A million take about 40 MB.

    Attributes:
        history: the audits of the last steps, the last one always among them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        jsonl: str | Path | None = None,
        live: bool = False,
        callbacks: Sequence[Callback] = (),
        keep: int = 1_000_000,
    ) -> None:
        self.history: list[Any] = []
        self._meter = CastMeter(unwrap(model))
        self._model, self._callbacks = model, tuple(callbacks)
        self._kept = deque[tuple[int, int]]()  # audits and size of each step in `history`
        self._size, self._keep = 0, keep
        self._path = jsonl
        self._pieces: list[_Piece] = []
        self._seen: set[int] = set()
        self._sites: dict[int, _Watched] = {}  # by the address of their `applied`
        self._open = ExitStack()  # while it is, write-backs are looked at; then the last step comes
        self._file: FileIO | None = None
        self._step: Audits = ()  # the last one
        # Drawn four times a second by a thread of its own, however short a step is.
        terminal = Console(file=sys.stderr)
        view = Live(console=terminal, get_renderable=lambda: _view(self._step))
        self._live = view if live else None

    def __enter__(self) -> Watch:
        if self._path is not None:
            self._file = self._open.enter_context(_continued(self._path))
        if self._live is not None:
            self._open.enter_context(self._live)
        self._open.callback(self.flush)
        self._open.enter_context(audit.observers.subscribed(self._look))
        self._open.callback(register_optimizer_step_post_hook(self._stepped).remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def _stepped(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._close(self._meter.read())
        self._meter.look(optimizer)

    def _look(self, written: WriteBackBatch) -> None:
        places = {tensor.data_ptr() for tensor in written.applied}
        if places & self._seen:  # a site comes again: a new step has begun
            self.flush()
        self._seen |= places
        self._pieces.append((written.applied, written.table()))

    def flush(self) -> list[Any]:
        """Close the step that is under way, hand its audits on, and return them."""
        return [*self._close(self._written()), *self._close(self._meter.read())]

    def _close(self, audits: Iterator[Audit] | Iterator[CastAudit]) -> list[Any]:
        step: list[Any] = list(audits)
        if step:
            self._remember(step)
            self._hand_on(step)
        return step

    def _written(self) -> Iterator[Audit]:
        """The audits of the write-backs since the last step."""
        if not self._pieces:
            return
        if not self._seen <= self._sites.keys():  # state is made at the first compiled call
            for path, state in rows_adapters(unwrap(self._model)).items():
                self._sites.setdefault(state.applied.data_ptr(), _Watched(path, state))
        yield from _audits(self._pieces, self._sites)
        self._pieces.clear()
        self._seen.clear()
        passed = [site.path for site in self._sites.values() if site.has_passed()]
        if passed:
            drift.warn(passed)

    def _remember(self, step: Sequence[Any]) -> None:
        """Add a step to the history, and take off the oldest until what is left may be kept."""
        self.history.extend(step)
        size = sum(1 + len(getattr(item, "rows", ())) for item in step)
        self._kept.append((len(step), size))
        self._size += size
        old = 0
        while self._size > self._keep and len(self._kept) > 1:
            count, size = self._kept.popleft()
            old += count
            self._size -= size
        del self.history[:old]

    def _hand_on(self, step: Sequence[Any]) -> None:
        self._step = step
        if self._file is not None:
            self._write(self._file, step)
        for callback in self._callbacks:
            callback(step)

    def _write(self, file: FileIO, step: Sequence[Any]) -> None:
        text = "".join(json.dumps(vars(item)) + "\n" for item in step).encode()
        try:
            if file.write(text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file = None
            warnings.warn(
                f"falqon: watch can't write {one_line(str(self._path))} any more "
                f"({error.strerror}): its audits from step {step[0].step} on are missing there. "
                "Free some space, and start watch again.",
                stacklevel=2,
            )


def _continued(path: str | Path) -> FileIO:
    """A file of lines to write on, from the beginning of one."""
    try:
        cut = _ends_within_a_line(path)  # where the last run was killed
        with ExitStack() as open_until_it_fails:
            file = open_until_it_fails.enter_context(open(path, "ab", buffering=0))
            if cut:
                file.write(b"\n")
            open_until_it_fails.pop_all()
    except OSError as error:
        problem = f"it can't be written ({error.strerror})"
        raise FalqonError(str(path), problem, "Name another file in jsonl=") from error
    return file


def _ends_within_a_line(path: str | Path) -> bool:
    if not os.path.isfile(path) or not os.path.getsize(path):
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


watch = Watch  # `with falqon_fx.watch(model) as seen`


class _Watched:
    """A site of the model, and how far it has drifted: not asked before its first write-back."""

    def __init__(self, path: str, state: MergedAdapter) -> None:
        self.path, self._state = path, state
        self._meter: drift.Meter | None = None
        self._drift: float | None = None

    def drift_after(self, rows: Sequence[int]) -> float | None:
        if self._meter is None:
            self._meter = drift.Meter(self._state)
        self._drift = self._meter.after(rows)
        return self._drift

    def has_passed(self) -> bool:
        return self._meter is not None and self._meter.passes(self._drift)


def _audits(pieces: Sequence[_Piece], sites: dict[int, _Watched]) -> Iterator[Audit]:
    device = pieces[0][1].device
    tables = torch.cat([table.to(device).flatten() for _, table in pieces])
    values = iter(tables.tolist())  # the step's one look at the device
    for applied, table in pieces:
        for site in applied:
            line = list(islice(values, table.shape[1]))
            known = sites.get(site.data_ptr())
            if known is None:  # another model's site
                continue
            own: dict[str, Any] = dict(zip(COLUMNS, line))
            rest = line[len(COLUMNS) :]
            half = len(rest) // 2
            rows = sorted(int(row) for row, used in zip(rest[:half], rest[half:]) if used)
            for name in ("step", "clamped"):
                own[name] = int(own[name])
            own["drift"] = known.drift_after(rows)
            yield Audit(site=known.path, out=site.shape[0], rows=tuple(rows), **own)


def summary(step: Audits) -> dict[str, float]:
    """One step over all sites. Of casts the largest losses and share, and the sum of what is
    clamped; of write-backs norms as of one long vector, counts and masses as sums, and the largest
    drift where any is known.
    """
    if casts := [item for item in step if isinstance(item, CastAudit)]:
        found = {n: max(getattr(item, n) for item in casts) for n in ("lost_a", "lost_b")}
        shares = [item.share for item in casts if item.share is not None]
        largest = {"share": max(shares)} if shares else {}
        return {**found, **largest, "saturated": float(sum(item.saturated for item in casts))}
    written = [item for item in step if isinstance(item, Audit)]
    names = ("asked", "kept", "lost")
    norms = {n: sum(getattr(item, n) ** 2 for item in written) ** 0.5 for n in names}
    rows = sum(len(item.rows) for item in written)
    sums = {n: float(sum(getattr(item, n) for item in written)) for n in ("clamped", "pending")}
    drifts = [item.drift for item in written if item.drift is not None]
    largest = {"drift": max(drifts)} if drifts else {}
    return {**norms, **sums, "rows": float(rows), **largest}


def tensorboard(writer: Any, tag: str = "falqon") -> Callback:
    """A callback that writes each step's `summary` to a ``SummaryWriter``."""

    def write(step: Audits) -> None:
        for name, value in summary(step).items():
            writer.add_scalar(f"{tag}/{name}", value, step[0].step)

    return write


def wandb(run: Any, tag: str = "falqon") -> Callback:
    """A callback that logs each step's `summary` to a Weights & Biases run, beside what else is
    logged there; ``falqon/step`` counts the optimizer's steps.
    """

    def write(step: Audits) -> None:
        values = {"step": step[0].step, **summary(step)}
        run.log({f"{tag}/{name}": value for name, value in values.items()})

    return write


def _view(step: Audits) -> Table:
    if not step:
        return Table(title="no step yet")
    if casts := [item for item in step if isinstance(item, CastAudit)]:
        return _view_of_casts(casts)
    return _view_of_writes([item for item in step if isinstance(item, Audit)])


def _view_of_casts(step: Sequence[CastAudit]) -> Table:
    """The sites whose casts lose the largest share."""
    names = ("site", "A off", "s·B off", "s·B·A beside W", "clamped")
    table = Table(*names, title=f"step {step[0].step}: casts of {len(step)} adapters")
    for item in sorted(step, key=lambda item: -max(item.lost_a, item.lost_b))[:_SHOWN]:
        share = "" if item.share is None else f"{item.share:.2%}"
        losses = f"{item.lost_a:.2%}", f"{item.lost_b:.2%}"
        table.add_row(Text(one_line(item.site)), *losses, share, str(item.saturated))
    return table


def _view_of_writes(step: Sequence[Audit]) -> Table:
    total = summary(step)
    title = (
        f"step {step[0].step}: {total['rows']:.0f} rows, asked {total['asked']:.3g}, kept "
        f"{total['kept']:.3g}, lost {total['lost']:.3g}"
    )
    names = ("site", "rows", "asked", "kept", "lost", "clamped", "pending", "drift")
    table = Table(*names, title=title)
    for item in sorted(step, key=lambda item: -item.lost / (item.asked or 1.0))[:_SHOWN]:
        norms = (f"{v:.3g}" for v in (item.asked, item.kept, item.lost))
        rows = str(len(item.rows))
        drifted = "" if item.drift is None else f"{item.drift:.2f}"
        site = Text(one_line(item.site))  # no markup
        table.add_row(site, rows, *norms, str(item.clamped), f"{item.pending:.3g}", drifted)
    return table
