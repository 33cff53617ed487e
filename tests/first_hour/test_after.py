"""What a merged model becomes in other programs: GGUF, written with the `gguf` package under the
names that llama.cpp's script gives, and read again by transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import peft
import torch
import transformers
from torch import nn

import falqon_fx
from tests.models import fill_b

LAYERS, WORDS = 2, 64


def trained() -> nn.Module:
    """A Qwen2: GGUF keeps the order of its rows, unlike Llama's q and k."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = peft.get_peft_model(
        transformers.Qwen2ForCausalLM(config), peft.LoraConfig(r=4, target_modules="all-linear")
    )
    fill_b(model, 0.1)
    return model


def write_gguf(model: Any, file: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for path, tensor in model.state_dict().items():
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        assert name, path
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_merged_model_goes_into_gguf_and_says_the_same(tmp_path):
    """Of a prepared model, whose merged weights are dq(W) + s · B · A. In GGUF they are float32."""
    model, ids = trained(), torch.arange(3, 13)[None]
    falqon_fx.prepare(model, progress=False)
    merged = falqon_fx.merge_and_unload(model).eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    write_gguf(merged, tmp_path / "model.gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    assert read.config.num_hidden_layers == LAYERS
    with torch.no_grad():
        assert torch.equal(read.eval()(ids).logits, merged(ids).logits)
