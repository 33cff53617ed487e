from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.report.kernels import candidates, choose, source
from tests.models import LoraLinear

pytest.importorskip("triton")


def site(layer: nn.Module | None = None, **options: Any) -> falqon_fx.Site:
    config = FalqonConfig(**options)
    layer = layer or LoraLinear(64, 96, dtype=torch.bfloat16)
    (found,) = falqon_fx.explain(layer, torch.randn(8, 64).bfloat16(), config=config).sites
    return found


@pytest.mark.parametrize(
    ("card", "architecture"),
    [("RTX 4090", 89), ("L40S", 89), ("H100", 90), ("H200", 90), ("B200", 100), ("RTX 5090", 120)],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_card_with_fp8_gets_a_generated_kernel_and_its_source(card, architecture, frozen):
    layer = nn.Linear(64, 96, dtype=torch.bfloat16).requires_grad_(False) if frozen else None
    found = site(layer, card=card)
    assert found.architecture == architecture
    assert found.kernel == f"triton:{candidates(found)[0].name}"
    assert ("_r16_" in found.kernel) != frozen  # the term O_A · bᵀ
    assert f"sm_{architecture}" in found.kernel_reason
    assert found.cost is not None
    assert found.cost.variant == "merged"
    text = source(found)
    assert "@triton.jit" in text
    ast.parse(text)


@pytest.mark.parametrize("kernel", ["scaled_mm", "inductor"])
def test_a_kernel_that_is_asked_for_is_named(kernel):
    found = site(card="H100", kernel=kernel)
    assert (found.kernel, found.kernel_reason) == (kernel, f"kernel={kernel!r} asks for it")
    assert source(found) == f"# {kernel}: torch's own product"


@pytest.mark.parametrize(
    "options", [{}, {"card": "MI300X"}, {"card": "H100", "kernel": "dequantize"}]
)
def test_without_fp8_kernels_it_is_aten(options):
    found = site(**options)
    assert (found.architecture, found.kernel) == (0, "aten")
    assert found.cost is None or found.cost.variant == "emulated"
    assert choose(found) == (found.kernel, found.kernel_reason)
    assert "def merged_linear(" in source(found)
