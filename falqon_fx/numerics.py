"""FP8 numerics: amax to scale, cast, dequantize, and the error bounds that the tests use.

Every function is a composition of ATen ops, so that the same code is the CPU reference, the fake
implementation and the decomposition that Inductor fuses. ``scale`` always multiplies on
dequantize: ``x ≈ q * scale``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}
# (mantissa bits kept, smallest normal, spacing of the subnormals)
_LAYOUT = {E4M3: (3, 2.0**-6, 2.0**-9), E5M2: (2, 2.0**-14, 2.0**-16)}
_TINY = 2.0**-126  # smallest normal float32: 1 / scale stays finite

ScaleMode = Literal["amax", "pow2"]


def amax_to_scale(amax: Tensor, dtype: torch.dtype, mode: ScaleMode) -> Tensor:
    """Scale of a group whose largest magnitude is ``amax``: ``amax / fp8_max``, float32.

    ``mode="pow2"`` rounds it up to a power of two, which makes scaling exact in any binary float.
    A group of zeros gets scale 1. A NaN or Inf amax gives a NaN or Inf scale, so that it stays
    visible in the result.
    """
    amax = amax.to(torch.float32)
    scale = (amax * (1.0 / FP8_MAX[dtype])).clamp(min=_TINY)
    if mode == "pow2":
        # Round the significand up: add (2**23 - 1) ulps, then drop the fraction bits.
        bits = scale.view(torch.int32)
        rounded = ((bits + 0x7FFFFF) & -0x800000).view(torch.float32)
        scale = torch.where(amax < float("inf"), rounded, scale)
    return torch.where(amax == 0, 1.0, scale)


def round_to_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``x`` to the nearest FP8 value, ties to even, as float32.

    Saturates beyond ``fp8_max``; NaN stays NaN. Equal to ``x.clamp(-max, max).to(dtype).float()``,
    in eight float operations that vectorise: torch's own FP8 casts, and bit casts under Inductor,
    are scalar loops on CPU.

    Adding a number M with 2**23 times the wanted spacing as its leading bit makes the FPU round at
    that spacing; subtracting M again is exact. M follows the magnitude of ``x``, first cut to 12
    bits so that it is an even multiple of the spacing (ties to even), and is at least the M of the
    subnormals.
    """
    mantissa, _, spacing = _LAYOUT[dtype]
    magnitude = x.abs().clamp(max=FP8_MAX[dtype])
    wide = magnitude * 2.0**12
    leading = (wide + magnitude) - wide
    shift = (leading * 2.0 ** (23 - mantissa)).clamp(min=2.0**23 * spacing)
    return torch.copysign((shift + magnitude) - shift, x)


def encode_fp8(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (uint8) of float32 tensors that already hold FP8 values (see `round_to_fp8`)."""
    mantissa, min_normal, spacing = _LAYOUT[dtype]
    drop = 23 - mantissa
    bits = value.view(torch.int32)
    sign = (bits >> 24) & 0x80
    magnitude = value.abs()
    # Exponent bias moves from 127 to the FP8 bias: the exponent field of min_normal becomes 1.
    field = 127 + math.frexp(min_normal)[1] - 1
    normal = ((bits & 0x7FFFFFFF) >> drop) - ((field - 1) << mantissa)
    subnormal = (magnitude * (1.0 / spacing)).to(torch.int32)
    code = torch.where(magnitude < min_normal, subnormal, normal)
    code = torch.where(value != value, 0x7F, code)
    return (code | sign).to(torch.uint8)


def decode_fp8(code: Tensor, scale: Tensor | float, out_dtype: torch.dtype) -> Tensor:
    """``value(code) * scale`` of E4M3 bytes (uint8), computed in float32, in ``out_dtype``.

    Exact in bfloat16 when ``scale`` is a power of two. No bit casts (see `round_to_fp8`): the four
    exponent bits select the factors 2, 4, 16 and 256. NaN never occurs in a merged weight, so its
    code is not looked at.
    """
    wide = code.to(torch.int32)

    def bit(mask: int) -> Tensor:
        return (wide & mask).to(torch.float32) * (1.0 / mask)

    power = (1 + bit(8)) * (1 + 3 * bit(16)) * (1 + 15 * bit(32)) * (1 + 255 * bit(64))
    fraction = (wide & 7).to(torch.float32)
    magnitude = torch.where((wide & 0x78) == 0, fraction * 2, (fraction + 8) * power)
    signed = magnitude * (1 - 2 * bit(128))
    return (signed * (scale * 2.0**-10)).to(out_dtype)


def round_to_fp8_stochastic(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``x`` to one of its two FP8 neighbours, the upper with probability
    ``frac`` = its distance from the lower in units of their gap (to 2**-16), as float32.

    ``random`` holds integers in [0, 2**16), one an element (see `philox_uint16`). A value that FP8
    holds exactly never moves. Saturates; NaN stays NaN.
    """
    mantissa, _, spacing = _LAYOUT[dtype]
    x = x.clamp(-FP8_MAX[dtype], FP8_MAX[dtype])
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2**floor(log2|x|)
    gap = (power * 2.0**-mantissa).clamp(min=spacing)
    steps = (x.abs() / gap + random.to(torch.float32) * 2.0**-16).floor()
    value = torch.copysign(steps * gap, x)
    return torch.where(x != x, x, value)


_PHILOX_ROUND = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def philox_uint16(row: Tensor, columns: int, step: Tensor, site: Tensor, seed: int) -> Tensor:
    """Random integers in [0, 2**16) for rows of a weight, int64 [..., columns].

    Philox-4x32-10 with key ``seed`` (64 bits) and counter (column // 8, row, step, site); the eight
    halves of the four words it yields, low half first, belong to eight neighbouring columns.
    ``row``, ``step`` and ``site`` are int64 and broadcast against each other, shape [...]. The same
    stream as Triton's ``tl.philox`` (Salmon et al., SC'11).
    """
    block = torch.arange((columns + 7) // 8, device=row.device)
    c0, c1, c2, c3 = torch.broadcast_tensors(
        block, row.unsqueeze(-1), step.unsqueeze(-1), site.unsqueeze(-1)
    )
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # A 32x32-bit product wraps int64's sign but keeps its 64 bits: shift, then mask.
        p0, p1 = c0 * _PHILOX_ROUND[0], c2 * _PHILOX_ROUND[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _PHILOX_KEY[0]) & _MASK32, (k1 + _PHILOX_KEY[1]) & _MASK32
    words = torch.stack((c0, c1, c2, c3), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return halves.flatten(start_dim=-3)[..., :columns]
