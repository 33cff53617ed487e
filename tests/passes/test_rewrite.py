from __future__ import annotations

import copy
import functools
import operator
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from falqon_fx import FalqonConfig, FalqonError, RewriteResult, prepare, rewrite
from tests import tolerances as tol
from tests.models import LoraLinear, Stack, fill_b
from tests.parameters import each_value
from tests.sites import randn
from tests.spellings import HandWritten, Passes, Spelling, check_site, spellings, targets

DEFAULT = FalqonConfig()
FUSED = {"merged_linear.default": 1, "getitem": 1 + 3, "proxy_update.default": 1}


def parameters(model: HandWritten) -> tol.Parameters:
    a, b = model.lora_a, model.lora_b
    scaling = float(model.spelling.scaling)
    return tol.Parameters(model.base.weight, a.weight, b.weight, scaling, model.base.bias, b.bias)


def example(spelling: Spelling, seed: int = 7) -> Tensor:
    return randn(*spelling.leading, spelling.features, seed=seed).to(spelling.dtype)


# -- any spelling, any frontend --------------------------------------------------------------------


def traced(model: nn.Module, x: Tensor) -> Any:
    return rewrite(fx.symbolic_trace(model), [x], DEFAULT)


def exported(model: nn.Module, x: Tensor) -> Any:
    return rewrite(torch.export.export(model, (x,)).module(), [x], DEFAULT)


@given(spellings())
@settings(max_examples=2 * settings.default.max_examples)
def test_any_spelling_from_symbolic_trace_is_one_site_within_the_fp8_bound(spelling):
    """Modules are still called as such."""
    model, x = HandWritten(spelling), example(spelling)
    result = traced(model, x)
    assert len(result.report.sites) == 1, [str(r) for r in result.report.rejected]
    check_site(result, model, x, parameters(model))


