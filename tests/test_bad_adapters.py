"""NaN and Inf in an adapter get into no merged weight and no exported file."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from tests.models import fill_b, freeze_a, tiny_llama
from tests.parameters import PREPARED_OR_NOT, each_pair

IDS = torch.arange(12).view(2, 6)
PATH = "model.layers.1.self_attn.q_proj"
PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])


def made(update: str, prepared: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_llama(dtype, target_modules=["q_proj", "v_proj"])
    options = {"update": "rows", "topk": "all"} if update == "rows" else {}
    config = FalqonConfig(**options, inner="eager")
    if update == "rows":
        freeze_a(model)
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    else:
        with torch.no_grad():
            torch.compile(model, backend="falqon", options=dict[str, Any](config=config))(IDS)
    fill_b(model, 0.05)
    return model


def merged(model: nn.Module, folder: Path) -> Any:
    return falqon_fx.merge_and_unload(model)


def saved(model: nn.Module, folder: Path) -> Any:
    return falqon_fx.save_fp8(model, folder / "out", progress=False)


MERGES = pytest.mark.parametrize("merge", [merged, saved])


def refused(merge: Callable[..., Any], model: nn.Module, folder: Path, problem: str) -> None:
    """By name, with nothing changed and nothing written."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(FalqonError, match=problem) as no:
        merge(model, folder)
    assert no.value.site == PATH
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert not any(folder.iterdir())


def spoil(tensor: Tensor, *values: float) -> None:
    with torch.no_grad():
        for i, value in enumerate(values):
            tensor.view(-1)[7 * i] = value


@each_pair(
    merge=[merged, saved],
    update=["adapter", "rows"],
    prepared=PREPARED_OR_NOT,
    part=["lora_A", "lora_B"],
)
def test_nan_and_inf_in_an_adapter_are_refused_and_counted(tmp_path, merge, update, prepared, part):
    model = made(update, prepared)
    weight = getattr(model.base_model.model.get_submodule(PATH), part)["default"].weight
    spoil(weight, float("nan"), float("inf"), -float("inf"))
    refused(merge, model, tmp_path, rf"3 of 128 elements of its {part} hold NaN or Inf\.")


@MERGES
def test_both_parts_and_other_layers_are_counted_too(tmp_path, merge):
    model = made("adapter", True)
    layer: Any = model.base_model.model.get_submodule(PATH)
    spoil(layer.lora_A["default"].weight, float("nan"))
    for path in (PATH, PATH.replace("layers.1", "layers.0")):
        spoil(model.base_model.model.get_submodule(path).lora_B["default"].weight, float("inf"))
    with pytest.raises(FalqonError, match=r"layers.0.self_attn.q_proj: 1 of 128 .* 1 other layers"):
        merge(model, tmp_path)


@MERGES
def test_an_adapter_that_is_not_active_may_hold_anything(tmp_path, merge):
    model = made("adapter", True)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model.add_adapter("broken", lora)
    spoil(model.base_model.model.get_submodule(PATH).lora_B["broken"].weight, float("nan"))
    merge(model, tmp_path)


@MERGES
@PREPARED
def test_a_sum_beyond_the_range_of_the_weights_dtype_is_refused(tmp_path, merge, prepared):
    """A and B are finite, W + s · B · A is not, in float16."""
    model = made("adapter", prepared, torch.float16)
    layer: Any = model.base_model.model.get_submodule(PATH)
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(300.0)
        layer.lora_B["default"].weight.fill_(0.0)
        layer.lora_B["default"].weight[2] = 300.0
    refused(
        merge,
        model,
        tmp_path,
        "32 of 1024 elements of its weight would be NaN or Inf in torch.float16"
        if merge is merged
        else "its merged weight exceeds 65536",
    )


def test_what_is_almost_too_large_is_merged():
    """The bound is not reached by any element: then they are looked at."""
    model = made("adapter", True, torch.float16)
    layer: Any = model.base_model.model.get_submodule(PATH)
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()
        layer.lora_A["default"].weight[0] = 150.0
        layer.lora_B["default"].weight.zero_()
        layer.lora_B["default"].weight[2, 0] = 150.0  # 2 · 150 · 150 = 45000
        layer.lora_B["default"].weight[3, 1] = 300.0  # times a row of zeros
    weight = falqon_fx.merge_and_unload(model).get_submodule(PATH).weight
    assert weight.isfinite().all()
    assert weight[2].abs().min() > 40000


def test_embeddings_and_layers_without_an_fp8_form_are_looked_at_too(tmp_path):
    torch.manual_seed(0)
    model = tiny_llama(target_modules=["q_proj", "embed_tokens"])
    falqon_fx.prepare(model, FalqonConfig(inner="eager"), progress=False)
    spoil(model.base_model.model.model.embed_tokens.lora_embedding_B["default"], float("nan"))
    problem = re.escape("model.embed_tokens: 1 of 128 elements of its lora_embedding_B hold NaN")
    for merge in (merged, saved):
        with pytest.raises(FalqonError, match=problem):
            merge(copy.deepcopy(model), tmp_path)
