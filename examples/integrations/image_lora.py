"""LoRA on the attention of an image model, as diffusers' train_text_to_image_lora.py (0.42) has it.

    python examples/integrations/image_lora.py [--model FOLDER] [--steps 20] [--out lora]

FOLDER is one of a UNet2DConditionModel; without it the UNet is a small random one. In diffusers'
script, the two lines with falqon_fx go where it calls `unet.add_adapter`, and after it. The folder
`lora` gets the adapter twice: as diffusers names a UNet's layers, and for ComfyUI, which skips
those names, as kohya's scripts do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

import falqon_fx

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
}


def main() -> list[float]:
    """Train; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="lora")
    args = parser.parse_args()
    torch.manual_seed(0)
    known = UNet2DConditionModel.from_pretrained(args.model) if args.model else None
    unet: Any = known or UNet2DConditionModel(**SMALL)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    falqon_fx.prepare(unet)  # optional: frees the base weights
    unet.compile(backend="falqon")
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3)
    scheduler, losses = DDPMScheduler(), []
    size = unet.config.sample_size
    latents, texts = (
        torch.randn(4, 4, size, size),
        torch.randn(4, 77, unet.config.cross_attention_dim),
    )
    for step in range(args.steps):  # yours come from a VAE and a text encoder
        noise, times = torch.randn_like(latents), torch.randint(1000, (4,))
        noisy = scheduler.add_noise(latents, noise, times)
        loss = (unet(noisy, times, texts).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(step, losses[-1])
    adapter = get_peft_model_state_dict(unet)
    named = convert_state_dict_to_diffusers(adapter)
    StableDiffusionPipeline.save_lora_weights(args.out, unet_lora_layers=named)
    kohya = convert_state_dict_to_kohya({f"unet.{name}": each for name, each in adapter.items()})
    save_file(kohya, Path(args.out, "comfyui.safetensors"))  # with alpha = r, PEFT's scaling of 1
    return losses


if __name__ == "__main__":
    main()
