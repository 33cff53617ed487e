from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from falqon_fx.passes.normalize import normalize
from falqon_fx.passes.terms import (
    Add,
    AddLinear,
    Cast,
    Dropout,
    Linear,
    Scale,
    UnsupportedAdapted,
)
from tests.models import Stack
from tests.sites import randn


class Layer(nn.Module):
    """``function(layer, x)`` with parameters to use."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.weight, self.bias = nn.Parameter(randn(4, 6)), nn.Parameter(randn(4))
        self.across = nn.Parameter(randn(6, 4))
        self.drop, self.same = nn.Dropout(0.5), nn.Identity()
        self.embed = nn.Embedding(9, 6)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def read(function: Any, how: str = "trace") -> Any:
    """The term of what ``function`` returns, its graph left as it was."""
    layer, x = Layer(function), randn(3, 6)
    if how == "export":
        gm = torch.export.export(layer, (x,)).module()
    else:
        gm = fx.symbolic_trace(layer)
    before = str(gm.graph)
    scope = normalize(gm, [x])
    output = gm.graph.output_node().args[0]
    term = scope.term(output[0] if isinstance(output, tuple | list) else output)
    assert str(gm.graph) == before
    return term


BOTH = pytest.mark.parametrize("how", ["trace", "export"])


@BOTH
@pytest.mark.parametrize(
    ("function", "weight", "bias"),
    [
        (lambda m, x: m.linear(x), "linear.weight", "linear.bias"),
        (lambda m, x: F.linear(x, m.weight), "weight", None),
        (lambda m, x: F.linear(x, m.weight, m.bias), "weight", "bias"),
        (lambda m, x: F.linear(x, weight=m.weight, bias=m.bias), "weight", "bias"),
        (lambda m, x: x @ m.weight.T, "weight", None),
        (lambda m, x: x @ m.weight.mT, "weight", None),
        (lambda m, x: x @ torch.ops.aten.numpy_T(m.weight), "weight", None),
        (lambda m, x: x @ torch.ops.aten.mT(m.weight), "weight", None),
        (lambda m, x: x @ m.weight.t(), "weight", None),
        (lambda m, x: x @ torch.t(m.weight), "weight", None),
        (lambda m, x: torch.mm(x, m.weight.transpose(0, 1)), "weight", None),
        (lambda m, x: torch.matmul(x, torch.transpose(m.weight, -1, -2)), "weight", None),
        (lambda m, x: x.matmul(m.weight.T), "weight", None),
        (lambda m, x: torch.matmul(input=x, other=m.weight.T), "weight", None),
        (lambda m, x: torch.addmm(m.bias, x, m.weight.t()), "weight", "bias"),
        (lambda m, x: x @ m.weight.T + m.bias, "weight", "bias"),
        (lambda m, x: m.bias + x @ m.weight.T, "weight", "bias"),
        (lambda m, x: F.linear(x, m.across.T.T.T), "across", None),
        (lambda m, x: torch.einsum("...i,oi->...o", x, m.weight), "weight", None),
        (lambda m, x: (x.view(-1, 6) @ m.weight.T).view(3, 4), "weight", None),
    ],
)
def test_every_spelling_of_a_linear_reads_as_one(function, weight, bias, how):
    term = read(function, how)
    assert isinstance(term, Linear)
    assert _name(term.weight) == weight
    assert (term.bias and _name(term.bias)) == bias
    assert not term.weight.transposed or weight == "across"
    assert term.x.op == "placeholder"


def _name(param: Any) -> str:
    return param.name or param.node.target


@BOTH
@pytest.mark.parametrize(
    ("function", "weight"),
    [
        (lambda m, x: m.embed(x.long()), "embed.weight"),
        (lambda m, x: F.embedding(x.long(), m.weight), "weight"),
    ],
)
def test_an_embedding_reads_as_what_lora_can_be_put_on(function, weight, how):
    term = read(function, how)
    assert isinstance(term, UnsupportedAdapted)
    assert (_name(term.weight), term.kind) == (weight, "an embedding")
    assert term.x.op.startswith("call")


def test_a_weight_stored_in_out_reads_as_transposed():
    term = read(lambda m, x: x @ m.across)
    assert isinstance(term, Linear)
    assert term.weight.transposed


@BOTH
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, m.weight * 2),  # a computed weight
        lambda m, x: F.linear(x, m.weight, m.bias + 1),  # a computed bias
        lambda m, x: m.weight @ x.T,  # the weight on the left
        lambda m, x: F.linear(m.weight, x),  # x as the weight
        lambda m, x: torch.addmm(m.bias, x, m.weight.t(), beta=2) * x.sum(),
        lambda m, x: torch.einsum("ni,oj->noj", x, m.weight),  # nothing is summed over
        lambda m, x: torch.einsum("ni,oi->on", x, m.weight),  # the other way round
        lambda m, x: x @ x.T,
        lambda m, x: x.relu(),
        lambda m, x: x * x,
        lambda m, x: x.reciprocal(),
        lambda m, x: x + 1,
        lambda m, x: torch.div(x, 2, rounding_mode="floor"),
        lambda m, x: x.to("meta"),
        lambda m, x: torch.sub(x, x),
    ],
)
def test_what_only_looks_alike_reads_as_nothing(function, how):
    assert read(function, how) is None


@BOTH
@pytest.mark.parametrize(
    ("function", "factor"),
    [
        (lambda m, x: x + x.sin(), 1.0),
        (lambda m, x: torch.add(x, x.sin()), 1.0),
        (lambda m, x: torch.add(input=x, other=x.sin()), 1.0),
        (lambda m, x: torch.add(x, x.sin(), alpha=3), 3.0),
        (lambda m, x: x.add(x.sin(), alpha=0.5), 0.5),
        (lambda m, x: x.cos().add_(x.sin()), 1.0),
    ],
)
def test_every_spelling_of_an_add_reads_as_one(function, factor, how):
    term = read(function, how)
    assert isinstance(term, Add)
    assert term.factor == factor
    assert term.right.name.startswith("sin")


def test_an_in_place_add_by_operator_reads_as_one():
    def function(layer: Layer, x: Tensor) -> Tensor:
        y = x.cos()
        y += x.sin()
        return y

    assert isinstance(read(function), Add)


@BOTH
@pytest.mark.parametrize(
    ("function", "factor"),
    [
        (lambda m, x: x * 3, 3.0),
        (lambda m, x: 0.5 * x, 0.5),
        (lambda m, x: torch.mul(x, 3), 3.0),
        (lambda m, x: torch.mul(input=x, other=3), 3.0),
        (lambda m, x: torch.multiply(x, 3), 3.0),
        (lambda m, x: torch.true_divide(x, 4), 0.25),
        (lambda m, x: x.mul(3), 3.0),
        (lambda m, x: x.cos().mul_(-2), -2.0),
        (lambda m, x: x / 4, 0.25),
        (lambda m, x: torch.div(x, 4), 0.25),
        (lambda m, x: x.cos().div_(4), 0.25),
    ],
)
def test_every_spelling_of_a_scaling_reads_as_one(function, factor, how):
    term = read(function, how)
    assert isinstance(term, Scale)
    assert term.factor == factor


@BOTH
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.to(torch.float64),
        lambda m, x: x.to(dtype=torch.bfloat16),
        lambda m, x: x.double().float(),
        lambda m, x: x.half(),
        lambda m, x: x.bfloat16(),
        lambda m, x: x.type(torch.float64),
        lambda m, x: x.type_as(m.weight.double()),
        lambda m, x: x.to(m.weight.double().dtype),
        lambda m, x: x.to("cpu", torch.float64),
    ],
)
def test_every_spelling_of_a_cast_reads_as_one(function, how):
    assert isinstance(read(function, how), Cast)


@pytest.mark.parametrize(
    ("function", "p"),
    [
        (lambda m, x: F.dropout(x, 0.25), 0.25),
        (lambda m, x: F.dropout(x), 0.5),
        (lambda m, x: F.dropout(x, p=0.25, training=True), 0.25),
        (lambda m, x: F.dropout(x, 0.25, False), 0.0),
        (lambda m, x: torch.dropout(x, 0.25, True), 0.25),
        (lambda m, x: torch.dropout(x, 0.25, train=False), 0.0),
        (lambda m, x: m.drop(x), 0.5),
    ],
)
def test_every_spelling_of_a_dropout_reads_as_one(function, p):
    term = read(function)
    assert isinstance(term, Dropout)
    assert term.p == p


def test_dropout_that_writes_its_input_is_no_dropout():
    assert read(lambda m, x: F.dropout(x, 0.5, True, True)) is None


def test_addmm_onto_a_computed_value_reads_as_a_sum():
    term = read(lambda m, x: torch.addmm(m.linear(x), x, m.weight.t(), beta=2, alpha=0.5))
    assert isinstance(term, AddLinear)
    assert (term.beta, term.factor, _name(term.weight)) == (2.0, 0.5, "weight")


def test_shapes_come_from_the_example_inputs():
    gm = fx.symbolic_trace(Layer(lambda m, x: m.linear(x)))
    normalize(gm, [randn(3, 6)])
    (call,) = gm.graph.find_nodes(op="call_module", target="linear")
    assert call.meta["val"].shape == (3, 4)
    assert call.meta["val"].dtype == torch.float32


def test_a_checkpoint_body_is_a_scope_whose_inputs_are_followed_outward():
    model = Stack(2, 16, 24)
    model.call = functools.partial(checkpoint, use_reentrant=False)
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(randn(3, 16))
    root = normalize(graphs[0], [])
    assert len(root.children) == 2
    assert list(root.walk()) == [root, *root.children]
    outside = set(root.gm.graph.nodes)
    for body in root.children:
        linears = [t for n in body.gm.graph.nodes if isinstance(t := body.term(n), Linear)]
        assert len(linears) == 6
        for linear in linears:
            assert linear.weight.node not in outside
            outer = body.outer(linear.weight.node)
            assert outer in outside
            assert isinstance(linear.weight.value, nn.Parameter)
