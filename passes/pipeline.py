"""The pipeline: the passes in their order, and the work that each hands on to the next.

A pass is a function of its own file; what it reads and returns is told by its step here. To add
one, write a step and name it in `PASSES` (docs/guides/add-a-pass.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from falqon_fx.config import FalqonConfig
from falqon_fx.passes.autotune import autotune
from falqon_fx.passes.copy_graph import copy_graph
from falqon_fx.passes.insert_operands import Operands, insert_operands
from falqon_fx.passes.match.dataflow import Match, RejectedMatch
from falqon_fx.passes.match.pair import match
from falqon_fx.passes.normalize import normalize
from falqon_fx.passes.plan import Plan, plan
from falqon_fx.passes.rewrite import rewrite
from falqon_fx.passes.scope import Scope
from falqon_fx.passes.verify import Wiring, verify, wiring
from falqon_fx.report.data import Note
from falqon_fx.report.passlog import PassLog


@dataclass
class Work:
    """One graph on its way through the passes. The fields below ``notes`` are filled in by the
    passes; reading one too early raises AttributeError.
    """

    given: fx.GraphModule  # stays as it is
    inputs: Sequence[Any]
    config: FalqonConfig
    tune: bool = False
    notes: list[Note] = field(default_factory=list)  # for the report, by whichever pass
    gm: fx.GraphModule = field(init=False)  # the copy that is edited
    root: Scope = field(init=False)
    before: Wiring = field(init=False)
    matches: list[Match] = field(init=False)
    rejected: list[RejectedMatch] = field(init=False)
    plan: Plan = field(init=False)
    operands: Operands = field(init=False)
    after: Wiring = field(init=False)


def _copy(work: Work) -> None:
    work.gm = copy_graph(work.given)


def _normalize(work: Work) -> None:
    work.root = normalize(work.gm, work.inputs)
    work.before = wiring(work.root)


def _match(work: Work) -> None:
    keep_dropout = work.config.dropout == "exact"
    work.matches, work.rejected = match(work.root, keep_dropout)


def _plan(work: Work) -> None:
    work.plan = plan(work.root, work.matches, work.rejected, work.config)


def _autotune(work: Work) -> None:
    work.plan = autotune(work.plan, time=work.tune)


def _insert_operands(work: Work) -> None:
    work.operands = insert_operands(work.plan)


def _rewrite(work: Work) -> None:
    rewrite(work.plan, work.operands)


def _verify(work: Work) -> None:
    work.after = verify(work.plan, work.operands, work.before)


PASSES: dict[str, Callable[[Work], None]] = {
    "copy": _copy,
    "normalize": _normalize,
    "match": _match,
    "plan": _plan,
    "autotune": _autotune,
    "insert_operands": _insert_operands,
    "rewrite": _rewrite,
    "verify": _verify,
}


def run(work: Work, log: PassLog) -> None:
    """All passes, each on record."""
    for name, step in PASSES.items():
        start = time.perf_counter()
        step(work)
        log.add(name, time.perf_counter() - start, work.gm)
