from __future__ import annotations

import inspect
import json
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig, RewriteReport
from falqon_fx.report.report import json_schema
from tests import models
from tests.models import Stack, fill_b, tiny_llama, tiny_mlp

pytest.importorskip("peft")


class Breaks(Stack):
    """A graph break between two blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x)


IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, RewriteReport]:
    """A bf16 model with PEFT on all 14 linears, and its report."""
    model = tiny_llama(torch.bfloat16)
    return model, falqon_fx.explain(model, input_ids=IDS, config=FalqonConfig(card="H100"))


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if hasattr(m, "base_layer")}


def contents(model: nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    """Every parameter and buffer: its values and how often it was written."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.detach().clone(), tensor._version) for name, tensor in named}


def test_explain_names_every_site_of_a_peft_model(llama):
    model, report = llama
    layers = lora_layers(model).keys()
    assert {site.path for site in report.sites} == layers
    assert len(report.graphs) == 1
    assert report.rejected == ()
    assert report.options["granularity"] == "row"
    assert layers.isdisjoint(report.modules)  # a LoRA layer itself holds no parameter
    assert {f"{path}.base_layer" for path in layers} <= set(report.modules)


@pytest.mark.parametrize("prepared", [False, True])
def test_explain_changes_nothing(prepared):
    model = tiny_llama(layers=1)
    fill_b(model)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    before, random = contents(model), torch.get_rng_state()
    ids = torch.zeros(2, 5, dtype=torch.int64)
    report = falqon_fx.explain(model, input_ids=ids)
    assert len(report.sites) == 7
    assert all(site.prepared is prepared for site in report.sites)
    assert torch.equal(torch.get_rng_state(), random)
    after = contents(model)
    assert after.keys() == before.keys()
    for name, (value, version) in before.items():
        assert torch.equal(after[name][0], value), name
        assert after[name][1] == version, name
    assert all(p.grad is None for p in model.parameters())
    assert model.config.use_cache is False


def entries(function: object) -> list[int]:
    """The user's own compilations of a function."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    code = function.__code__  # type: ignore[attr-defined]
    return [id(entry.code) for entry in _debug_get_cache_entry_list(code)]


def test_the_users_compilations_stay_as_they_are():
    """Here the model's own functions are compiled frames, since its graph breaks."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, x = Breaks(), torch.randn(3, 32)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    compiled(x)
    mine, count = entries(Breaks.forward), counter.frame_count
    assert mine
    assert count == 2
    for tokens in (3, 4, 5):  # other sizes would count towards dynamic shapes
        assert len(falqon_fx.explain(compiled, torch.randn(tokens, 32)).sites) == 4
    compiled(x)
    assert entries(Breaks.forward)[: len(mine)] == mine
    assert counter.frame_count == count


def test_explain_leaves_no_sizes_behind_for_later_compilations():
    shapes: list[Any] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> object:
        shapes.extend(tuple(n.meta["example_value"].shape) for n in gm.graph.nodes if n.name == "x")
        return gm.forward

    torch._dynamo.reset()
    model = Breaks()
    falqon_fx.explain(model, torch.randn(3, 32))
    falqon_fx.explain(model, torch.randn(5, 32))
    torch.compile(model, backend=backend)(torch.randn(7, 32))
    sizes = [size for shape in shapes for size in shape]
    assert all(type(size) is int for size in sizes), sizes


def test_explain_works_as_often_as_one_likes():
    """Dynamo gives up on a function after eight compilations, and remembers sizes."""
    for i in range(10):
        width = 32 + 16 * i
        report = falqon_fx.explain(models.LoraLinear(width, 48), torch.randn(3 + i, width))
        assert [site.in_features for site in report.sites] == [width]
        assert report.sites[0].x_shape == (str(3 + i), str(width))


def test_explain_of_a_compiled_model_looks_inside_and_leaves_its_graphs_alone():
    from torch._dynamo.testing import CompileCounterWithBackend

    model, x = Stack(), torch.randn(3, 32)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    compiled(x)
    assert len(falqon_fx.explain(compiled, x).sites) == 4
    compiled(x)
    assert counter.frame_count == 1


def test_explain_says_why_a_site_stays():
    model, x = Stack(), torch.randn(3, 32)
    report = falqon_fx.explain(model, x, config=FalqonConfig(exclude=("*.up",)))
    assert [site.path for site in report.sites] == ["blocks.0.down", "blocks.1.down"]
    assert [item.site for item in report.rejected] == ["blocks.0.up", "blocks.1.up"]
    assert all("exclude" in item.reason for item in report.rejected)


