"""How NVIDIA's ModelOpt casts a weight to NVFP4, step by step, written apart from the library.

Its source: `NVFP4QTensor` in github.com/NVIDIA/Model-Optimizer at a2fbac7b,
modelopt/torch/quantization/qtensor/nvfp4_tensor.py (`get_weights_scaling_factor`, `quantize`,
`_cast_fp4`); the tensors' names and shapes: `_export_quantized_weight` in
modelopt/torch/export/unified_export_hf.py, and what these wrote, which is in ``wrote``.
"""

from __future__ import annotations

import torch
from torch import Tensor

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MIDDLE = (VALUES[1:] + VALUES[:-1]) / 2


def scale_of(weight: Tensor) -> Tensor:
    """``weight_scale_2``, float32 []."""
    return weight.abs().amax().float() / (6 * 448)


def cast(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [out, in / 2], uint8, and ``weight_scale`` [out, in / 16], E4M3, of W."""
    blocks = weight.float().unflatten(1, (-1, 16))
    of_blocks = blocks.abs().amax(-1) / (6 * scale)
    of_blocks = of_blocks.where(of_blocks > 0, 1.0).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
    scaled = (blocks / (of_blocks.float() * scale).unsqueeze(-1)).flatten(1)
    size = torch.bucketize(scaled.abs(), MIDDLE)  # the lower of two that are as near
    size += (scaled.abs().unsqueeze(-1) == MIDDLE[1::2]).any(-1)  # or the upper, if that is even
    code = (size | (scaled < 0) << 3).to(torch.uint8)
    return code[:, ::2] | code[:, 1::2] << 4, of_blocks


def decode(codes: Tensor, of_blocks: Tensor, scale: Tensor) -> Tensor:
    """W, float32 [out, in]."""
    code = torch.stack([codes & 15, codes >> 4], 2).flatten(1).int()
    value = VALUES[code & 7] * (1.0 - 2.0 * (code >> 3))
    return (value.unflatten(1, (-1, 16)) * (of_blocks.float() * scale).unsqueeze(-1)).flatten(1)
