"""Graphs of every frontend are rewritten alike, twice without a change; checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from falqon_fx import FalqonConfig, RewriteResult, rewrite
from tests.passes.rewritten import (
    FRONTENDS,
    Model,
    Rewritten,
    captured,
    frozen_a,
    passes,
    seen,
    values,
)
from tests.sites import randn
from tests.spellings import Passes, targets

# -- bodies of checkpoints -------------------------------------------------------------------------


@pytest.fixture
def checkpointed() -> Rewritten:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=False)

    x = randn(5, 64).requires_grad_()
    gm = captured(Checkpointed(), x)
    return passes(gm, values(gm, x))


def test_a_lost_operand_of_a_checkpoint_is_seen(checkpointed):
    checkpointed.verify()
    (body,) = checkpointed.plan.root.children
    body.call.args = body.call.args[:-1]
    with seen(r"gives \d+ operands to \d+ inputs"):
        checkpointed.verify()


def test_swapped_operands_of_a_checkpoint_are_seen(checkpointed):
    (body,) = checkpointed.plan.root.children
    *rest, last, end = body.call.args
    body.call.args = (*rest, end, last)
    with seen("is not the operand it stands for"):
        checkpointed.verify()


def test_an_operation_lost_in_the_body_of_a_checkpoint_is_seen(checkpointed):
    (body,) = checkpointed.plan.root.children
    sigmoid = next(n for n in body.gm.graph.nodes if n.target == "sigmoid")
    sigmoid.replace_all_uses_with(sigmoid.args[0])
    body.gm.graph.erase_node(sigmoid)
    with seen(r"outside the sites disappeared: \['sigmoid"):
        checkpointed.verify()


# -- all frontends alike ---------------------------------------------------------------------------


ALIKE = {
    "adapter": {},
    "hold": {"update": "rows", "topk": 1, "pending": "hold"},
    "apply": {"update": "rows", "topk": 1, "pending": "apply"},
    "drop": {"update": "rows", "topk": 1, "pending": "drop"},
}


@pytest.mark.parametrize("options", ALIKE.values(), ids=ALIKE)
def test_every_frontend_is_rewritten_alike(options):
    """The same sites in the same groups, the same ops for them, the same numbers."""
    found = [numbers(name, options) for name in FRONTENDS]
    for sites, added, tensors in found:
        assert (sites, added) == found[0][:2]
        assert all(torch.equal(a, b) for a, b in zip(tensors, found[0][2], strict=True))


def numbers(
    frontend: str, options: dict[str, Any]
) -> tuple[list[Any], dict[str, int], list[Tensor]]:
    """The sites, the ops that stand for them, and y, dL/dx and what is trained,
    also after a step.
    """
    torch.manual_seed(0)
    model, x = Model(), randn(5, 64).requires_grad_()
    if options:
        frozen_a(model)
    backend = Passes(**options)
    if frontend == "Dynamo":
        torch._dynamo.reset()
        call = torch.compile(model, backend=backend, fullgraph=True)
        call(x)
        (result,) = backend.results
    else:
        call = result = rewrite(FRONTENDS[frontend](model, x), [x], backend.config)
    tensors = []
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        y = call(x)
        y.sum().backward()
        tensors += [y.detach(), x.grad, *(p.grad for p in trained)]
        model.zero_grad()
        x.grad = None
        with torch.no_grad():
            for i, weight in enumerate(trained):
                weight.add_(randn(*weight.shape, seed=i) / 64)
    sites = [(s.path.split(".")[-1], s.group, s.scaling, s.rank) for s in result.report.sites]
    ops = ("merged_linear.default", "proxy_update.default", "proxy_update_.default", "zero_")
    return sites, {name: targets(result.gm)[name] for name in (*ops, "linear")}, tensors


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("options", ALIKE.values(), ids=ALIKE)
def test_rewriting_twice_changes_nothing(frontend, options):
    model, x = Model(), randn(5, 64)
    if options:
        frozen_a(model)
    first = rewritten_by(frontend, model, x, FalqonConfig(**options))
    inputs = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders(first.gm)]
    own = [n for n in placeholders(first.gm) if "falqon_shape" not in n.meta]
    states = first.fake_inputs(inputs[: len(own)])
    second = rewrite(first.gm, states, first.config)
    assert len(first.report.sites) == 4
    assert not second.report.sites
    assert not second.report.rejected
    assert not second.operands.bases
    assert not second.operands.rows
    assert str(second.gm.graph) == str(first.gm.graph)


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def rewritten_by(frontend: str, model: nn.Module, x: Tensor, config: FalqonConfig) -> RewriteResult:
    gm = FRONTENDS[frontend](model, x)
    return rewrite(gm, values(gm, x), config)
