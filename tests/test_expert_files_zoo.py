"""Checkpoints of every family of stacked experts: read by `prequantize`, written by `save_fp8` and
read again. Slow: each is a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.files.expert_parts import parts_of, stacks_of
from falqon_fx.integrations.peft import trace_param_wrappers
from falqon_fx.model.stacks import Fp8Stack
from tests import zoo
from tests.emulation import E4M3, cast
from tests.experts_zoo import FAMILIES, stacks_in

pytestmark = pytest.mark.slow


# What transformers cuts off of a vocabulary is more than these tiny ones have.
NOT_LOADED = ("inkling2_loop_text", "inkling2_text")


@pytest.fixture
def family(request, tmp_path) -> tuple[Any, dict[str, Tensor]]:
    """A model in bfloat16 that has its checkpoint in a folder, and its stacks by name."""
    if request.param in NOT_LOADED:
        pytest.skip("transformers can't load what it saves")
    model: Any = zoo.build(request.param).to(torch.bfloat16)
    stacks = {f"{path}.{n}": None for path, names in stacks_in(model).items() for n in names}
    if not stacks:
        pytest.skip("no stacked experts that transformers' interface runs")
    model.save_pretrained(tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )
    return model, {name: model.get_parameter(name).detach() for name in stacks}


def lora(stacks: Iterable[str]) -> peft.LoraConfig:
    targets = sorted({".".join(name.split(".")[-2:]) for name in stacks})
    return peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)


def quantized(model: Any, name: str, weight: Tensor) -> Tensor:
    """dq(q(W)) of a stack, one scale a row [.., out, in], in the layout that it has."""
    turned = model.get_submodule(name.rpartition(".")[0]).is_transposed
    rows = (weight.mT if turned else weight).float()
    code, scale = cast(rows.flatten(0, 1), E4M3, True, True)
    wide = (code.float() * scale).view(rows.shape)
    return (wide.mT if turned else wide).to(weight.dtype)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_a_checkpoint_is_prequantized_and_loaded(family, tmp_path):
    model, stacks = family
    falqon_fx.prequantize(tmp_path / "source", tmp_path / "out", lora(stacks), progress=False)
    loaded: Any = falqon_fx.load(tmp_path / "out")
    found = {
        n.replace(".base_layer", "").removeprefix("base_model.model.").removesuffix("_fp8"): m
        for n, m in loaded.named_modules()
        if isinstance(m, Fp8Stack)
    }
    assert found.keys() == stacks.keys()
    for name, weight in stacks.items():
        assert torch.equal(found[name].dequantized(), quantized(model, name, weight))


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_an_export_is_what_transformers_loads(family, tmp_path):
    model, stacks = family
    plain = parts_of(model, stacks_of(model)).keys()
    expected = {name: quantized(model, name, weight) for name, weight in stacks.items()}
    adapted: Any = peft.get_peft_model(model, lora(stacks))
    trace_param_wrappers(adapted)
    report = falqon_fx.prepare(adapted, progress=False)
    assert {name.removeprefix("base_model.model.") for name in report.prepared} >= stacks.keys()
    if not plain and len(report.prepared) == len(stacks):
        with pytest.raises(FalqonError, match=r"no (other )?layer of the model"):
            falqon_fx.save_fp8(adapted, tmp_path / "out", progress=False)
        return
    written = falqon_fx.save_fp8(adapted, tmp_path / "out", progress=False)
    assert plain <= set(written.layers)
    assert (stacks.keys() - plain).isdisjoint(written.layers)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=config
    )
    for name in stacks:
        assert torch.equal(loaded.get_parameter(name), expected[name]), name
