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
from tests.zoo_options import CODEBOOKS, CONFIGS, OPTIONS, TINY

TOKENS = (2, 8)  # batch, length

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
    cls: Any = CONFIGS.get(name) or CONFIG_MAPPING[name]
    config = cls(**_options(cls, OPTIONS.get(name, {})))
    config._attn_implementation = "eager"  # sdpa takes another path when traced
    config.loss_type = "ForCausalLM"  # else a warning about it breaks the graph
    config._experts_implementation = "batched_mm"  # others have shapes that depend on the data
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    family: Any = getattr(transformers, families()[name])
    make = family._from_config if name in CONFIGS else _from_config
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
    streams = CODEBOOKS if name.startswith("musicgen") else 1
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
