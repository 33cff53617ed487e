"""Faults in the op of stacked experts are found."""

from __future__ import annotations

from itertools import takewhile

import pytest
import torch
from torch import Tensor, fx, nn

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


def rewritten(model: nn.Module, inputs: list[Tensor]) -> Work:
    """A graph up to `verify`."""
    work = Work(fx.symbolic_trace(model), inputs, FalqonConfig())
    for step in takewhile(lambda step: step is not PASSES["verify"], PASSES.values()):
        step(work)
    return work


def ops(work: Work) -> list[fx.Node]:
    return [*work.gm.graph.find_nodes(op="call_function", target=OP)]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_op_is_found(name):
    work = rewritten(Stack(), [*rows()])
    (op,) = ops(work)
    place, wrong = FAULTS[name]
    args = list(op.args)
    args[place] = wrong(args)
    verify(work.plan, work.operands, work.before)
    op.args = tuple(args)
    with pytest.raises(PassError) as error:
        verify(work.plan, work.operands, work.before)
    assert error.value.site == work.plan.sites[0].report.path
    if place < 5:
        assert f"reads {op.args[:5]}" in str(error.value)
    elif place >= 12:
        assert f"computes with {op.args[12:]}" in str(error.value)


class Two(nn.Module):
    """A stack that reads what another gives, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Stack(out=64), Stack()

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        for stack in (self.first, self.second):
            weight = stack.adapted().transpose(-2, -1)
            x = torch.ops.transformers.grouped_mm_fallback(x, weight, offs=offs)
        return x


def test_a_stack_may_read_the_result_of_another():
    offs = torch.tensor([2, 3, 3, 9], dtype=torch.int32)
    work = rewritten(Two(), [torch.randn(9, 64), offs])
    first, second = ops(work)
    verify(work.plan, work.operands, work.before)
    assert second.args[0].args == (first, 0)
    first.update_arg(4, 5)
    with pytest.raises(PassError, match="not its rows"):
        verify(work.plan, work.operands, work.before)