def line_of(function: Any, text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    (found,) = [first + i for i, line in enumerate(lines) if text in line]
    return found


def test_sites_and_rejections_name_the_line_in_the_users_code():
    report = falqon_fx.explain(
        Stack(), torch.randn(3, 32), config=FalqonConfig(exclude=("*.down",))
    )
    wanted = line_of(models.LoraLinear.forward, "self.base_layer(x) + adapter")
    items: list[Any] = [*report.sites, *report.rejected]
    for item in items:
        assert item.source is not None
        assert (item.source.file, item.source.line) == (models.__file__, wanted)
        assert "adapter * self.scaling" in item.source.code


def test_a_rejected_match_names_its_line():
    model = models.LoraLinear(32, 48)
    model.base_layer.weight.requires_grad_(True)
    (item,) = falqon_fx.explain(model, torch.randn(3, 32)).rejected
    assert item.source is not None
    assert "lora_B" in item.source.code


def test_a_peft_site_is_placed_in_the_models_code_not_in_peft(llama):
    for site in llama[1].sites:
        assert site.source is not None
        assert "/transformers/" in site.source.file
        assert site.path.rsplit(".", 1)[1] in site.source.code


def test_each_graph_says_what_ended_it():
    report = falqon_fx.explain(Breaks(), torch.randn(3, 32))
    assert [len(graph.sites) for graph in report.graphs] == [2, 2]
    first, last = (graph.ended_by for graph in report.graphs)
    assert last is None
    assert first is not None
    assert "graph_break" in first.reason
    assert first.source is not None
    assert first.source.line == line_of(Breaks.forward, "graph_break")
    for graph in report.graphs:
        assert graph.nodes_after < graph.nodes_before
        assert set(graph.pass_seconds) >= {"normalize", "match", "plan", "rewrite", "verify"}


def test_marked_sizes_are_symbols():
    x = torch.randn(2, 7, 32)
    torch._dynamo.mark_dynamic(x, 1)
    site = falqon_fx.explain(Stack(), x).sites[0]
    two, symbol, width = site.x_shape
    assert (two, width) == ("2", "32")
    assert symbol.startswith("s")
    assert site.tokens in (f"2*{symbol}", f"{symbol}*2")
    assert site.tokens_hint == 14


def test_sites_that_read_one_input_form_a_group(llama):
    groups: dict[int, set[str]] = {}
    for site in llama[1].sites:
        groups.setdefault(site.group, set()).add(site.path.rsplit(".", 1)[1])
    one_layer = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}]
    assert list(groups.values()) == [*one_layer, {"down_proj"}] * 2


