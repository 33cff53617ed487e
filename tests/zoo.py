"""The zoo: every decoder family of transformers, tiny, with LoRA on all linear layers.

``families()`` is transformers' own list of causal language models, one name a model class. What a
family needs beyond `TINY` stands in `OPTIONS`; what no test can train stands in `LEFT_OUT` with the
reason. All models are built from their configs, without any download.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from falqon_fx.integrations.peft import trace_param_wrappers

TOKENS = (2, 8)  # batch, length

# Sizes by the names that configs have for them.
_SIZES = {
    32: "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim embed_dim dim_model",
    48: "intermediate_size ffn_dim ffn_hidden_size n_inner d_inner encoder_ffn_dim decoder_ffn_dim "
    "d_ff dim_ff dff moe_intermediate_size shared_expert_intermediate_size attention_hidden_size "
    "intermediate_size_mlp",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers num_key_value_heads num_kv_heads num_experts_per_tok "
    "num_experts_per_token moe_topk top_k_experts moe_k eos_token_id",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads attention_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts",
    8: "head_dim kv_channels attention_head_dim dim_head qk_rope_head_dim qk_nope_head_dim "
    "v_head_dim",
    16: "q_lora_rank kv_lora_rank qk_head_dim",
    1: "n_group topk_group first_k_dense_replace bos_token_id",
    64: "vocab_size max_position_embeddings n_positions n_ctx max_seq_len seq_length "
    "max_target_positions max_source_positions",
    0: "pad_token_id",
}
TINY: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
TINY["use_cache"] = False

# Multi-head latent attention has one key and one value head per query head.
_WITH_LATENT_ATTENTION = (
    "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa "
    "kimi_linear longcat_flash minicpm3 sarvam_mla youtu"
)
_LATENT = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
_BLT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# A norm's gradient goes with one over the size of what it normalizes. Here some of that is nearly
# zero: what few untrained units with small weights make of one token.
_NORM = {"rms_norm_eps": 1e-2}
# Gemma 4 does not divide scores by sqrt(head_dim), for which trained norms of q and k make up;
# without these, more than a few dimensions make softmax pick one token, and a rounding another.
_GEMMA4 = {"head_dim": 4, "global_head_dim": 4, **_NORM}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]

OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_WITH_LATENT_ATTENTION.split(), _LATENT),
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "beam": _NORM,
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "patcher_config": _BLT,
        "encoder_config": {**_BLT, "hidden_size_global": 32},
        "decoder_config": {**_BLT, "hidden_size_global": 32},
        "global_config": _BLT,
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "cpmant": {"init_std": 0.02},  # its default of 1 makes softmax pick one token, as Gemma 4's
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48},
    },
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8},
    "dots1": {"layer_types": None, "max_window_layers": 2, "n_shared_experts": 1},
    "dots3_note_text": {**_LATENT, "head_dim": 16, "per_layer_config": {}},
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        **_NORM,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        **_GEMMA4,
    },
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "git": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **_MAMBA},
    "lara_mini": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 3},
    "mamba2": {"num_heads": 8},
    "prophetnet": {"num_hidden_layers": None, "num_layers": None},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "ple_embed_dim": 16,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [2, 4],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "shape_vocab_size": 64,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "xlnet": {"max_position_embeddings": None, "d_head": 8},
    "xlstm": {"norm_eps": 1e-2},  # of its memory, which holds nearly nothing at first (see _NORM)
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layer_types": _HYBRID,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layer_types": _HYBRID,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_d_state": 8,
        "chunk_size": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# These map their composite config to a model that takes the config of the decoder alone.
_CONFIGS: dict[str, Any] = {
    "musicgen": transformers.models.musicgen.configuration_musicgen.MusicgenDecoderConfig,
    "musicgen_melody": (
        transformers.models.musicgen_melody.configuration_musicgen_melody.MusicgenMelodyDecoderConfig
    ),
}
_CODEBOOKS = 2
OPTIONS["musicgen"] = OPTIONS["musicgen_melody"] = {"num_codebooks": _CODEBOOKS}

# What PEFT itself can't adapt with target_modules="all-linear", and the error that says so.
PEFT_CANNOT = {
    **dict.fromkeys(
        ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"),
        "is incompatible with Mamba-based models",
    ),
    # A subclass of nn.Linear that returns a tuple, or that multiplies groups.
    **dict.fromkeys(("llama4_text", "phimoe"), "'tuple' object has no attribute 'dtype'"),
    "deepseek_v4": "must match the size of tensor b",
}

# Steps until nothing compiles any more, where more than one. In their first step Dynamo gives up on
# transformers' deprecate_kwarg, since one of the functions that share its code breaks the graph in
# a loop; in the second another of them, which makes the mask, compiles by itself.
WARM_UP = dict.fromkeys(("minimax", "qwen3_next", "qwen4_exp_text"), 2)

# What the zoo does not train, and why.
LEFT_OUT = {
    "gemma3n": "its decoder is gemma3n_text; its vision tower has no tiny config",
    "gemma4": "its decoder is gemma4_text; its vision tower has no tiny config",
    "gemma4_assistant": "a draft head: runs on the hidden states and caches of another model",
    "gemma4_unified_assistant": "a draft head, as gemma4_assistant",
    "reformer": "draws seeds of its own, so no two runs are alike",
    "recurrent_gemma": "keeps values of a forward pass, so no copy of it can be made to emulate",
}


def families() -> dict[str, str]:
    """Transformers' causal language models: the first name of each model class. Nothing of them is
    imported.
    """
    found: dict[str, str] = {}
    for name, model in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name == "gpt-sw3":  # another name of gpt2
            continue
        model = model[0] if isinstance(model, tuple | list) else model
        # Of a text model and the multimodal one around it, the text model has all options at hand.
        if model not in found or name.endswith("_text"):
            found[model] = name
    return {name: model for model, name in sorted(found.items(), key=lambda pair: pair[1])}


def build(name: str) -> nn.Module:
    """A tiny model of a family in float32, without LoRA; the same weights each time."""
    cls: Any = _CONFIGS.get(name) or CONFIG_MAPPING[name]
    config = cls(**_options(cls, OPTIONS.get(name, {})))
    config._attn_implementation = "eager"  # sdpa takes another path when traced
    config.loss_type = "ForCausalLM"  # else a warning about it breaks the graph
    config._experts_implementation = "batched_mm"  # others have shapes that depend on the data
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    family: Any = getattr(transformers, families()[name])
    make = family._from_config if name in _CONFIGS else _from_config
    with torch.device("meta"):
        parameters = sum(p.numel() for p in make(config).parameters())
    if parameters > 10_000_000:
        raise ValueError(f"{name} has {parameters} parameters: it needs sizes of its own")
    torch.manual_seed(0)
    model: nn.Module = make(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):  # most are zero at first
                parameter.normal_(std=0.05)
    return model


def _from_config(config: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(config)


def _options(cls: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `TINY` that a config class has, two layers of its layer types, and its own."""
    default = cls()
    options = {name: value for name, value in TINY.items() if _takes(default, name)}
    for sub in getattr(cls, "sub_configs", None) or {}:
        part = getattr(default, sub, None)
        if part is not None:
            options[sub] = {name: value for name, value in TINY.items() if _takes(part, name)}
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(default, name, None), list) and _takes(default, name):
            kinds = list(dict.fromkeys(getattr(default, name)))
            options[name] = (2 * kinds)[:2] if len(kinds) <= 2 else kinds
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(options.get(name), dict):
            options[name].update(value)
        elif value is None:
            options.pop(name, None)
        else:
            options[name] = value
    return options


