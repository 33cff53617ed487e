from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from falqon_fx import FalqonConfig, RewriteResult, rewrite
from tests.models import Stack, fill_b
from tests.sites import randn
from tests.spellings import HandWritten, Passes, Spelling, targets

UPDATE = torch.ops.falqon.proxy_update_.default


class Chain(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(HandWritten(Spelling(out=24, scaling=i + 1.0), seed=10 * i) for i in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.relu())


def passes(model: nn.Module, **options: str) -> RewriteResult:
    config = FalqonConfig(**{"init": "keep", "topk": 2, **options})
    return rewrite(fx.symbolic_trace(model), [randn(5, 24)], config)


def test_one_op_at_the_head_of_the_graph_updates_every_site():
    gm = passes(Chain()).gm
    calls = [node for node in gm.graph.nodes if node.op.startswith("call")]
    assert calls[0].target is UPDATE
    assert targets(gm)["proxy_update_.default"] == 1
    code, scale, applied, counters, writes, lora_b, lora_a, base, scaling, spec = calls[0].args
    names = ("code", "scale", "applied", "counters", "writes")
    for name, column in zip(names, (code, scale, applied, counters, writes), strict=True):
        assert [node.target for node in column] == [f"falqon_{i}_{name}" for i in range(3)]
    assert [node.target for node in lora_b] == [f"layers.{i}.lora_b.weight" for i in range(3)]
    assert [node.target for node in lora_a] == [f"layers.{i}.lora_a.weight" for i in range(3)]
    assert [node.target for node in base] == [f"layers.{i}.base.weight" for i in range(3)]
    assert scaling == [1.0, 2.0, 3.0]
    assert "topk=2" in spec


def test_parameters_that_the_graph_reads_further_down_are_read_at_its_head():
    """Export and symbolic_trace put a get_attr where the parameter is used."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = HandWritten(Spelling(out=24, base="matmul", adapter="functional"))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.relu().cos())

    model, x = Late(), randn(5, 24)
    for gm in (fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        result = rewrite(gm, [x], FalqonConfig(init="keep", topk=2))
        result.gm.graph.lint()
        assert len(result.report.sites) == 1
        assert torch.equal(result(x), result(x))


def test_no_site_no_update():
    assert "proxy_update_.default" not in targets(passes(nn.Linear(24, 3)).gm)


@pytest.mark.parametrize("reentrant", [True, False])
def test_updates_stay_outside_of_checkpoint_bodies(reentrant):
    model = Stack(2, 16, 24)
    fill_b(model)
    model.call = functools.partial(checkpoint, use_reentrant=reentrant)
    backend = Passes()
    backend.run(model, randn(3, 16).requires_grad_())
    (result,) = backend.results
    calls = [node for node in result.gm.graph.nodes if node.op.startswith("call")]
    assert calls[0].target is UPDATE
    assert len(calls[0].args[0]) == 4
    assert targets(result.gm)["proxy_update_.default"] == 1


@pytest.mark.parametrize("pending", ["hold", "apply", "drop"])
def test_only_drop_zeroes_b_and_does_so_behind_the_update(pending):
    model, x = Chain(2), randn(5, 24)
    fill = [layer.lora_b.weight for layer in model.layers]
    result = passes(model, pending=pending)
    added = targets(result.gm)
    assert added["zero_"] == added["detach"] == (2 if pending == "drop" else 0)
    before = [b.detach().clone() for b in fill]
    result(x)
    for b, old in zip(fill, before, strict=True):
        assert torch.equal(b, torch.zeros_like(b) if pending == "drop" else old)
    if pending == "drop":
        order = [str(node.target) for node in result.gm.graph.nodes if node.op.startswith("call")]
        assert order[0] == str(UPDATE)
        assert sorted(order[1:5]) == ["detach", "detach", "zero_", "zero_"]


def test_the_graph_writes_a_step_of_b_once():
    model, x = HandWritten(Spelling()), randn(5, 24)
    result = passes(model)
    result(x)
    (nodes,) = result.slots
    state = result.bind([x]).all[1:]
    writes = dict(zip((n.target for n in nodes.state), state, strict=True))["falqon_0_writes"]
    assert writes.sum() == 0  # the state was made from this B
    with torch.no_grad():
        model.lora_b.weight.add_(0.5)
    for _ in range(3):
        result(x)
        assert writes.sum() == 2  # topk
