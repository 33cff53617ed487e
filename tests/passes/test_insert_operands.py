from __future__ import annotations

import functools
import operator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from falqon_fx import FalqonConfig, RewriteResult, prepare, rewrite
from falqon_fx.ops.lowering import gemm_dtype
from tests.models import Stack, fill_b
from tests.sites import randn
from tests.spellings import HandWritten, Passes, Spelling, targets

CASTS = torch.ops.falqon.proxy_update.default
WRITES = torch.ops.falqon.proxy_update_.default


class Chain(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(HandWritten(Spelling(out=24, scaling=i + 1.0), seed=10 * i) for i in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.relu())


def passes(model: nn.Module, x: Tensor | None = None, **options: Any) -> RewriteResult:
    given = randn(5, 24) if x is None else x
    return rewrite(fx.symbolic_trace(model), [given], FalqonConfig(**options))


def by_rows(model: nn.Module, **options: Any) -> RewriteResult:
    """With update="rows", which has A frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_b" in name)
    return passes(model, update="rows", **{"topk": 2, **options})


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op.startswith("call")]


# -- bases -----------------------------------------------------------------------------------------


def test_each_base_enters_behind_the_inputs_as_its_weight_and_its_scale():
    result = passes(Chain())
    placeholders = [n.target for n in result.gm.graph.find_nodes(op="placeholder")]
    entered = [f"falqon_base_{i}_{part}" for i in range(3) for part in ("weight", "scale")]
    assert placeholders == ["input_1" if "input_1" in placeholders else "x", *entered]
    weights = [nodes.given[0].target for nodes in result.operands.bases]
    assert weights == [f"layers.{i}.base.weight" for i in range(3)]
    for node in result.gm.graph.find_nodes(op="placeholder")[1:]:
        shape, dtype, device = node.meta["falqon_shape"]
        is_scale = node.target.endswith("scale")
        assert shape == ((24, 1) if is_scale else (24, 24))
        assert dtype == (torch.float32 if is_scale else torch.float8_e4m3fn)
        assert device == torch.device("cpu")


def test_the_bases_that_a_call_binds_are_those_of_its_weights():
    model, x = Chain(2), randn(5, 24)
    result = passes(model)
    flat, *bases = result.bind([x])
    assert flat is x
    for layer, weight, scale in zip(model.layers, bases[::2], bases[1::2], strict=True):
        wanted = layer.base.weight
        # A power of two per row, at most twice the smallest that will do; E4M3 rounds by 1/17.
        assert (scale.frexp().mantissa == 0.5).all()
        off = (weight.float() * scale - wanted).abs()
        assert (off <= torch.maximum(wanted.abs() / 17, scale * 2.0**-10)).all()


def test_a_prepared_base_is_given_by_what_prepare_made():
    model = nn.Sequential(nn.Linear(24, 20))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=4))
    prepare(model, progress=False)
    backend = Passes()
    backend.run(model, randn(5, 24))
    (nodes,) = backend.results[0].operands.bases
    assert nodes.slot.weight is None
    code, scale, digest = (n.meta["example_value"] for n in nodes.given)
    assert (code.dtype, code.shape) == (torch.uint8, (20, 24))
    assert (scale.dtype, scale.shape) == (torch.int32, (20, 1))
    layer = model.base_model.model[0].base_layer
    assert (digest.dtype, digest.shape) == (layer.digest.dtype, layer.digest.shape)


# -- the adapters' casts ---------------------------------------------------------------------------


def test_one_op_at_the_head_of_the_graph_casts_every_adapter():
    gm = passes(Chain()).gm
    first, *rest = calls(gm)
    assert first.target is CASTS
    assert targets(gm)["proxy_update.default"] == 1
    lora_a, lora_b, scaling, *others, wide, spec = first.args
    assert [node.target for node in lora_a] == [f"layers.{i}.lora_a.weight" for i in range(3)]
    assert [node.target for node in lora_b] == [f"layers.{i}.lora_b.weight" for i in range(3)]
    assert scaling == [1.0, 2.0, 3.0]
    assert others == [[], [], [], []]  # scales of bases, and what a calibration has made
    assert wide is True  # the sites return float32
    assert spec.startswith("row pow2 e5m2 bfloat16")
    items = [n for n in rest if n.target is operator.getitem and n.args[0] is first]
    assert [n.args[1] for n in items] == list(range(9))
    values = [n.meta["val"] for n in items[:3]]
    assert [(v.dtype, tuple(v.shape)) for v in values] == [
        (torch.float8_e4m3fn, (4, 24)),
        (torch.float32, (4, 1)),
        (torch.float32, (24, 4)),
    ]


def test_the_casts_are_of_the_parameters_as_they_are_now():
    model, x = Chain(1), randn(5, 24)
    result = passes(model)
    before = result(x)
    with torch.no_grad():
        model.layers[0].lora_b.weight.mul_(2.0)
        model.layers[0].lora_a.weight.data = model.layers[0].lora_a.weight.data * 0.5
    # Powers of two go through every cast: B twice A half is what it was, to the last bit.
    assert torch.equal(result(x), before)
    with torch.no_grad():
        model.layers[0].lora_b.weight.zero_()
    assert not torch.equal(result(x), before)


def test_sites_that_return_bfloat16_and_those_that_return_float32_have_casts_of_their_own():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = HandWritten(Spelling(out=24, dtype=torch.bfloat16))
            self.wide = HandWritten(Spelling(out=24), seed=10)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.narrow(x).float())

    gm = passes(Mixed(), randn(5, 24).bfloat16()).gm
    casts = gm.graph.find_nodes(op="call_function", target=CASTS)
    found = {node.args[7]: node.args[2] for node in casts}
    if gemm_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16:
        assert found == {False: [2.0], True: [2.0]}
    else:  # a CPU that multiplies float32 alone
        assert found == {True: [2.0, 2.0]}


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
        result = rewrite(gm, [x], FalqonConfig())
        result.gm.graph.lint()
        assert len(result.report.sites) == 1
        assert torch.equal(result(x), result(x))


def test_no_adapter_no_casts():
    small, frozen = nn.Linear(24, 3), nn.Linear(24, 3).requires_grad_(False)
    large = nn.Linear(64, 64).requires_grad_(False)
    for model in (small, frozen, large):
        result = passes(nn.Sequential(model), randn(5, model.in_features))
        assert targets(result.gm)["proxy_update.default"] == 0
        assert len(result.report.sites) == (model is large)


@pytest.mark.parametrize("reentrant", [True, False])
def test_casts_stay_outside_of_checkpoint_bodies(reentrant):
    model = Stack(2, 16, 24)
    fill_b(model)
    model.call = functools.partial(checkpoint, use_reentrant=reentrant)
    backend = Passes()
    backend.run(model, randn(3, 16).requires_grad_())
    (result,) = backend.results
    first = calls(result.gm)[0]
    assert first.target is CASTS
    assert len(first.args[0]) == 4
    assert targets(result.gm)["proxy_update.default"] == 1


# -- update="rows" ---------------------------------------------------------------------------------


def test_with_rows_one_op_at_the_head_of_the_graph_writes_every_site():
    gm = by_rows(Chain()).gm
    first = calls(gm)[0]
    assert first.target is WRITES
    assert targets(gm)["proxy_update_.default"] == 1
    assert targets(gm)["proxy_update.default"] == 0
    code, scale, applied, counters, writes, lora_b, lora_a, base, scaling, spec = first.args
    names = ("code", "scale", "applied", "counters", "writes")
    for name, column in zip(names, (code, scale, applied, counters, writes), strict=True):
        assert [node.target for node in column] == [f"falqon_{i}_{name}" for i in range(3)]
    assert [node.target for node in lora_b] == [f"layers.{i}.lora_b.weight" for i in range(3)]
    assert [node.target for node in lora_a] == [f"layers.{i}.lora_a.weight" for i in range(3)]
    assert [node.target for node in base] == [f"layers.{i}.base.weight" for i in range(3)]
    assert scaling == [1.0, 2.0, 3.0]
    assert "topk=2" in spec


@pytest.mark.parametrize("pending", ["hold", "apply", "drop"])
def test_only_drop_zeroes_b_and_does_so_behind_the_writes(pending):
    model, x = Chain(2), randn(5, 24)
    fill = [layer.lora_b.weight for layer in model.layers]
    result = by_rows(model, pending=pending)
    added = targets(result.gm)
    assert added["zero_"] == added["detach"] == (2 if pending == "drop" else 0)
    assert added["pending.default"] == (2 if pending == "apply" else 0)
    before = [b.detach().clone() for b in fill]
    result(x)
    for b, old in zip(fill, before, strict=True):
        assert torch.equal(b, torch.zeros_like(b) if pending == "drop" else old)
    if pending == "drop":
        order = [str(node.target) for node in calls(result.gm)]
        assert order[0] == str(WRITES)
        assert sorted(order[1:5]) == ["detach", "detach", "zero_", "zero_"]


def test_hold_adds_the_pending_part_where_no_gradients_are_on():
    """A B that was just loaded is all pending: evaluation still counts it."""
    model = Chain(2)
    with torch.no_grad():
        result = by_rows(model, pending="hold")
    assert targets(result.gm)["pending.default"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pending_part_has_the_dtype_that_the_site_multiplies(dtype):
    """A float32 site would lose bits of B in bfloat16."""
    model, x = HandWritten(Spelling(out=24, dtype=dtype)), randn(5, 24).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_b" in name)
    result = passes(model, x, update="rows", pending="apply")
    (pending,) = result.gm.graph.find_nodes(
        op="call_function", target=torch.ops.falqon.pending.default
    )
    wanted = gemm_dtype(dtype, torch.device("cpu"))
    assert pending.args[3] is (wanted == torch.float32)
    assert pending.meta["val"].dtype == wanted


def test_with_rows_the_graph_writes_a_step_of_b_once():
    model, x = HandWritten(Spelling()), randn(5, 24)
    result = by_rows(model)
    result(x)
    (nodes,) = result.operands.rows
    names = [n.target for n in nodes.state]
    writes = dict(zip(names, result.bind([x])[1:], strict=True))["falqon_0_writes"]
    assert writes.sum() == 0  # the state was made from this B
    with torch.no_grad():
        model.lora_b.weight.add_(0.5)
    for _ in range(3):
        result(x)
        assert writes.sum() == 2  # topk
