"""NVFP4: W in four bits, with two levels of scales.

    W[i, j] ≈ C[i, j] · S[i, j // 16] · s

C is E2M1, one of ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}; S, one for 16 neighbours in a row, is E4M3 and not
negative; s is one float32 for all of W. For the largest magnitudes a of W and a_b of a block:

    s = a / (6 · 448)        S = q(a_b / (6 · s))        C = q(W / (S · s))

both to the nearest, ties to even. With scale="pow2" s is rounded up to a power of two. A value of C
· S has 2 + 4 significant bits at most and lies in [2⁻¹⁰, 2688], so it is exact in bfloat16, and C · S ·
2⁻¹⁴ in float16, where it is a multiple of the least number.

Packed W is uint8 [out, 9, in / 16], 0.5625 bytes a weight: of a row first its codes, two a byte, the
first in the lower half, then its block scales. By its three dimensions it is told from FP8's bytes.
Where others keep them apart:

| | codes [out, in / 2] | S [out, in / 16] | s |
|---|---|---|---|
| compressed-tensors, ``nvfp4-pack-quantized`` | ``weight_packed`` | ``weight_scale`` | 1 / ``weight_global_scale`` |
| ModelOpt, ``NVFP4`` | ``weight`` | ``weight_scale`` | ``weight_scale_2`` |

Sources: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149); ``NVFP4QTensor`` of
ModelOpt; ``compressors/nvfp4`` of compressed-tensors, whose S of a block that would get 0 is taken
over: 0.125, with codes that are 0.
"""  # noqa: E501

from __future__ import annotations

import torch
from torch import Tensor

from falqon_fx.config import Scale
from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.site.numerics import (
    E2M1,
    E4M3,
    LARGEST,
    amax_to_scale,
    decode_fp8,
    encode_fp8,
    round_to_fp8,
)

BLOCK = 16
_MAX = LARGEST[E2M1] * LARGEST[E4M3]
_LEAST = 2.0**-100  # of s: S · s stays a normal float32
_LEAST_BLOCK = 0.125


def is_packed(code: Tensor) -> bool:
    """Whether the bytes of a base weight are NVFP4."""
    return code.dim() == 3


