"""Models that are exported, and what is read back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.site.base import Base
from falqon_fx.site.numerics import E4M3
from tests.models import fill_b, freeze_a
from tests.tolerances import assert_within, fp8_cast_bound, gamma

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


F32, BF16 = torch.float32, torch.bfloat16
IDS = torch.arange(12).view(2, 6)


def wide_llama(**lora: Any) -> nn.Module:
    """Two layers of Llama whose linear layers are large enough to run in FP8 without an adapter."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora}
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(**options))


def in_fp8(model: nn.Module, prepared: bool, b_size: float = 0.05, **options: Any) -> nn.Module:
    """The model with its linear layers in FP8, and a trained B."""
    config = FalqonConfig(inner="eager", **options)
    _cast(model, prepared, config)
    if b_size:
        fill_b(model, b_size)
    return model.eval()


def _cast(model: nn.Module, prepared: bool, config: FalqonConfig) -> None:
    """By `prepare`, or by a call with the decoder layers, which share one graph, compiled, and with
    the head where it has an adapter.
    """
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
        return
    torch._dynamo.reset()
    llama = model.get_base_model()
    heads = [llama.lm_head] if hasattr(llama.lm_head, "lora_A") else []
    for part in (*llama.model.layers, *heads):
        part.compile(backend="falqon", options=dict[str, Any](config=config))
    with torch.no_grad():
        model(IDS)


def call(model: nn.Module, config: FalqonConfig) -> Any:
    """The compiled model, after one call."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    with torch.no_grad():
        compiled(IDS)
    return compiled


def by_rows(model: nn.Module, prepared: bool = True, **options: Any) -> nn.Module:
    """A model with update="rows" whose FP8 weights hold steps of B."""
    freeze_a(model)
    config = FalqonConfig(**{"update": "rows", "inner": "eager", **options})
    _cast(model, prepared, config)
    fill_b(model, 0.05)
    falqon_fx.flush(model)
    return model.eval()


def export(model: nn.Module, folder: Path, **arguments: Any) -> falqon_fx.ExportReport:
    return falqon_fx.save_fp8(model, folder / "out", progress=False, **arguments)


def read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted((folder / "out").glob("*.safetensors")):
        tensors |= safetensors.load_file(file)
    return tensors


def layers_in(folder: Path) -> dict[str, Base]:
    """The FP8 layers of an exported folder."""
    tensors = read(folder)
    paths = [name.removesuffix(".weight_scale") for name in tensors if "weight_scale" in name]
    return {
        path: Base(tensors[f"{path}.weight"].view(torch.uint8), tensors[f"{path}.weight_scale"])
        for path in paths
    }


def load(folder: Path, dtype: torch.dtype = F32, **arguments: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "out", dtype=dtype, **arguments
    ).eval()


def dense(folder: Path, dtype: torch.dtype = F32) -> nn.Module:
    """Loaded with all weights dequantized."""
    config = transformers.CompressedTensorsConfig(dequantize=True)
    return load(folder, dtype, quantization_config=config)


def sites(model: nn.Module) -> dict[str, Any]:
    """`falqon_fx.adapters` by the paths of the base model."""
    found = falqon_fx.adapters(model)
    return {path.removeprefix("base_model.model."): site for path, site in found.items()}


def merged_by_peft(model: nn.Module) -> nn.Module:
    """What PEFT's own merge makes of the model, with dq(W) where the base weights are freed."""
    plain = copy.deepcopy(model)
    falqon_fx.restore(plain)
    return plain.merge_and_unload()


def assert_one_cast_off(folder: Path, expected: nn.Module) -> None:
    """The exported layers are the expected weights [out, in], float32, within one cast to E4M3.

    The sum that is cast may be rounded in another order than PEFT's: each of W, and one product and
    one sum an adapter, is a float32 rounding (gamma_6 for two adapters), of values whose magnitudes
    add up to less than 4 of the largest in the row.
    """
    found = layers_in(folder)
    assert found
    for path, base in found.items():
        weight = expected.get_submodule(path).weight.detach()
        bound = fp8_cast_bound(weight, base.scale.double(), E4M3)
        bound = bound + gamma(6) * 4 * weight.abs().amax(1, keepdim=True).double()
        assert_within(base.dequantize(), weight, bound)


def lora_modules(model: nn.Module) -> list[tuple[str, Any]]:
    modules = model.get_base_model().named_modules()
    return [(path, module) for path, module in modules if hasattr(module, "lora_A")]
