"""What the tiny configs of the zoo are made of: sizes by name, and what a family needs beyond."""

from __future__ import annotations

from typing import Any

import transformers

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
CONFIGS: dict[str, Any] = {
    "musicgen": transformers.models.musicgen.configuration_musicgen.MusicgenDecoderConfig,
    "musicgen_melody": (
        transformers.models.musicgen_melody.configuration_musicgen_melody.MusicgenMelodyDecoderConfig
    ),
}
CODEBOOKS = 2
OPTIONS["musicgen"] = OPTIONS["musicgen_melody"] = {"num_codebooks": CODEBOOKS}
