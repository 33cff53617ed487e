"""What made the folder ``wrote`` beside it: NVIDIA's nvidia-modelopt 0.47.0 (PyPI), on a CPU. It
is no dependency of the tests: with what it requires it takes 200 MB.

    pip install nvidia-modelopt==0.47.0 && python tests/modelopt/write.py

``dense.safetensors`` has the weights that were cast: rows of different sizes, a row and blocks of
zeros, and blocks so small that their scales are subnormal or would be 0.
"""

from __future__ import annotations

from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    folder = Path(__file__).parent
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    weights = {n: p.detach() for n, p in model.named_parameters() if "_proj" in n}
    for weight in weights.values():
        weight.mul_(torch.randn(len(weight), 1).exp2())
        weight[3], weight[4, 16:] = 0, 0
        for row, exponent in enumerate((6, 12, 17, 19, 21, 24)):
            weight[5 + row, :16].mul_(2.0**-exponent)
    save_file({n: w.clone() for n, w in weights.items()}, folder / "dense.safetensors")
    ids = torch.arange(12).view(2, 6)
    model = mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda m: m(ids))
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder / "wrote")
    (folder / "wrote/generation_config.json").unlink()


if __name__ == "__main__":
    main()