def _takes(config: Any, name: str) -> bool:
    """Whether a config has an attribute that can be set."""
    cls = type(config)
    name = (cls.attribute_map or {}).get(name, name)
    attribute = inspect.getattr_static(cls, name, None)
    if isinstance(attribute, property) and attribute.fset is None:
        return False
    return name in config.__dict__ or name in getattr(cls, "__dataclass_fields__", {})


def batch(name: str) -> dict[str, torch.Tensor]:
    """A call that returns logits and a loss."""
    generator = torch.Generator().manual_seed(1)
    streams = _CODEBOOKS if name.startswith("musicgen") else 1
    ids = torch.randint(3, 64, (TOKENS[0] * streams, TOKENS[1]), generator=generator)
    if streams > 1:
        return {"input_ids": ids}
    extra = {"pixel_values": torch.randn(TOKENS[0], 3, 32, 32)} if name == "git" else {}
    return {"input_ids": ids, "labels": ids, **extra}


def adapt(model: nn.Module, **lora: Any) -> nn.Module:
    """LoRA of rank 4 on all linear layers."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
    trace_param_wrappers(adapted)
    return adapted


# -- encoders, speech, vision, diffusion -----------------------------------------------------------

_Made = tuple[nn.Module, dict[str, torch.Tensor]]


def _made(model: type[Any], config: Any, **inputs: torch.Tensor) -> _Made:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    return model(config), inputs


def _ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, TOKENS, generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _text_encoder(name: str) -> _Made:
    config: Any = CONFIG_MAPPING[name]
    model = getattr(transformers, {"bert": "Bert", "roberta": "Roberta"}[name] + "ForMaskedLM")
    return _made(model, config(**_options(config, {})), input_ids=_ids(), labels=_ids())


_IMAGES = {"image_size": 16, "patch_size": 8}


def _vit() -> _Made:
    config = transformers.ViTConfig(**_options(transformers.ViTConfig, _IMAGES))
    return _made(transformers.ViTForImageClassification, config, pixel_values=_noise(2, 3, 16, 16))


def _t5() -> _Made:
    config = transformers.T5Config(**_options(transformers.T5Config, {"d_kv": 8}))
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration
    return _made(model, config, input_ids=_ids(), labels=_ids(2))


def _whisper() -> _Made:
    own = {"max_source_positions": 8, "num_mel_bins": 8, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**_options(transformers.WhisperConfig, own))
    model = transformers.WhisperForConditionalGeneration
    return _made(model, config, input_features=_noise(2, 8, 16), labels=_ids())


def _clip() -> _Made:
    parts = {
        "text_config": _options(transformers.CLIPTextConfig, {"projection_dim": 16}),
        "vision_config": _options(transformers.CLIPVisionConfig, _IMAGES),
    }
    config = transformers.CLIPConfig(**parts, projection_dim=16)
    inputs = {"input_ids": _ids(), "pixel_values": _noise(2, 3, 16, 16)}
    return _made(transformers.CLIPModel, config, **inputs)


def _diffusion_transformer() -> _Made:
    diffusers: Any = importlib.import_module("diffusers")  # its classes have no base for mypy

    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        use_additional_conditions=False,
    )
    for parameter in model.parameters():
        if not parameter.any():  # its last layers start at zero
            nn.init.normal_(parameter, std=0.05)
    return model, {
        "hidden_states": _noise(2, 4, 8, 8),
        "encoder_hidden_states": _noise(2, 5, 16),
        "timestep": torch.tensor([3, 7]),
    }


OTHERS: dict[str, Callable[[], _Made]] = {
    "bert": functools.partial(_text_encoder, "bert"),
    "roberta": functools.partial(_text_encoder, "roberta"),
    "vit": _vit,
    "t5": _t5,
    "whisper": _whisper,
    "clip": _clip,
    "diffusion transformer": _diffusion_transformer,
}
