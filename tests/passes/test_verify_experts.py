"""Faults in the op of stacked experts are found."""

from __future__ import annotations

from itertools import takewhile

import pytest
import torch
from torch import fx

from falqon_fx import FalqonConfig
from falqon_fx.errors import PassError
from falqon_fx.ops.experts import OP
from falqon_fx.passes.pipeline import PASSES
from falqon_fx.passes.verify import verify
from falqon_fx.passes.work import Work
from tests.stacks import Stack, rows

FAULTS = {
    "x": (0, lambda args: args[1][0]),
    "rows": (1, lambda args: []),
    "groups": (2, lambda args: args[1][0]),
    "by_id": (3, lambda args: not args[3]),
    "experts": (4, lambda args: args[4] + 1),
    "weight": (5, lambda args: args[6]),
    "scale": (6, lambda args: args[5]),
    "a": (7, lambda args: args[8]),
    "a_scale": (8, lambda args: args[7]),
    "b": (9, lambda args: []),
    "lora_a": (10, lambda args: args[11]),
    "lora_b": (11, lambda args: args[10]),
    "scaling": (12, lambda args: [2 * args[12][0]]),
    "keep_x": (13, lambda args: False),
    "out_dtype": (14, lambda args: torch.float64),
    "spec": (15, lambda args: "row amax"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_op_is_found(name):
    model, (x, ids) = Stack(), rows()
    work = Work(fx.symbolic_trace(model), [x, ids], FalqonConfig())
    for step in takewhile(lambda step: step is not PASSES["verify"], PASSES.values()):
        step(work)
    (op,) = work.gm.graph.find_nodes(op="call_function", target=OP)
    place, wrong = FAULTS[name]
    args = list(op.args)
    args[place] = wrong(args)
    verify(work.plan, work.operands, work.before)
    op.args = tuple(args)
    with pytest.raises(PassError):
        verify(work.plan, work.operands, work.before)
