"""Which sites become one op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from falqon_fx import FalqonConfig, prepare, rewrite
from tests.sites import randn
from tests.spellings import HandWritten, Passes, Spelling

FUSED = torch.ops.falqon.merged_linear.default


class Attention(nn.Module):
    """q, k, v read x; o reads what they give."""

    def __init__(self, bias: tuple[bool, bool, bool] = (False, False, False), write: str = ""):
        super().__init__()
        self.q, self.k, self.v = (
            HandWritten(Spelling(out=o, features=24, bias=b)) for o, b in zip((24, 12, 24), bias)
        )
        self.o = HandWritten(Spelling(out=24, features=24))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        q = self.q(x)
        if self.write == "x":
            x.mul_(2.0)
        elif self.write == "view":
            x.view(-1).mul_(2.0)
        k = self.k(x)
        v = self.v(x)
        return self.o(q * k.sum(-1, keepdim=True) + v)


def groups(model: nn.Module, **options: Any) -> list[int]:
    """Sites of each fused op, in graph order; the result is checked against the sites alone."""
    x, grad = randn(5, 24), randn(5, 24, seed=1)
    if options.get("update") == "rows":  # which has A frozen
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_b" in name)
    results = []
    for siblings in (True, False):
        config = FalqonConfig(**{"siblings": siblings, **options})
        result = rewrite(torch.fx.symbolic_trace(model), (x,), config)
        y = result(x)
        model.zero_grad()
        y.backward(grad)
        results.append((result, y, [p.grad for p in model.parameters() if p.requires_grad]))
    (together, y, grads), (apart, y_apart, grads_apart) = results
    # Each O is a GEMM of its own either way; dL/dx, which q's site alone hands on here, isn't read.
    # Of O_A a library may sum one column in another order than several: some units of float32.
    torch.testing.assert_close(y, y_apart)
    torch.testing.assert_close(grads, grads_apart)
    ops = apart.gm.graph.find_nodes(op="call_function", target=FUSED)
    assert [len(op.args[1]) for op in ops] == [1, 1, 1, 1]
    assert len(together.report.sites) == 4
    return [
        len(op.args[1]) for op in together.gm.graph.find_nodes(op="call_function", target=FUSED)
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"update": "rows", "pending": "apply"}, {"update": "rows", "pending": "hold"}],
    ids=["adapter", "apply", "hold"],
)
def test_sites_that_read_one_x_are_one_op(options):
    assert groups(Attention(), **options) == [3, 1]
    assert groups(Attention((True, True, True)), **options) == [3, 1]


def test_with_rows_a_trained_a_is_none_of_those_with_a_pending_part():
    model = Attention()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_b" in name or name == "k.lora_a.weight")
    config = FalqonConfig(update="rows", topk="all")
    result = rewrite(torch.fx.symbolic_trace(model), (randn(5, 24),), config)
    ops = result.gm.graph.find_nodes(op="call_function", target=FUSED)
    # Sites, pending parts, whether x is kept.
    assert [(len(op.args[1]), len(op.args[6]), op.args[14]) for op in ops] == [
        (2, 2, False),
        (1, 0, True),
        (1, 1, False),
    ]
    result(randn(5, 24)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"{name}.lora_b.weight" for name in "qkvo"} | {"k.lora_a.weight"}


def test_a_site_with_a_bias_is_none_of_those_without():
    assert groups(Attention((True, False, True))) == [2, 1, 1]


@pytest.mark.parametrize("write", ["x", "view"])
def test_nothing_is_written_in_place_between_siblings(write):
    assert groups(Attention(write=write)) == [1, 2, 1]


def test_siblings_can_be_switched_off():
    result = rewrite(
        torch.fx.symbolic_trace(Attention()), (randn(5, 24),), FalqonConfig(siblings=False)
    )
    assert len(result.gm.graph.find_nodes(op="call_function", target=FUSED)) == 4


class PreparedPair(nn.Module):
    """Two frozen layers of one x; the bias of the second may be computed behind the first."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.scale, self.computed = nn.Parameter(randn(64)), computed
        self.k, self.v = (nn.Linear(64, 64).requires_grad_(False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        y, v = self.k(x), self.v
        if not self.computed:
            return y + v(x)
        bias = v.bias * y.sum()
        return y + torch.ops.falqon.base_linear(x, v.code, v.scale, v.digest, bias, v.spec_text)


@pytest.mark.parametrize("computed", [False, True])
def test_prepared_siblings_are_one_op_but_with_a_computed_bias(computed):
    model, passes = PreparedPair(computed), Passes()
    prepare(model, progress=False)
    torch.compile(model, backend=passes, fullgraph=True)(randn(5, 64))
    (result,) = passes.results
    ops = result.gm.graph.find_nodes(op="call_function", target=FUSED)
    assert [len(op.args[1]) for op in ops] == ([1, 1] if computed else [2])