def packed_shape(out: int, features: int) -> tuple[int, int, int]:
    """The shape of W [out, in], packed."""
    return (out, 9, features // BLOCK)


def shape_of(code: Tensor) -> tuple[int, int]:
    """[out, in] of the bytes of a base weight, packed or not."""
    out, *_, last = code.shape
    return (out, last * BLOCK) if is_packed(code) else (out, last)


def why_not(features: int) -> str | None:
    """Why rows of that many weights can't be packed."""
    if features % BLOCK == 0:
        return None
    return f"a row has {features} weights, and of NVFP4 {BLOCK} share a scale"


def joined(codes: Tensor, scales: Tensor) -> Tensor:
    """Packed W of bytes of codes [out, in / 2] and of block scales [out, in / 16]."""
    return torch.cat([codes, scales], 1).view(len(codes), 9, -1)


def block_scales(packed: Tensor) -> Tensor:
    """Bytes of block scales [out, in / 16]: a view."""
    return packed[:, 8]


def parted(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `joined`, both contiguous."""
    codes, scales = packed.split([8, 1], 1)
    return codes.flatten(1).contiguous(), scales.flatten(1).contiguous()


def tensor_scale(amax: Tensor, mode: Scale) -> Tensor:
    """s for the largest magnitude of W, float32 []."""
    if mode == "pow2":
        return amax_to_scale(amax.to(torch.float32) / 6, E4M3, mode).clamp(min=_LEAST)
    scale = amax.to(torch.float32) / _MAX
    return torch.where(amax == 0, 1.0, scale.clamp(min=_LEAST))


def divisor_for(amax: Tensor, mode: Scale) -> Tensor:
    """1 / s for the largest magnitude of W, as compressed-tensors has it, float32 []."""
    if mode == "pow2":
        return 1 / tensor_scale(amax, mode)
    divisor = (_MAX / amax.to(torch.float32)).clamp(max=1 / _LEAST)
    return torch.where(amax == 0, 1.0, divisor)


def divisor_of(scale: Tensor) -> Tensor:
    """The float32 whose reciprocal is s, or the nearest where none is."""
    near = 1 / scale
    for other in (near, near.nextafter(near * 2), near.nextafter(near / 2)):
        if bool(1 / other == scale):
            return other
    return near


def cast(weight: Tensor, scale: Tensor, divisor: Tensor | None = None) -> Tensor:
    """W [out, in], whose width is a multiple of 16, packed, with s. With ``divisor``, which is 1 /
    s, in the steps of compressed-tensors, which rounds elsewhere where s is no power of two.
    """
    out, features = weight.shape
    blocks = weight.to(torch.float32).reshape(out, features // BLOCK, BLOCK)
    largest, top = blocks.abs().amax(-1), LARGEST[E2M1]
    of_blocks = largest / (top * scale) if divisor is None else largest / top * divisor
    of_blocks = round_to_fp8(of_blocks, E4M3)
    of_blocks = torch.where(of_blocks == 0, _LEAST_BLOCK, of_blocks)
    step = of_blocks * scale if divisor is None else of_blocks / divisor
    scaled = blocks / step.unsqueeze(-1)
    value = round_to_fp8(scaled + 0.0, E2M1)  # -0 becomes 0; what is rounded to 0 keeps its sign
    low, high = _indices(value).view(out, features // 2, 2).unbind(-1)
    return joined(low | high << 4, encode_fp8(of_blocks, E4M3))


def rescaled(packed: Tensor, scale: Tensor, divisor: Tensor) -> Tensor | None:
    """The same numbers with 1 / ``divisor`` in the place of s; None where E4M3 has not all of the
    block scales that this takes.
    """
    if bool(divisor == divisor_of(scale)):
        return packed
    codes, scales = parted(packed)
    wanted = decode_fp8(scales, 1.0, torch.float32).double() * (scale.double() * divisor.double())
    of_blocks = round_to_fp8(wanted.to(torch.float32), E4M3)
    if not torch.equal(of_blocks.double(), wanted):
        return None
    return joined(codes, encode_fp8(of_blocks, E4M3))


def _indices(value: Tensor) -> Tensor:
    """The four bits of each E2M1 value, uint8."""
    twice = (value.abs() * 2).to(torch.int32)  # 0, 1, 2, 3, 4, 6, 8 or 12
    size = torch.where(twice > 4, twice // 2 + 2 - twice // 12, twice)
    return size.to(torch.uint8) | torch.signbit(value).to(torch.uint8) << 3


def values(codes: Tensor) -> Tensor:
    """C, float32 [out, in], of its bytes [out, in / 2]: exponent and fraction of both halves in
    their place of a float16, whose exponent bias is 14 more.
    """
    halves = 4 * torch.arange(2, dtype=torch.int16, device=codes.device)
    code = codes.to(torch.int16).unsqueeze(-1) >> halves
    bits = (code & 7) << 9 | (code & 8) << 12
    return (bits.view(torch.float16).to(torch.float32) * 2.0**14).flatten(1)


def decode(
    packed: Tensor, scale: Tensor | float, dtype: torch.dtype, to: Tensor | None = None
) -> Tensor:
    """C · (S · s) [out, in] in ``dtype``, computed in float32, into ``to`` where that is given;
    exact in bfloat16 where s is a power of two.
    """
    compiled = cpu.decode_nvfp4(packed, scale, dtype, to)
    if compiled is not None:
        return compiled
    codes, scales = parted(packed)
    factor = decode_fp8(scales, scale, torch.float32)
    value = (values(codes).view(*factor.shape, BLOCK) * factor.unsqueeze(-1)).flatten(1)
    return value.to(dtype) if to is None else to.copy_(value)
