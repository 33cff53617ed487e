"""The pipeline: the passes in their order.

A pass is a function in a file of its own. Its step, here, says what of the `Work` it reads and what
it fills in. To add one: docs/guides/add-a-pass.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from falqon_fx.passes.adapter_dtype import why_not_by_default
from falqon_fx.passes.autotune import autotune
from falqon_fx.passes.copy_graph import copy_graph
from falqon_fx.passes.gather_tokens import gather_tokens
from falqon_fx.passes.insert_operands import insert_operands
from falqon_fx.passes.localize import localize
from falqon_fx.passes.match.pair import match
from falqon_fx.passes.normalize import normalize
from falqon_fx.passes.plan import plan
from falqon_fx.passes.quantized import quantized_layers
from falqon_fx.passes.rewrite import rewrite
from falqon_fx.passes.room import keep_room
from falqon_fx.passes.saturation import Saturation
from falqon_fx.passes.transposes import keep_transposes
from falqon_fx.passes.verify import verify, wiring
from falqon_fx.passes.work import Work
from falqon_fx.report.data import Note
from falqon_fx.report.passlog import PassLog


def _copy(work: Work) -> None:
    work.gm = copy_graph(work.given)


def _localize(work: Work) -> None:
    if work.config.update == "adapter":
        work.local = localize(work.gm)


def _normalize(work: Work) -> None:
    work.root = normalize(work.gm, work.inputs)
    work.before = wiring(work.root)


def _match(work: Work) -> None:
    keep_dropout = work.config.dropout == "exact"
    work.matches, work.rejected = match(work.root, keep_dropout)


def _plan(work: Work) -> None:
    clamped = Saturation(work.root, work.inputs)
    given = work.root, work.matches, work.rejected, work.config, work.names
    work.plan = plan(*given, clamped)
    work.plan = replace(work.plan, left=(*work.plan.left, *quantized_layers(work.plan)))
    for site in work.plan.sites:
        if site.spec != work.plan.spec:
            asked = work.config.adapter_dtype == "fp8"
            why = _CLAMPED if asked else why_not_by_default(site.match) or _CLAMPED
            work.notes.append(Note(site.report.path, _IN_BFLOAT16.format(why)))


_IN_BFLOAT16 = 'its adapter is in bfloat16: adapter_dtype="fp8" {}'
_CLAMPED = (
    "has clamped some of it, or of a block like it, in earlier calls "
    "(falqon_fx.adapters(model)[path].saturated says how much)"
)


def _keep_transposes(work: Work) -> None:
    work.plan = keep_transposes(work.plan)


def _keep_room(work: Work) -> None:
    work.plan = keep_room(work.plan)


def _autotune(work: Work) -> None:
    work.plan = autotune(work.plan, time=work.tune)


def _insert_operands(work: Work) -> None:
    work.operands = insert_operands(work.plan)


def _rewrite(work: Work) -> None:
    rewrite(work.plan, work.operands)


def _verify(work: Work) -> None:
    work.after = verify(work.plan, work.operands, work.before)


def _gather_tokens(work: Work) -> None:
    count = gather_tokens(work.plan)
    if count:
        work.notes.append(Note(work.plan.sites[0].report.path, _GATHERED.format(count)))


_GATHERED = "x is gathered in FP8, here and wherever sites alone read it ({} in this graph)"

PASSES: Mapping[str, Callable[[Work], None]] = {
    "copy": _copy,
    "localize": _localize,
    "normalize": _normalize,
    "match": _match,
    "plan": _plan,
    "keep_transposes": _keep_transposes,
    "keep_room": _keep_room,
    "autotune": _autotune,
    "insert_operands": _insert_operands,
    "rewrite": _rewrite,
    "verify": _verify,
    "gather_tokens": _gather_tokens,
}


def run(work: Work, log: PassLog) -> None:
    """All passes, each on record."""
    for name, step in PASSES.items():
        start = time.perf_counter()
        step(work)
        log.add(name, time.perf_counter() - start, work.gm)
