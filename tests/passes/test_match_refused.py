"""What looks like LoRA and is none is refused with the reason, and left as it was."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.passes.test_match import BF16, Layer, One, Two, adapt, check_peft, layer_of, one
from tests.sites import randn
from tests.spellings import (
    HandWritten,
    Passes,
    Spelling,
)


def refused(model: nn.Module, x: Tensor, reason: str, **options: Any) -> Passes:
    """No site, the reason told, the graph and its result as they were."""
    passes = Passes(frozen="leave", **options)
    torch.manual_seed(1)
    result = passes.run(model, x)
    torch.manual_seed(1)
    assert torch.equal(result, model(x))
    assert not passes.sites
    assert passes.rejected
    for item in passes.rejected:
        assert reason in item.reason
        assert item.remedy
        assert item.site
    for gm, rewritten in zip(passes.given, passes.results, strict=True):
        assert str(gm.graph) == str(rewritten.gm.graph)
    return passes


def uses_down_elsewhere(layer: Layer, x: Tensor) -> Tensor:
    down = layer.a(x)
    return layer.base(x) + layer.b(down) + down.sum()


def uses_base_elsewhere(layer: Layer, x: Tensor) -> Tensor:
    base = layer.base(x)
    return (base + layer.b(layer.a(x))) * base


def uses_adapter_elsewhere(layer: Layer, x: Tensor) -> Tensor:
    up = layer.b(layer.a(x))
    return layer.base(x) + up + up.relu()


def writes_x(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    base = layer.base(x)
    x.add_(1)
    return base + layer.b(layer.a(x))


def writes_x_after_reading(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    base, up = layer.base(x), layer.b(layer.a(x))
    x.zero_()
    return base + up


def scales_x_in_place(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    total = layer.base(x) + layer.b(layer.a(x.mul_(3)))
    return total + x.sum()


def writes_a_view_of_x(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    base = layer.base(x)
    x.view(-1)[3:].add_(1)
    return base + layer.b(layer.a(x))


def writes_x_after_its_cast(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    y = x.double().float()
    x.add_(1)
    return layer.base(y) + layer.b(layer.a(y))


def writes_x_as_out(layer: Layer, x: Tensor) -> Tensor:
    x = x * 2
    base = layer.base(x)
    torch.neg(x.detach(), out=x)
    return base + layer.b(layer.a(x))


def writes_the_bias(layer: Layer, x: Tensor) -> Tensor:
    base = layer.base(x)
    with torch.no_grad():
        layer.base.bias.add_(0.0)
    return base + layer.b(layer.a(x))


REFUSED = {
    "base scaled": (
        lambda m, x: 2 * m.base(x) + m.b(m.a(x)),
        "the base output is scaled",
    ),
    "base scaled by alpha": (
        lambda m, x: torch.add(m.b(m.a(x)), m.base(x), alpha=2),
        "the base output is scaled",
    ),
    "base scaled by beta": (
        lambda m, x: torch.addmm(m.base(x), m.a(x), m.b.weight.t(), beta=2),
        "the base output is scaled",
    ),
    "base dropped": (
        lambda m, x: F.dropout(m.base(x), 0.5) + m.b(m.a(x)),
        "the base output is scaled or dropped",
    ),
    "A's output is used elsewhere": (uses_down_elsewhere, "also used by"),
    "the base output is used elsewhere": (uses_base_elsewhere, "also used by"),
    "B's output is used elsewhere": (uses_adapter_elsewhere, "not added to a linear's output"),
    "dropout after B": (
        lambda m, x: m.base(x) + F.dropout(m.b(m.a(x)), 0.5),
        "a dropout follows lora_B",
    ),
    "A reads another input": (
        lambda m, x: m.base(x) + m.b(m.a(x.relu())),
        "reads another input",
    ),
    "gated by a tensor": (
        lambda m, x: m.base(x) + m.b(m.a(x)) * x.mean(),
        "not added to a linear's output",
    ),
    "no base": (lambda m, x: m.b(m.a(x)).relu(), "not added to a linear's output"),
    "added to no linear": (lambda m, x: x[:, :20] + m.b(m.a(x)), "not to a linear"),
    "two adapters, added first": (
        lambda m, x: m.base(x) + (m.b(m.a(x)) + m.b(m.a(x)) * 2),
        "added to another adapter before the base layer's output",
    ),
    "base stored [in, out]": (
        lambda m, x: x @ m.other.weight.view(24, 20) + m.b(m.a(x)),
        "not to a linear on a parameter",
    ),
    "x written between": (writes_x, "written in place"),
    "x written before the sum": (writes_x_after_reading, "written in place"),
    "x scaled in place": (scales_x_in_place, "written in place"),
    "x written through a view": (writes_a_view_of_x, "written in place"),
    "x written after its cast": (writes_x_after_its_cast, "written in place"),
    "x written by out=": (writes_x_as_out, "written in place"),
    "the bias written between": (writes_the_bias, "written in place"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_lora_is_refused_and_left_as_it_was(function, reason):
    refused(Layer(function), randn(5, 24), reason)


def test_a_bias_of_a_is_refused():
    layer = Layer(lambda m, x: m.base(x) + m.b(m.a(x)))
    layer.a.bias = nn.Parameter(torch.ones(4))
    refused(layer, randn(5, 24), "lora_A has a bias")


def test_adapters_stored_transposed_are_refused():
    layer = Layer(lambda m, x: m.base(x) + x @ m.a.weight @ m.b.weight)
    layer.a.weight, layer.b.weight = nn.Parameter(randn(24, 4)), nn.Parameter(randn(4, 20))
    refused(layer, randn(5, 24), "stored transposed")


def test_dora_is_refused():
    passes = refused(one(use_dora=True), randn(5, 24), "not added to a linear's output")
    # Where PEFT's DoRA breaks the graph, its adapter is compiled apart, in a helper's frame.
    paths = {"lora_A.weight", "base_model.model.proj"}
    assert {item.site for item in passes.rejected} <= paths


def test_the_active_one_of_two_peft_adapters_is_matched():
    model = one()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="proj"))
    model.set_adapter("second")
    passes = Passes()
    passes.run(model, randn(5, 24))
    assert [site.rank for site in passes.sites] == [2]
    assert not passes.rejected


def test_a_trained_base_weight_is_refused():
    model = one()
    layer_of(model).base_layer.weight.requires_grad_(True)
    passes = refused(model, randn(5, 24), "the base weight is trained too")
    assert "requires_grad_(False)" in passes.rejected[0].remedy


def test_a_quantized_base_is_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model: Any = One(nn.Linear(32, 32, dtype=BF16))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    layer = Layer(lambda m, x: m.base(x) + m.b(m.a(x.float())))
    layer.base = model.proj
    layer.a, layer.b = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
    refused(layer, randn(5, 32).to(BF16), "already quantized (AffineQuantizedTensor)")


def test_an_fp8_base_is_refused():
    """Stored in FP8 and decoded in each forward pass, as FP8 checkpoints are run."""
    layer = Layer(lambda m, x: F.linear(x, m.code.to(x.dtype) * m.scale) + m.b(m.a(x)))
    layer.code = nn.Parameter(randn(20, 24).to(torch.float8_e4m3fn), requires_grad=False)
    layer.scale = nn.Parameter(torch.ones(20, 1), requires_grad=False)
    refused(layer, randn(5, 24), "already quantized (torch.float8_e4m3fn)")


def test_lora_on_an_embedding_is_refused():
    model = adapt(One(nn.Embedding(50, 24)), targets="proj")
    nn.init.normal_(model.base_model.model.proj.lora_embedding_B["default"])
    refused(model, torch.randint(50, (2, 5)), "an embedding, not a linear")


def test_lora_on_a_convolution_is_refused():
    model = adapt(One(nn.Conv2d(6, 8, 3)), targets="proj")
    refused(model, randn(2, 6, 7, 7), "a convolution, not a linear")


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_a_peft_layer_without_its_adapter_is_a_plain_linear(state):
    model, x = one(bias=True), randn(5, 24)
    if state == "merged":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    untouched(model, x)


def test_a_merged_loralib_layer_is_a_plain_linear():
    loralib = pytest.importorskip("loralib")
    layer = loralib.Linear(24, 20, r=4)
    layer.eval()
    untouched(layer, randn(5, 24))


def test_two_linears_in_a_row_are_no_adapter():
    untouched(nn.Sequential(nn.Linear(24, 36), nn.Linear(36, 24)), randn(5, 24))


def untouched(model: nn.Module, x: Tensor) -> None:
    passes = Passes(frozen="leave")
    assert torch.equal(passes.run(model, x), model(x))
    assert not passes.sites
    assert not passes.rejected
    for gm, rewritten in zip(passes.given, passes.results, strict=True):
        assert str(gm.graph) == str(rewritten.gm.graph)


class Beside(nn.Module):
    """Two trained linears beside a frozen one, on no account named as LoRA."""

    def __init__(self, rank: int, features: int = 96, out: int = 80) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fixed = nn.Linear(features, out).requires_grad_(False)
        self.down = nn.Linear(features, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fixed(x) + self.up(self.down(x))


def gradients(call: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    call(x).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("rank", [40, 79, 80, 120])  # half of 80, below it, and above
def test_two_trained_linears_beside_a_frozen_one_are_no_adapter(rank):
    model, x, leave = Beside(rank), randn(5, 96), Passes(frozen="leave")
    torch._dynamo.reset()
    ours = gradients(torch.compile(model, backend=leave), model, x)
    assert not leave.sites
    for grad, eager in zip(ours, gradients(model, model, x), strict=True):
        assert torch.equal(grad, eager)
    passes = Passes()
    torch._dynamo.reset()
    ours = gradients(torch.compile(model, backend=passes), model, x)
    assert [(site.path, site.adapters) for site in passes.sites] == [("fixed", 0)]
    assert len(ours) == 2
    reasons = ["its rank is not below half of its width, and nothing names it LoRA"]
    assert [r.reason for r in passes.rejected] == (reasons if rank < 80 else [])


def test_a_low_rank_or_a_name_makes_two_linears_an_adapter():
    passes = Passes()
    passes.run(Beside(39), randn(5, 96))
    assert [site.adapters for site in passes.sites] == [1]
    check_peft(one(r=20), randn(5, 24))  # as wide as the layer, and named


def test_a_refused_layer_does_not_keep_others_from_being_rewritten():
    model = adapt(Two(), targets=".*(up|down)")
    up = next(m for n, m in model.named_modules() if n.endswith(".up"))
    up.base_layer.weight.requires_grad_(True)
    passes = Passes()
    passes.run(model, randn(5, 24))
    assert [site.path.split(".")[-1] for site in passes.sites] == ["down"]
    assert [item.site.split(".")[-1] for item in passes.rejected] == ["up"]


def test_a_bottleneck_behind_a_lora_layer_does_not_count_as_its_second_adapter():
    class Houlsby(Layer):
        def __init__(self) -> None:
            super().__init__(None)
            self.down, self.up = nn.Linear(20, 4, bias=False), nn.Linear(4, 20, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.base(x) + self.b(self.a(x))
            return h + self.up(self.down(h))

    passes = Passes()
    passes.run(Houlsby(), randn(5, 24))
    assert len(passes.sites) == 1
    assert [item.reason for item in passes.rejected] == [
        "lora_A reads another input than the base layer"
    ]


def test_the_sum_of_two_lora_layers_on_one_input_is_two_sites():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = HandWritten(Spelling()), HandWritten(Spelling(), seed=20)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + self.gate(x)

    passes = Passes()
    passes.run(Gate(), randn(5, 24))
    assert [site.path for site in passes.sites] == ["up", "gate"]
