from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig
from tests.models import Stack, fill_b, tiny_llama

pytest.importorskip("peft")


def contents(model: nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    """Every parameter and buffer: its values and how often it was written."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.detach().clone(), tensor._version) for name, tensor in named}


def test_explain_names_every_site_of_a_peft_model():
    model = tiny_llama()
    ids = torch.zeros(2, 5, dtype=torch.int64)
    report = falqon_fx.explain(model, input_ids=ids, labels=ids)
    layers = {name for name, m in model.named_modules() if hasattr(m, "base_layer")}
    assert {site.path for site in report.sites} == layers
    assert len(report.graphs) == 1
    assert report.rejected == ()


@pytest.mark.parametrize("prepared", [False, True])
def test_explain_changes_nothing(prepared):
    torch.manual_seed(0)
    model = tiny_llama()
    fill_b(model)
    if prepared:
        falqon_fx.prepare(model, progress=False)
    before, random = contents(model), torch.get_rng_state()
    ids = torch.zeros(2, 5, dtype=torch.int64)
    report = falqon_fx.explain(model, input_ids=ids)
    assert len(report.sites) == 14
    assert torch.equal(torch.get_rng_state(), random)
    after = contents(model)
    assert after.keys() == before.keys()
    for name, (value, version) in before.items():
        assert torch.equal(after[name][0], value), name
        assert after[name][1] == version, name


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


def test_explain_reports_each_graph_of_a_model_that_breaks():
    class Breaks(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x)

    report = falqon_fx.explain(Breaks(), torch.randn(3, 32))
    assert [len(graph.sites) for graph in report.graphs] == [2, 2]


def test_a_report_is_plain_data():
    report = falqon_fx.explain(Stack(), torch.randn(3, 32))
    assert json.loads(json.dumps(asdict(report)))["graphs"][0]["sites"][0]["rank"] == 4
