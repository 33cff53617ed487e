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
    return rewrite(fx.symbolic_trace(model), [randn(5, 24)], FalqonConfig(**options))


def by_rows(model: nn.Module, **options: Any) -> RewriteResult:
    """With update="rows", which has A frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_b" in name)
    return passes(model, update="rows", **{"topk": 1, **options})


# -- slots -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "bases", "adapters"),
    [
        ((), 2, 2),
        (("base",), 1, 2),  # two adapters on one weight
        (("base", "lora_a"), 1, 2),
        (("lora_a", "lora_b"), 2, 1),  # one adapter on two weights
        (("base", "lora_a", "lora_b"), 1, 1),
    ],
)
def test_a_base_belongs_to_its_weight_and_a_cast_to_its_adapter(share, bases, adapters):
    model = Pair(*share)
    fromdynamo = Passes()
    fromdynamo.run(model, randn(5, 24))
    for result in (passes(model), *fromdynamo.results):
        assert len(result.report.sites) == 2
        assert len(result.operands.bases) == bases
        assert len(result.operands.adapters) == adapters
        assert len(result.operands.pairs) == max(bases, adapters)


def test_another_scaling_of_the_same_adapter_is_another_cast_on_the_same_base():
    share = ("base", "lora_a", "lora_b")
    result = passes(Pair(*share, second=Spelling(out=24, scaling=0.5)))
    assert [nodes.scaling for nodes in result.operands.adapters.values()] == [2.0, 0.5]
    assert len(result.operands.bases) == 1


def test_a_frozen_layer_and_an_adapted_one_share_the_base_of_a_weight_they_share():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = HandWritten(Spelling(out=64, features=64))

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.one.base(x.relu())

    result = rewrite(fx.symbolic_trace(Shared()), [randn(5, 64)])
    assert [site.adapters for site in result.report.sites] == [1, 0]
    assert len(result.operands.bases) == 1


def test_a_slot_describes_its_base():
    (nodes,) = passes(HandWritten(Spelling(rank=3, bias=True))).operands.bases
    slot = nodes.slot
    assert (slot.out, slot.features, slot.path) == (20, 24, "base.weight")
    assert slot.weight.node is None
    assert slot.weight.name == "base.weight"


@pytest.mark.parametrize(
    ("share", "slots"),
    [
        ((), 2),
        (("base",), 2),
        (("base", "lora_a"), 2),
        (("lora_a", "lora_b"), 2),
        (("base", "lora_a", "lora_b"), 1),
    ],
)
def test_with_rows_sites_share_a_state_only_with_the_whole_triple(share, slots):
    """What is written into W' is the adapter's."""
    model = Pair(*share)
    result = by_rows(model)
    assert len(result.report.sites) == 2
    assert len(result.operands.rows) == slots
    fromdynamo = Passes(update="rows", topk=1)
    fromdynamo.run(model, randn(5, 24))
    assert len(fromdynamo.results[0].operands.rows) == slots


def test_with_rows_another_scaling_of_the_same_triple_is_another_state():
    share = ("base", "lora_a", "lora_b")
    result = by_rows(Pair(*share, second=Spelling(out=24, scaling=0.5)))
    assert [nodes.slot.scaling for nodes in result.operands.rows] == [2.0, 0.5]


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
    result = rewrite(fx.symbolic_trace(model), [randn(5, 24).bfloat16()])
    (site,) = result.report.sites
    assert (site.out_features, site.in_features, site.rank) == (20, 24, 3)
    assert (site.scaling, site.dropout, site.out_dtype) == (0.25, 0.0, "bfloat16")
    assert (site.adapters, site.train_a, site.train_b) == (1, True, True)
    assert "topk" not in site.spec


# -- errors that name the site ---------------------------------------------------------------------


def test_a_topk_above_the_rows_of_a_site_names_it():
    model = Pair(second=Spelling(out=8, features=24))
    model.one.base, model.one.lora_b = nn.Linear(24, 8), nn.Linear(4, 8, bias=False)
    model.one.base.requires_grad_(False)
    with pytest.raises(FalqonConfigError, match=r"'topk'.*9 rows are asked, one has 8.*fraction"):
        by_rows(model, topk=9)
    assert len(by_rows(model, topk=8).report.sites) == 2


def test_a_trained_a_with_rows_names_the_site_and_both_remedies():
    with pytest.raises(FalqonError, match=r'one: its lora_A is trained.*update="adapter"'):
        passes(Pair(), update="rows")
    assert len(passes(Pair(), update="rows", topk="all").report.sites) == 2  # all rows, on a CPU


def test_a_parameter_on_another_device_names_the_site():
    model = HandWritten(Spelling(bias=True))
    gm = fx.symbolic_trace(model)
    assert rewrite(gm, [randn(5, 24)]).report.sites
    # As a frontend would leave it that lets devices mix: x on one, the parameters on another.
    for node in gm.graph.nodes:
        node.meta["val"] = torch.empty(5, 24, device="meta")
    with pytest.raises(
        FalqonError, match=r"^base.weight: a parameter is on cpu, its input on meta"
    ):
        rewrite(gm, [randn(5, 24)])


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
    prepare(model, progress=False)
    with pytest.raises(Exception, match=r"base_model.model.proj: prepare\(\) used.*same config"):
        Passes(**other).run(model, randn(5, 24))


@pytest.mark.parametrize(("made", "asked"), [("rows", "adapter"), ("adapter", "rows")])
def test_another_update_than_prepare_made_it_for_names_the_site_and_the_remedy(made, asked):
    model = one()
    model.base_model.model.proj.lora_A.requires_grad_(False)
    prepare(model, FalqonConfig(update=made), progress=False)
    said = (
        rf"base_model.model.proj: prepare\(\) made it for update='{made}'.*'{asked}'.*same config"
    )
    with pytest.raises(Exception, match=said):
        Passes(update=asked).run(model, randn(5, 24))


def test_another_scaling_after_prepare_needs_no_new_base():
    model, x = one(), randn(5, 24)
    prepare(model, progress=False)
    backend = Passes()
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    model.base_model.model.proj.scale_layer(1.5)
    compiled(x)
    assert [site.scaling for site in backend.sites] == [2.0, 3.0]
    first, second = (result.operands.bases[0].given[0] for result in backend.results)
    assert first.name == second.name


def test_with_rows_another_scaling_than_prepare_wrote_is_refused():
    model, x = one(), randn(5, 24)
    model.base_model.model.proj.lora_A.requires_grad_(False)
    prepare(model, FalqonConfig(update="rows", topk=1), progress=False)
    model.base_model.model.proj.scaling["default"] = 3.0
    backend = Passes(update="rows", topk=1)
    assert torch.equal(backend.run(model, x), model(x))
    (item,) = backend.rejected
    assert "prepare() merged it with scaling 2, the graph has 3" in item.reason
    assert "restore(model)" in item.remedy


def test_an_error_leaves_the_model_as_it_was():
    model, x = Pair(), randn(5, 24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    with pytest.raises(FalqonConfigError):
        by_rows(model, topk=1000)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