def test_a_report_tells_adapters_frozen_layers_and_what_is_left():
    """q and v have an adapter; the other five linears run in FP8 without one; the head stays."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        use_cache=False,
    )
    lora = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).train()
    for name, parameter in model.named_parameters():
        if "v_proj.lora_A" in name:
            parameter.requires_grad_(False)
    report = falqon_fx.explain(model, input_ids=IDS)
    assert report.title == "14 sites rewritten (4 with an adapter), 0 rejected, 1 left"
    by_name = {site.path.rpartition(".")[2]: site for site in report.sites}
    assert len(by_name) == 7
    assert (by_name["q_proj"].trains, by_name["v_proj"].trains) == ("A, B", "B")
    for name, site in by_name.items():
        adapted = name in ("q_proj", "v_proj")
        numbers = (site.adapters, site.rank, site.dropout)
        assert numbers == ((1, 4, 0.1) if adapted else (0, 0, 0.0))
        assert site.memory is not None
        assert bool(site.memory.adapter) is adapted
        assert adapted or site.trains == ""
    (left,) = report.left
    assert (left.site, left.reason) == ("base_model.model.lm_head", "it is an output head")
    assert left.source is not None
    assert "self.lm_head" in left.source.code
    untouched = falqon_fx.explain(model, input_ids=IDS, config=FalqonConfig(frozen="leave"))
    assert untouched.title == "4 sites rewritten (4 with an adapter), 0 rejected, 0 left"


@pytest.mark.parametrize("adapters", [1, 2])
def test_adapters_that_are_active_together_are_counted(adapters):
    import peft

    model = tiny_mlp()
    if adapters == 2:
        model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["0", "2"]))
        model.base_model.set_adapter(["default", "more"])
    for site in falqon_fx.explain(model, torch.randn(3, 32)).sites:
        assert (site.adapters, site.rank) == ((1, 4), (2, 6))[adapters - 1]


def test_with_update_rows_the_report_holds_its_options():
    model = Stack()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    config = FalqonConfig(update="rows", topk=3)
    report = falqon_fx.explain(model, torch.randn(3, 32), config=config)
    assert len(report.sites) == 4
    wanted = {"update": "rows", "topk": "3", "pending": "apply", "rounding": "stochastic"}
    assert wanted.items() <= report.options.items()
    assert "update=rows" in str(report)
    assert "topk=3" in str(report)
    assert RewriteReport.from_json(report.to_json()).options == report.options


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_live_tensors(dtype, granularity):
    config = FalqonConfig(granularity=granularity)
    model, x = tiny_mlp().to(dtype), torch.randn(3, 32, dtype=dtype)
    layers = lora_layers(model)
    base = {path: m.base_layer.weight.nbytes for path, m in layers.items()}
    unprepared = falqon_fx.explain(model, x, config=config)
    falqon_fx.prepare(model, config, progress=False)
    prepared = falqon_fx.explain(model, x, config=config)
    state = falqon_fx.adapters(model)
    for report in (unprepared, prepared):
        assert len(report.sites) == 2
        for site in report.sites:
            memory, layer = site.memory, layers[site.path]
            assert memory is not None
            assert memory.base == base[site.path]
            assert memory.state == state[site.path].weight.nbytes + state[site.path].scale.nbytes
            adapter = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
            assert memory.adapter == sum(t.nbytes for t in adapter)
            assert memory.before == base[site.path] + memory.adapter
            assert memory.after == memory.state + memory.adapter


def test_shapes_and_dtypes_are_those_of_the_model(llama):
    model, report = llama
    layers = lora_layers(model)
    for site in report.sites:
        layer = layers[site.path]
        assert (site.out_features, site.in_features) == tuple(layer.base_layer.weight.shape)
        assert site.rank == layer.r["default"]
        assert site.scaling == layer.scaling["default"]
        assert site.x_shape == ("2", "5", str(site.in_features))
        assert (site.x_dtype, site.base_dtype, site.adapter_dtype, site.out_dtype) == (
            "bfloat16",
            "bfloat16",
            "float32",
            "bfloat16",
        )
        assert (site.adapters, site.trains) == (1, "A, B")
        assert site.options["granularity"] == "row"
        assert site.device == "cpu"
        assert site.architecture == 90  # of the card that was asked about


def test_json_has_the_documented_schema_and_comes_back_the_same():
    config = FalqonConfig(exclude=("*.0.up",), card="H100")
    report = falqon_fx.explain(Breaks(), torch.randn(3, 32), config=config)
    for graphs in (False, True):
        tree = json.loads(report.to_json(graphs=graphs))
        jsonschema.Draft202012Validator(json_schema()).validate(tree)
        assert tree["graphs"][0]["sites"][0]["options"]["granularity"] == "row"
        assert bool(tree["graphs"][0]["before"]) is graphs
    assert RewriteReport.from_json(report.to_json(graphs=True)) == report
    other = json.dumps(json.loads(report.to_json()) | {"schema": 1})
    with pytest.raises(ValueError, match="schema: Input should be 2"):
        RewriteReport.from_json(other)


def test_a_wrong_json_does_not_pass_the_schema():
    tree = json.loads(falqon_fx.explain(Stack(), torch.randn(3, 32)).to_json())
    tree["graphs"][0]["sites"][0]["rank"] = "four"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, json_schema())


def test_a_model_on_the_meta_device_is_explained_without_a_cache():
    with torch.device("meta"):
        model = tiny_llama()
        ids = torch.zeros(2, 5, dtype=torch.int64)
    model.config.use_cache = True
    report = falqon_fx.explain(model, input_ids=ids)
    assert len(report.sites) == 14
    assert any("use_cache=False" in note for note in report.notes)
    assert model.config.use_cache is True
    assert all(p.device.type == "meta" for p in model.parameters())


def test_listings_keep_the_names_of_nodes():
    (graph,) = falqon_fx.explain(Stack(), torch.randn(3, 32)).graphs
    before, after = ({line.node for line in lines} for lines in (graph.before, graph.after))
    replaced = {name for site in graph.sites for name in site.nodes}
    assert replaced <= before
    assert before - after == replaced
    text = "\n".join(line.text for line in graph.after)
    assert "falqon.merged_linear(" in text
    assert "f32[3, 48]" in text