@given(spellings())
@settings(max_examples=settings.default.max_examples // 2)
def test_any_spelling_from_dynamo_is_one_site_within_the_fp8_bound(spelling):
    model, x = HandWritten(spelling), example(spelling)
    torch._dynamo.reset()
    passes = Passes()
    check_site(torch.compile(model, backend=passes), model, x, parameters(model))
    assert len(passes.sites) == 1, [str(r) for r in passes.rejected]


@given(spellings())
@settings(max_examples=settings.default.max_examples // 2)
def test_any_spelling_from_export_is_one_site_within_the_fp8_bound(spelling):
    model, x = HandWritten(spelling), example(spelling)
    result = exported(model, x)
    assert len(result.report.sites) == 1, [str(r) for r in result.report.rejected]
    own = dict(model.named_parameters())  # the exported module shares them
    assert result.gm.get_parameter("lora_b.weight") is own["lora_b.weight"]
    check_site(result, model, x, parameters(model))


# -- what stands in the graph ----------------------------------------------------------------------


def test_called_modules_give_way_to_one_op():
    model = HandWritten(Spelling(bias=True))
    gm = fx.symbolic_trace(model)
    result = traced(model, randn(5, 24))
    assert targets(gm) == {"base": 1, "lora_a": 1, "lora_b": 1, "mul": 1, "add": 1}
    assert targets(result.gm) == FUSED
    assert (result.report.graphs[0].nodes_before, result.report.graphs[0].nodes_after) == (5, 6)


def test_exported_aten_ops_give_way_to_one_op():
    model, x = HandWritten(Spelling(bias=True)), randn(5, 24)
    before = targets(torch.export.export(model, (x,)).module())
    assert before == {"_guards_fn": 1, "linear.default": 3, "mul.Tensor": 1, "add.Tensor": 1}
    assert targets(exported(model, x).gm) == {"_guards_fn": 1, **FUSED}


def test_the_fused_op_reads_what_the_site_read():
    model, x = HandWritten(Spelling(bias=True, dtype=torch.bfloat16)), randn(5, 24).bfloat16()
    gm = traced(model, x).gm
    (op,) = gm.graph.find_nodes(op="call_function", target=torch.ops.falqon.merged_linear.default)
    given, (weight,), (scale,), (bias,), *casts, alpha, clamped = op.args[:9]
    (lora_a,), (lora_b,), own_x, owner = op.args[9:13]
    assert given.op == "placeholder"
    assert given.target == "x"
    assert (weight.target, scale.target) == ("falqon_base_0_weight", "falqon_base_0_scale")
    assert [cast.args[1] for (cast,) in casts] == [0, 1, 2]
    (made,) = {cast.args[0] for (cast,) in casts}
    assert made.target is torch.ops.falqon.proxy_update.default
    assert (lora_a.target, lora_b.target) == ("lora_a.weight", "lora_b.weight")
    assert bias.target == "base.bias"
    assert (alpha, clamped, own_x, owner) == ([], [], [], [0])
    scaling, keep_x, *copies, out_dtype, spec = op.args[13:]
    assert (scaling, keep_x, copies, out_dtype) == ([2.0], True, [[], [], []], torch.bfloat16)
    assert spec == made.args[-1]


def test_a_layer_called_twice_is_two_sites_on_one_base_and_one_cast():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = HandWritten(Spelling(out=24))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    result = traced(Twice(), randn(5, 24))
    assert len(result.report.sites) == 2
    assert len(result.operands.bases) == 1
    assert targets(result.gm) == {
        "merged_linear.default": 2,
        "getitem": 2 + 3,
        "proxy_update.default": 1,
    }


def test_a_site_reads_the_result_of_the_site_before_it():
    """Its cast included: the second layer's input is what the first one returns."""
    mixed = Spelling(out=24, dtype=torch.bfloat16)
    first, second = HandWritten(mixed), HandWritten(mixed, seed=20)
    x = randn(5, 24).bfloat16()
    both = traced(nn.Sequential(first, second), x)
    assert len(both.report.sites) == 2
    assert torch.equal(both(x), traced(second, x)(traced(first, x)(x)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_bodies_get_bases_and_casts_as_operands(reentrant):
    model = Stack(2, 16, 24)
    fill_b(model)
    model.call = functools.partial(checkpoint, use_reentrant=reentrant)
    passes = Passes()
    y = passes.run(model, randn(3, 16).requires_grad_())
    y.sum().backward()
    (result,) = passes.results
    assert len(passes.sites) == 4
    root = [n for n in result.gm.graph.nodes if n.op == "call_function"]
    calls = [n for n in root if n.target is torch.ops.higher_order.tag_activation_checkpoint]
    assert len(calls) == 2
    for call in calls:
        body = result.gm.get_submodule(str(call.args[0].target))
        assert targets(body)["merged_linear.default"] == 2
        assert targets(body)["proxy_update.default"] == 0
        bases = [n for n in call.args[1:] if n.name.startswith("falqon_base")]
        assert len(bases) == 2 * 2  # weight and scale of two sites
        items = [n for n in call.args[1:] if n.target is operator.getitem]
        casts = [n for n in items if n.args[0].target is torch.ops.falqon.proxy_update.default]
        assert len(casts) == 2 * 3  # of A, its scale, and s·B
        assert len(body.graph.find_nodes(op="placeholder")) == len(call.args) - 1
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


def test_metadata_follows_the_result():
    """Inductor and the report read shapes, dtypes and where in the model a node comes from."""
    passes = Passes()
    passes.run(LoraLinear(24, 20, dtype=torch.bfloat16), randn(5, 24).bfloat16())
    (gm,) = (result.gm for result in passes.results)
    (output,) = gm.graph.find_nodes(op="output")[0].args[0]
    assert output.meta["example_value"].dtype == torch.bfloat16
    assert output.meta["example_value"].shape == (5, 20)
    assert output.meta["stack_trace"]


# -- what rewrite leaves alone ---------------------------------------------------------------------


def frozen(gm: fx.GraphModule) -> list[str]:
    """A graph module as text: nodes, code and attributes, checkpoint bodies included."""
    parts = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return [str(part.graph) + part.code + " ".join(vars(part)) for part in parts]


@pytest.mark.parametrize("frontend", [fx.symbolic_trace, None])
def test_the_given_graph_is_never_edited(frontend):
    model, x = HandWritten(Spelling(bias=True)), randn(5, 24)
    gm = frontend(model) if frontend else torch.export.export(model, (x,)).module()
    before, expected = frozen(gm), gm(x)
    rewrite(gm, [x], DEFAULT)
    assert frozen(gm) == before
    assert torch.equal(gm(x), expected)


def test_a_given_graph_with_checkpoints_is_never_edited():
    model = Stack(2, 16, 24)
    model.call = functools.partial(checkpoint, use_reentrant=False)
    seen: list[tuple[list[str], list[str]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> RewriteResult:
        before = frozen(gm)
        result = rewrite(gm, inputs, DEFAULT)
        seen.append((before, frozen(gm)))
        return result

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(randn(3, 16))
    ((before, after),) = seen
    assert len(before) == 3
    assert after == before


def test_rewriting_a_rewritten_graph_changes_nothing():
    model, x = HandWritten(Spelling(bias=True, lora_bias=True)), randn(5, 24)
    first = traced(model, x)
    inputs = first.bind([x])
    second = rewrite(first.gm, inputs, DEFAULT)
    assert not second.report.sites
    assert not second.report.rejected
    assert str(second.gm.graph) == str(first.gm.graph)
    assert torch.equal(second(*inputs), first(x))


def test_rewriting_the_same_graph_again_gives_the_same_graph():
    model, x = HandWritten(Spelling()), randn(5, 24)
    gm = fx.symbolic_trace(model)
    first, second = rewrite(gm, [x], DEFAULT), rewrite(gm, [x], DEFAULT)
    assert str(first.gm.graph) == str(second.gm.graph)
    assert torch.equal(first(x), second(x))


def test_a_graph_without_lora_is_returned_as_it_was():
    model, x = nn.Sequential(nn.Linear(24, 20), nn.ReLU()), randn(5, 24)
    gm = fx.symbolic_trace(model)
    sources: Any = {"0.weight": "L['self']"}  # as of Dynamo
    gm._param_name_to_source, gm.meta["of"] = sources, "graph"
    gm.graph.output_node().meta["of"] = "output"
    result = rewrite(gm, [x])
    assert not result.operands.bases
    assert str(result.gm.graph) == str(gm.graph)
    assert result.gm._param_name_to_source == sources
    assert (result.gm.meta["of"], result.gm.graph.output_node().meta["of"]) == ("graph", "output")
    assert torch.equal(result(x), model(x))


def test_exported_inputs_and_outputs_keep_their_structure():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = HandWritten(Spelling())

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
            y = self.layer(batch["x"])
            return {"y": y, "rest": [y.sum(), batch["z"]]}

    batch = {"x": randn(5, 24), "z": randn(3)}
    model = Nested()
    result = exported(model, batch)
    output = result(batch)
    assert len(result.report.sites) == 1
    assert output.keys() == {"y", "rest"}
    assert torch.equal(output["y"], traced(model.layer, batch["x"])(batch["x"]))
    assert torch.equal(output["rest"][1], batch["z"])


def test_values_next_to_a_site_are_bit_equal():
    """Everything outside the site still runs as it did."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = HandWritten(Spelling()), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.relu()
            return self.layer(x), self.other(x).sigmoid()

    model, x = Beside(), randn(5, 24)
    result = traced(model, x)
    assert torch.equal(result(x)[1], model(x)[1])


# -- what is kept for backward ---------------------------------------------------------------------


@each_value(
    sites=[1, 3],
    dtype={"float32": torch.float32, "bfloat16": torch.bfloat16},
    inner=["eager", "aot_eager", "inductor"],
)
def test_x_is_kept_for_backward_where_a_is_trained_and_once_for_siblings(inner, dtype, sites):
    layers = nn.ModuleList(LoraLinear(72, 80, dtype=dtype) for _ in range(sites))
    fill_b(layers, 0.1)

    def function(x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in layers]).square().sum()

    def kept() -> list[torch.dtype]:
        """What is as large as x among all that is kept."""
        torch._dynamo.reset()
        call = torch.compile(function, backend="falqon", options={"inner": inner})
        seen: list[Tensor] = []
        x = randn(7, 72).to(dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            y = call(x)
        y.backward()
        assert x.grad is not None
        return [t.dtype for t in seen if t.numel() == 7 * 72]

    assert kept() == [torch.float8_e4m3fn]
    for layer in layers:
        layer.lora_A.requires_grad_(False)
    assert kept() == []


def test_a_frozen_a_that_is_unfrozen_under_a_graph_that_can_not_know_is_an_error():
    """Dynamo compiles anew; `symbolic_trace` and export do not look again."""
    model, x = HandWritten(Spelling()), randn(5, 24)
    model.lora_a.requires_grad_(False)
    result = traced(model, x)
    result(x).sum().backward()
    assert model.lora_a.weight.grad is None
    model.lora_a.requires_grad_(True)
    with pytest.raises(FalqonError, match="lora_A trains now, but did not when"):
        result(x).sum().backward()


def test_a_call_leaves_every_parameter_as_it_was():
    model, x = HandWritten(Spelling()), randn(5, 24)
    before = copy.deepcopy(model.state_dict())
    traced(model, x)(x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# -- prepared layers -------------------------------------------------------------------------------


class Mlp(nn.Module):
    """LoRA on the first of two layers; the second is wide enough for FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(72, 64), nn.Linear(64, 80)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.proj(x).relu())


def adapted() -> nn.Module:
    model = peft.get_peft_model(Mlp(), peft.LoraConfig(target_modules="proj", r=4))
    fill_b(model, 0.1)
    return model


def test_a_prepared_layer_is_rewritten_on_the_bytes_it_holds():
    model, x = adapted(), randn(5, 72)
    unprepared = Passes().run(model, x)
    prepare(model, DEFAULT, progress=False)
    passes = Passes()
    assert torch.equal(passes.run(model, x), unprepared)
    assert passes.before[0]["base_linear.default"] == 2
    assert passes.after[0]["base_linear.default"] == 0
    assert passes.after[0]["merged_linear.default"] == 2
    assert [site.prepared for site in passes.sites] == [True, True]


@pytest.mark.parametrize("frozen", ["fp8", "leave"])
def test_an_exported_prepared_model_gives_the_numbers_of_the_compiled_one(frozen):
    """Its bytes are get_attr nodes there, not placeholders. A layer that is prepared is rewritten
    whatever ``frozen`` says: nothing else is left of it.
    """
    model, x = adapted(), randn(5, 72)
    prepare(model, progress=False)
    config, passes = FalqonConfig(frozen=frozen), Passes(frozen=frozen)

    def numbers(call: Any) -> list[Tensor]:
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    torch._dynamo.reset()
    compiled = numbers(torch.compile(model, backend=passes, fullgraph=True))
    assert len(compiled) == 3
    result = rewrite(torch.export.export(model, (x,)).module(), [x], config)
    assert [site.path for site in result.report.sites] == [site.path for site in passes.sites]
    assert len(passes.sites) == 2
    assert targets(result.gm)["base_linear.default"] == 0
    assert targets(result.gm)["merged_linear.default"] == 2
    for ours, theirs in zip(numbers(result), compiled, strict=True):
        assert torch.equal(ours, theirs)
