"""Decoder layers of transformers with PEFT's LoRA on each linear, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, Qwen3Config, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from falqon_fx import FalqonConfig
from falqon_fx.config import BaseDtype
from falqon_fx.integrations.peft import trace_param_wrappers
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.lora_layers import LinearLayer, linear_layers
from falqon_fx.site.base import Base
from falqon_fx.site.spec import SiteSpec

SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, as its config.json has them."""

    kind: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int = 128
    experts: int = 0
    top: int = 0
    expert_inner: int = 0


SHAPES = {
    "tiny": Shape("llama", 256, 512, 4, 4, 64),
    "llama-7b": Shape("llama", 4096, 11008, 32, 32),
    "llama-3-8b": Shape("llama", 4096, 14336, 32, 8),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 32, 8),
    "qwen3-30b-a3b": Shape("qwen3_moe", 2048, 6144, 32, 4, 128, 128, 8, 768),
}
_KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaDecoderLayer),
    "qwen3": (Qwen3Config, Qwen3DecoderLayer),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeDecoderLayer),
}


@dataclass(frozen=True)
class Adapter:
    """LoRA on every linear: its rank, the dtype of A and B, and whether A trains. ``bought``: ranks
    and channels of x that a calibration has added, None for a model that wasn't prepared; ``base``:
    what it was prepared in.
    """

    rank: int = 64
    dtype: torch.dtype = torch.float32
    train_a: bool = True
    bought: int | None = None
    base: BaseDtype = "fp8"


class Layers(nn.Module):
    """Decoder layers one after the other, without the embedding and the head."""

    def __init__(self, shape: Shape, layers: int) -> None:
        super().__init__()
        config, layer = _KINDS[shape.kind]
        sizes = config(
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head,
            num_hidden_layers=layers,
            vocab_size=32000,
            use_cache=False,
            attn_implementation=ATTENTION,
            experts_implementation="grouped_mm",
            **self._experts(shape),
        )
        self.layers = nn.ModuleList(layer(sizes, i) for i in range(layers))

    @staticmethod
    def _experts(shape: Shape) -> dict[str, int]:
        if not shape.experts:
            return {}
        return {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.top,
            "moe_intermediate_size": shape.expert_inner,
        }

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_embeddings=(cos, sin))
        return x


def build(shape: Shape, layers: int, adapter: Adapter) -> Layers:
    """The layers on the meta device: frozen bf16 weights, and the adapter."""
    with torch.device("meta"):
        model = Layers(shape, layers).to(torch.bfloat16)
        stacks = [f"experts.{name}" for name in ("gate_up_proj", "down_proj")]
        lora = LoraConfig(
            r=adapter.rank,
            lora_alpha=2 * adapter.rank,
            target_modules=SITES,
            target_parameters=stacks if shape.experts else None,
        )
        inject_adapter_in_model(lora, model)
        trace_param_wrappers(model)
    for name, parameter in model.named_parameters():
        of_a, of_b = (f".lora_{which}." in name for which in "AB")
        parameter.requires_grad_(of_b or (of_a and adapter.train_a))
        if of_a or of_b:
            parameter.data = parameter.data.to(adapter.dtype)
    if adapter.bought is not None:
        for layer in [*linear_layers(model)]:
            model.set_submodule(layer.path, _prepared(layer, adapter.bought, adapter.base))
    return model.train()


def _prepared(layer: LinearLayer, bought: int, dtype: BaseDtype) -> Fp8Linear:
    """What `falqon_fx.prepare` puts in the place of a layer, on the meta device."""
    out, features = layer.weight.shape

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    code = torch.int8 if dtype == "int8" else torch.uint8
    base = Base(empty(out, features, dtype=code), empty(out, 1, dtype=torch.float32))
    spec = str(SiteSpec.from_config(FalqonConfig(base_dtype=dtype)))
    made = Fp8Linear(base, None, torch.bfloat16, False, spec, layer.site)
    terms = {
        "error_a": empty(bought, features, dtype=torch.bfloat16),
        "error_b": empty(out, bought, dtype=torch.bfloat16),
        "channels": empty(bought, dtype=torch.int32),
        "columns": empty(out, bought, dtype=torch.bfloat16),
    }
    made.set_terms(terms if bought else {})
    return made


def inputs(shape: Shape, batch: int, length: int) -> tuple[Tensor, ...]:
    """x, which needs a gradient as it does behind another layer, and the position embeddings; on
    the meta device.
    """
    made: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    x = torch.empty(batch, length, shape.hidden, **made, requires_grad=True)
    return x, torch.empty(1, length, shape.head, **made), torch.empty(1, length, shape.head, **made)


def _flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What `scaled_dot_product_attention` becomes on a GPU for bf16 and a causal mask; a torch
    without CUDA would choose its CPU kernel.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    out = attention(query, key, value, 0.0, True, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


ATTENTION = "lens_flash"
AttentionInterface.register(ATTENTION, _flash)
