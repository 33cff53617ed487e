from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, fx, nn

from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError, RewriteResult, prepare, rewrite
from tests.sites import randn
from tests.spellings import HandWritten, Passes, Spelling

SQUARE = Spelling(out=24)


class Pair(nn.Module):
    """Two LoRA layers on one input; ``share`` names the weights that they have in common."""

    def __init__(self, *share: str, second: Spelling = SQUARE) -> None:
        super().__init__()
        self.one, self.two = HandWritten(SQUARE), HandWritten(second, seed=20)
        for part in share:
            getattr(self.two, part).weight = getattr(self.one, part).weight

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).relu() + self.two(x).relu()


def passes(model: nn.Module, **options: Any) -> RewriteResult:
    config = FalqonConfig(**{"init": "keep", "topk": 1, **options})
    return rewrite(fx.symbolic_trace(model), [randn(5, 24)], config)


# -- slots -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "slots"),
    [
        ((), 2),
        (("base",), 2),  # two adapters on one weight
        (("base", "lora_a"), 2),
        (("lora_a", "lora_b"), 2),
        (("base", "lora_a", "lora_b"), 1),
    ],
)
def test_sites_share_a_slot_only_with_the_whole_triple(share, slots):
    model = Pair(*share)
    result = passes(model)
    assert len(result.report.sites) == 2
    assert len(result.slots) == slots
    fromdynamo = Passes()
    fromdynamo.run(model, randn(5, 24))
    assert len(fromdynamo.results[0].slots) == slots


def test_another_scaling_of_the_same_triple_is_another_slot():
    share = ("base", "lora_a", "lora_b")
    result = passes(Pair(*share, second=Spelling(out=24, scaling=0.5)))
    assert [nodes.slot.scaling for nodes in result.slots] == [2.0, 0.5]


def test_a_slot_describes_its_site():
    (slot,) = (nodes.slot for nodes in passes(HandWritten(Spelling(rank=3, bias=True))).slots)
    assert (slot.index, slot.out, slot.features, slot.rank) == (0, 20, 24, 3)
    assert slot.scaling == 2.0


# -- chosen by name or by dropout ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sites"),
    [
        ({}, ["one", "two"]),
        ({"include": "one"}, ["one"]),
        ({"include": ["t*"]}, ["two"]),
        ({"exclude": "one"}, ["two"]),
        ({"include": ["*"], "exclude": ["*w*"]}, ["one"]),
        ({"include": ["none"]}, []),
    ],
)
def test_include_and_exclude_choose_by_module_path(options, sites):
    report = passes(Pair(), **options).report
    assert [site.path for site in report.sites] == sites
    left = sorted({"one", "two"} - set(sites))
    assert [item.site for item in report.rejected] == left
    for item in report.rejected:
        assert item.reason == "include= or exclude= leaves it out"


def test_reject_leaves_only_the_sites_with_dropout():
    class Dropping(Pair):
        def __init__(self) -> None:
            super().__init__(second=Spelling(out=24, dropout="module"))
            self.two.dropout.p = 0.3

    report = passes(Dropping(), dropout="reject").report
    assert [site.path for site in report.sites] == ["one"]
    (item,) = report.rejected
    assert item.site == "two"
    assert "p=0.3" in item.reason
    assert "lora_dropout=0" in item.remedy
    assert [site.dropout for site in passes(Dropping()).report.sites] == [0.0, 0.3]


def test_the_report_gives_shape_scaling_and_output_dtype():
    model = HandWritten(Spelling(dtype=torch.bfloat16, rank=3, scaling=0.25))
    result = rewrite(fx.symbolic_trace(model), [randn(5, 24).bfloat16()], FalqonConfig(topk=2))
    (site,) = result.report.sites
    assert (site.out_features, site.in_features, site.rank) == (20, 24, 3)
    assert (site.scaling, site.dropout, site.out_dtype) == (0.25, 0.0, "bfloat16")
    assert "topk=2" in site.spec


# -- errors that name the site ---------------------------------------------------------------------


def test_a_topk_above_the_rows_of_a_site_names_it():
    model = Pair(second=Spelling(out=8, features=24))
    model.one.base, model.one.lora_b = nn.Linear(24, 8), nn.Linear(4, 8, bias=False)
    model.one.base.requires_grad_(False)
    with pytest.raises(FalqonConfigError, match=r"'topk'.*9 rows are asked, one has 8.*fraction"):
        passes(model, topk=9)
    assert len(passes(model, topk=8).report.sites) == 2


def test_a_parameter_on_another_device_names_the_site():
    model = HandWritten(Spelling(bias=True))
    gm = fx.symbolic_trace(model)
    passes_first = rewrite(gm, [randn(5, 24)], FalqonConfig(topk=1))
    assert passes_first.report.sites
    # As a frontend would leave it that lets devices mix: x on one, the parameters on another.
    for node in gm.graph.nodes:
        node.meta["val"] = torch.empty(5, 24, device="meta")
    with pytest.raises(
        FalqonError, match=r"^base.weight: a parameter is on cpu, its input on meta"
    ):
        rewrite(gm, [randn(5, 24)], FalqonConfig(topk=1))


def one() -> nn.Module:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(24, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x)

    return peft.get_peft_model(One(), peft.LoraConfig(target_modules="proj", r=4, lora_alpha=8))


@pytest.mark.parametrize("other", [{"granularity": "tensor"}, {"scale": "amax"}])
def test_another_layout_than_prepare_wrote_names_the_site_and_the_remedy(other):
    model = one()
    prepare(model, FalqonConfig(topk=1), progress=False)
    with pytest.raises(Exception, match=r"base_model.model.proj: prepare\(\) used.*same config"):
        Passes(**other).run(model, randn(5, 24))


def test_another_scaling_than_prepare_wrote_is_refused():
    model, x = one(), randn(5, 24)
    prepare(model, FalqonConfig(topk=1), progress=False)
    model.base_model.model.proj.scaling["default"] = 3.0
    backend = Passes()
    assert torch.equal(backend.run(model, x), model(x))
    (item,) = backend.rejected
    assert "prepare() merged it with scaling 2.0, the graph has 3.0" in item.reason
    assert "restore(model)" in item.remedy


def test_an_error_leaves_the_model_as_it_was():
    model, x = Pair(), randn(5, 24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    with pytest.raises(FalqonConfigError):
        passes(model, topk=1000)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
