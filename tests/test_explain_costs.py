"""What `explain` says of costs: from the named card, or nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError, RewriteReport
from tests.models import Stack, tiny_llama

pytest.importorskip("peft")


IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, RewriteReport]:
    """A bf16 model with PEFT on all 14 linears, and its report."""
    model = tiny_llama(torch.bfloat16)
    return model, falqon_fx.explain(model, input_ids=IDS, config=FalqonConfig(card="H100"))


def test_costs_come_from_the_named_card(llama):
    report = llama[1]
    costs = {site.path: site.cost for site in report.sites}
    for cost in costs.values():
        assert cost is not None
        assert cost.card == "H100"
        assert cost.tokens == 10
        assert cost.gain == cost.seconds_before / cost.seconds_after
    assert "H100" in str(report)


def test_without_a_known_card_no_time_is_invented(monkeypatch, tmp_path):
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path))
    report = falqon_fx.explain(Stack(), torch.randn(3, 32))
    assert all(site.cost is None for site in report.sites)
    (note,) = report.notes
    assert "no times are predicted: nothing is known of this cpu" in note
    assert "--calibrate cpu" in note
    with torch.device("meta"):
        model, x = Stack(), torch.randn(3, 32)
    (note,) = falqon_fx.explain(model, x).notes
    assert "the meta device is no card. Give card=" in note
    assert "--calibrate" not in note  # there is nothing to measure


def test_min_gain_leaves_losing_sites_alone():
    model, x = Stack(), torch.randn(3, 32)
    everything = FalqonConfig(card="H100", min_gain=0.01)
    assert len(falqon_fx.explain(model, x, config=everything).sites) == 4
    nothing = FalqonConfig(card="H100", min_gain=1000.0)
    report = falqon_fx.explain(model, x, config=nothing)
    assert report.sites == ()
    assert len(report.rejected) == 4
    assert all("min_gain=1000" in item.reason for item in report.rejected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"config": nothing, "inner": "eager"}
        assert torch.equal(torch.compile(model, backend="falqon", options=options)(x), model(x))


def test_min_gain_without_a_known_card_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path))
    with pytest.raises(FalqonError, match="calibrate"):
        falqon_fx.explain(Stack(), torch.randn(3, 32), config=FalqonConfig(min_gain=1.0))
