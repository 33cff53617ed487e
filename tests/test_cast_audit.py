"""`watch` with the default update: what the casts of the adapters take, step by step."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import CastAudit
from falqon_fx.model.watching import _view, summary
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.rows import audit
from falqon_fx.site.spec import SiteSpec
from tests.models import LoraLinear, Stack, fill_b, lora_b, train

OPTIONS: dict[str, Any] = {"inner": "eager"}


def made(**options: Any) -> tuple[nn.Module, Any, torch.Tensor]:
    """A model with four sites, compiled, and its input."""
    torch.manual_seed(0)
    model = Stack()
    fill_b(model)
    compiled = torch.compile(model, backend="falqon", options={**OPTIONS, **options})
    return model, compiled, torch.randn(6, 32)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "tensor", "scale": "amax"},
        {"adapter_dtype": "fp8"},
        {"adapter_dtype": "fp8", "granularity": "tensor"},
    ],
)
def test_losses_and_share_are_those_of_the_casts_that_a_graph_makes(options):
    """In float64 from what `falqon::proxy_update` returns; the audit's sums are of float32."""
    model, compiled, x = made(**options)
    with falqon_fx.watch(compiled) as seen:
        train(compiled, trained(model), x, 2)
    spec = str(SiteSpec.from_config(falqon_fx.FalqonConfig(**options)))
    last = {item.site: item for item in seen.history if item.step == 2}
    sites = falqon_fx.adapters(model)
    assert last.keys() == sites.keys()
    assert len(seen.history) == 2 * len(sites) == 8
    for path, site in sites.items():
        ((a, b, scaling),) = site.adapters
        scales = [site.scale] if "adapter_dtype" in options else []
        wide = not scales  # the model is in float32
        casts = torch.ops.falqon.proxy_update([a], [b], [scaling], scales, [], [], [], wide, spec)
        code, scale, cast_b, *alpha = casts
        of_b = cast_b.double() * site.scale / alpha[0] if alpha else cast_b
        close = {"rel": 1e-5, "abs": 1e-9}
        item = last[path]
        assert item.lost_a == pytest.approx(relative(code.double() * scale, a), **close)
        assert item.lost_b == pytest.approx(relative(of_b, scaling * b), **close)
        learned = relative(site.merged(), site.base())
        assert item.share == pytest.approx(learned, rel=1e-4)  # of a difference in float32
        assert item.saturated == 0
        assert 0.01 < item.lost_a < 2**-4  # E4M3


def test_the_adapter_of_a_bfloat16_layer_is_rounded_to_bfloat16():
    """To nearest: off by at most 2^-9 of each element; it is in float32 as PEFT's are. A CPU that
    doesn't multiply bfloat16 leaves it so.
    """
    model = nn.Sequential(LoraLinear(32, 32, dtype=torch.bfloat16))
    fill_b(model)
    compiled = torch.compile(model, backend="falqon", options=OPTIONS)
    with falqon_fx.watch(model) as seen:
        train(compiled, trained(model), torch.randn(6, 32, dtype=torch.bfloat16), 1)
    (item,) = seen.history
    rounds = gemm_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    assert 2**-12 < item.lost_b < 2**-9 if rounds else item.lost_b == 0


def test_what_fp8_clamps_is_counted_and_by_nothing_else():
    model, compiled, x = made(adapter_dtype="fp8")
    with torch.no_grad():
        for b in lora_b(model):
            b[0] = 1e4  # a row far beyond the others
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(compiled, torch.optim.SGD(lora_b(model), lr=0.0), x, 1)
        counted = {path: site.saturated for path, site in falqon_fx.adapters(model).items()}
        assert any(counted.values())
        with falqon_fx.watch(model) as seen:
            torch.optim.SGD(lora_b(model), lr=0.0).step()
    assert {item.site: item.saturated for item in seen.history} == counted


def test_each_step_of_its_own_optimizer_is_seen_once_and_only_inside(tmp_path):
    (model, compiled, x), (other, its_own, _) = made(), made()
    steps, others, file = trained(model), trained(other), tmp_path / "audit.jsonl"
    train(compiled, steps, x, 1)
    calls: list[list[CastAudit]] = []
    with falqon_fx.watch(model, jsonl=file, callbacks=[lambda s: calls.append([*s])]) as seen:
        train(compiled, steps, x, 2)
        assert len(calls) == 1  # the last step is closed by the next one
        train(its_own, others, x, 2)
        train(compiled, steps, x, 1)
    train(compiled, steps, x, 1)
    assert [(len(step), step[0].step) for step in calls] == [(4, 1), (4, 2), (4, 3)]
    assert seen.history == [item for step in calls for item in step]
    lines = [CastAudit(**json.loads(line)) for line in file.read_text().splitlines()]
    assert lines == seen.history
    assert not audit.observers


def test_watching_changes_no_result():
    losses = []
    for watched in (False, True):
        torch._dynamo.reset()
        model, compiled, x = made()
        if watched:
            with falqon_fx.watch(model):
                losses.append(train(compiled, trained(model), x, 3))
        else:
            losses.append(train(compiled, trained(model), x, 3))
    assert losses[0] == losses[1]


def test_a_summary_has_the_largest_losses_and_the_sum_of_what_is_clamped(capsys):
    one = CastAudit("a[red]", 3, 0.02, 0.003, None, 1)
    step = [one, dataclasses.replace(one, site="b", lost_a=0.01, lost_b=0.004, share=0.5)]
    wanted = {"lost_a": 0.02, "lost_b": 0.004, "share": 0.5, "saturated": 2.0}
    assert summary(step) == wanted
    table = _view(step)
    assert table.title == "step 3: casts of 2 adapters"
    assert [str(cell) for cell in table.columns[0].cells] == ["a[red]", "b"]
    assert [*table.columns[3].cells] == ["", "50.00%"]
