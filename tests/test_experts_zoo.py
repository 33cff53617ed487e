"""Every family of stacked experts in transformers: which stacks PEFT adapts, which are merged, and
why not. Slow: each compiles a model.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from torch.nn import functional as F

from falqon_fx.integrations.peft import trace_param_wrappers
from falqon_fx.model.stacks import is_experts
from tests import zoo
from tests.models import fill_b

pytestmark = pytest.mark.slow

FAMILIES = [name for name in zoo.families() if name not in zoo.LEFT_OUT]
SIMILAR = 0.99  # of the gradients of A and B, beside PEFT's: FP8 moves them by 3 to 6%


def adapted(name: str) -> Any:
    """A tiny model whose stacks PEFT adapts, in float32; skips what has none."""
    model: Any = zoo.build(name)
    experts = {path: m for path, m in model.named_modules() if is_experts(m)}
    stacks = {
        f"{path.rpartition('.')[2]}.{name}"
        for path, module in experts.items()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3
    }
    if not stacks:
        pytest.skip("no stacked experts that transformers' interface runs")
    model.set_experts_implementation("grouped_mm")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=sorted(stacks))
    model = peft.get_peft_model(model, config)
    fill_b(model, 0.05)
    return model


def stacks_of(model: Any) -> list[Any]:
    """PEFT's wrappers of stacked weights."""
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    return [m for m in wrappers if m.get_param().dim() == 3]


def gradients(model: Any, call: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Those of A and B of each stack."""
    model.zero_grad()
    call(**batch).loss.backward()
    layers = [part["default"] for m in stacks_of(model) for part in (m.lora_A, m.lora_B)]
    return [layer.weight.grad.flatten() for layer in layers]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name, graphs, record_property):
    model, batch = adapted(name), zoo.batch(name)
    twin = copy.deepcopy(model)
    theirs = gradients(twin, twin, batch)
    trace_param_wrappers(model)
    # Stacks alone: what FP8 in other layers moves may route a token of a tiny model elsewhere.
    paths = [path for path, module in model.named_modules() if module in stacks_of(model)]
    include = tuple(f"{path.replace('.base_layer', '')}.*" for path in paths)
    options = {"inner": "eager", "include": include}
    call = torch.compile(model, backend="falqon", options=options)
    ours = gradients(model, call, batch)
    merged = {site.path for report in graphs for site in report.sites if site.experts}
    reasons = {item.reason for report in graphs for item in (*report.rejected, *report.left)}
    similar = [float(F.cosine_similarity(a, b, 0)) for a, b in zip(ours, theirs, strict=True)]
    wanted = len(stacks_of(model))
    print(
        f"\nzoo of experts: {name}: {len(merged)} of {wanted} stacks merged, {len(graphs)} graphs, "
        f"least similar gradient {min(similar):.4f}; {sorted(reasons)}"
    )
    record_property("merged", len(merged))
    assert len(merged) == wanted, reasons
    assert min(similar) > SIMILAR
