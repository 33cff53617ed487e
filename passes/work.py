"""What the passes hand on to one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from falqon_fx.config import FalqonConfig
from falqon_fx.passes.insert_operands import Operands
from falqon_fx.passes.match.dataflow import Match, RejectedMatch
from falqon_fx.passes.plan import Plan
from falqon_fx.passes.scope import Scope
from falqon_fx.passes.verify import Wiring
from falqon_fx.report.data import Note
from falqon_fx.site.shards import LocalParameter


@dataclass
class Work:
    """One graph on its way through the passes.

    The fields below ``notes`` are filled in by the passes, in this order; reading one too early
    raises AttributeError.
    """

    given: fx.GraphModule  # stays as it is
    inputs: Sequence[Any]
    config: FalqonConfig
    tune: bool = False
    names: Mapping[str, str] = field(default_factory=dict)  # paths in the model by those in `given`
    notes: list[Note] = field(default_factory=list)  # for the report, by whichever pass
    local: tuple[LocalParameter, ...] = ()  # parameters that the graph reads as local tensors
    gm: fx.GraphModule = field(init=False)  # the copy that is edited
    root: Scope = field(init=False)
    before: Wiring = field(init=False)
    matches: list[Match] = field(init=False)
    rejected: list[RejectedMatch] = field(init=False)
    plan: Plan = field(init=False)
    operands: Operands = field(init=False)
    after: Wiring = field(init=False)
