"""FP8 numerics: amax to scale, cast, dequantize, and the error bounds that the tests use.

INT8 is one of the formats: its numbers up to ±127 are the subnormals of a float with 6 bits of
mantissa, all as far apart as those.

Every function is a composition of ATen ops, so that the same code is the CPU reference, the fake
implementation and the decomposition that Inductor fuses. ``scale`` always multiplies on
dequantize: ``x ≈ q * scale``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from falqon_fx.config import Scale
from falqon_fx.kernels.cpu import native as cpu

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
E2M1 = torch.float4_e2m1fn_x2  # two in a byte (`falqon_fx.site.nvfp4`)
FP8_DTYPES = {"e4m3": E4M3, "e5m2": E5M2}  # by their names in options and specs
FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}
INT8 = torch.int8
# What x and A are cast to, and W but for NVFP4, by the names in options and specs.
OPERANDS = {"fp8": E4M3, "int8": INT8, "nvfp4": E4M3}
LARGEST = {**FP8_MAX, INT8: 127.0, E2M1: 6.0}
# What is not beyond this is nearest to the largest FP8 number anyway.
ROUNDS_TO_MAX = {E5M2: 61440.0, E4M3: 464.0}
# (mantissa bits kept, smallest normal, spacing of the subnormals)
_LAYOUT = {
    E4M3: (3, 2.0**-6, 2.0**-9),
    E5M2: (2, 2.0**-14, 2.0**-16),
    E2M1: (1, 1.0, 0.5),
    INT8: (6, 64.0, 1.0),
}
# The largest number's significand, and what carries above it into the exponent of a float32.
_TOP = {E4M3: (1.75, 0x1FFFFF), E5M2: (1.75, 0x1FFFFF), INT8: (127 / 64, 0x1FFFF)}
_TINY = 2.0**-126  # smallest normal float32: 1 / scale stays finite
# Where autocast can be on. Dynamo of torch 2.11 breaks the graph at `is_autocast_available` itself.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)


def powers_of_two(scale: Tensor) -> bool:
    """Whether all scales are positive powers of two."""
    return bool((torch.frexp(scale.to(torch.float32)).mantissa == 0.5).all())


def dtype_name(dtype: torch.dtype) -> str:
    """The name in files, reports and specs: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Autocast off inside: an op's dtypes are its own. Autocast reaches into the kernel of a custom
    op and would run its float32 products in 16 bits, the update of W' among them.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        flat = (a for arg in args for a in (arg if isinstance(arg, list | tuple) else (arg,)))
        device = next((a.device.type for a in flat if isinstance(a, Tensor)), "meta")
        if not (device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def amax_to_scale(amax: Tensor, dtype: torch.dtype, mode: Scale) -> Tensor:
    """Scale of a group whose largest magnitude is ``amax``: ``amax / largest``, float32.

    ``mode="pow2"`` rounds it up to a power of two, which makes scaling exact in any binary float.
    A group of zeros gets scale 1. A NaN or Inf amax gives a NaN or Inf scale, so that it stays
    visible in the result.
    """
    amax = amax.to(torch.float32)
    if mode == "amax":
        scale = amax * (1.0 / LARGEST[dtype])
    else:
        # E4M3's largest is 1.75 * 2**k: what exceeds that significand carries into the exponent.
        top, carry = _TOP[dtype]
        wanted = amax * (top / LARGEST[dtype])
        power = ((wanted.view(torch.int32) + carry) & 0x7F800000).view(torch.float32)
        scale = torch.where(wanted < float("inf"), power, wanted)
    return torch.where(amax == 0, 1.0, scale.clamp(min=_TINY))


def round_to_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``x`` to the nearest value of a format, ties to even, as float32.

    Saturates beyond the largest; NaN stays NaN. Equal to ``x.clamp(-max, max).to(dtype).float()``.
    """
    return round_to_scaled_fp8(x.clamp(-LARGEST[dtype], LARGEST[dtype]), 1.0, dtype)


def round_to_scaled_fp8(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """``round_to_fp8(x / scale) * scale`` for a power of two that covers ``x``: |x| <= largest *
    scale < 2**107, as `amax_to_scale` gives it.

    Nine float operations that vectorise: torch's own FP8 casts, and bit casts under Inductor, are
    scalar loops on CPU. Adding a number M with 2**23 times the wanted spacing as its leading bit
    makes the FPU round at that spacing; subtracting M again is exact. M follows the magnitude of
    ``x``, first cut to 12 bits so that it is an even multiple of the spacing (ties to even), and is
    at least the M of the subnormals.
    """
    mantissa, _, spacing = _LAYOUT[dtype]
    eagerly = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if eagerly and (compiled := cpu.round_scaled(x, scale, mantissa, spacing)) is not None:
        return compiled
    magnitude = x.abs()
    wide = magnitude * 2.0**12
    leading = (wide + magnitude) - wide
    least = scale * (2.0**23 * spacing)
    shift = leading * 2.0 ** (23 - mantissa)
    shift = torch.maximum(shift, least) if isinstance(least, Tensor) else shift.clamp(min=least)
    return torch.copysign((shift + magnitude) - shift, x)


def encode_fp8(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of float32 tensors that already hold values of a format (see `round_to_fp8`): of FP8
    its bytes (uint8), of INT8 themselves. So the dtype of codes says what they are.
    """
    code = value.to(dtype)
    return code if dtype == INT8 else code.view(torch.uint8)


def decode_fp8(code: Tensor, scale: Tensor | float, out_dtype: torch.dtype) -> Tensor:
    """``value(code) * scale`` of an int8 or E4M3 tensor, or of the latter's bytes (uint8), in
    ``out_dtype``.

    Computed in float32; exact in bfloat16 when ``scale`` is a power of two. Under Inductor on CPU
    an E4M3 tensor is read by vector code, a cast from bytes inside the graph is not: hand E4M3 to
    what gets compiled, and bytes to what runs eagerly.
    """
    if code.dtype == torch.uint8 and code.device.type == "cpu":
        eagerly = not torch.compiler.is_compiling()
        if eagerly and (compiled := cpu.decode(code, scale, out_dtype)) is not None:
            return compiled
        # Five times as fast as the loop by which torch itself casts FP8.
        table = (
            torch.arange(256, dtype=torch.uint8, device=code.device).view(E4M3).to(torch.float32)
        )
        value = table.index_select(0, code.flatten().to(torch.int32)).view(code.shape)
    else:
        value = as_operand(code).to(torch.float32)
    return (value * scale).to(out_dtype)


def as_operand(code: Tensor) -> Tensor:
    """Bytes (uint8) as the E4M3 tensor that they are; an E4M3 or int8 tensor as it is."""
    return code.view(E4M3) if code.dtype == torch.uint8 else code


def as_code(operand: Tensor) -> Tensor:
    """The inverse: an E4M3 tensor as its bytes."""
    return operand.view(torch.uint8) if operand.dtype == E4M3 else operand


def code_dtype(operand: torch.dtype) -> torch.dtype:
    """What codes are stored in, which neither a cast of a model nor an average touches."""
    return INT8 if operand == INT8 else torch.uint8


def filled(code: Tensor, axis: int = 1) -> Tensor:
    """FP8 [m, k] with zeros up to a multiple of 16 along ``axis``, in steps of which FP8 products
    add up; itself where there is one.
    """
    lacking = -code.shape[axis] % 16
    if not lacking:
        return code
    pad = [0, lacking] if axis == 1 else [0, 0, 0, lacking]
    return torch.nn.functional.pad(code.view(torch.uint8), pad).view(code.dtype)


def as_scale(scale: Tensor) -> Tensor:
    """A float32 scale as it is; its bits (`scale_bits`) as the scale that they are."""
    if scale.dtype == torch.float32:
        return scale
    value = scale.view(torch.float32)
    return value if value.dim() == 2 else value.reshape(())


def scale_bits(scale: Tensor) -> Tensor:
    """The bits of a float32 scale [rows, 1] or [], int32 [rows, 1] or [1]: how a layer stores it.
    FSDP's mixed precision would round floats, and it takes no parameter without a dimension.
    """
    return scale.view(torch.int32).reshape(scale.shape or (1,))


def odd_factors(count: int, multiplier: int, device: torch.device, first: int = 0) -> Tensor:
    """Odd 64-bit numbers of ``count`` places from ``first`` on, for hashes that are sums."""
    places = torch.arange(first + 1, first + count + 1, device=device, dtype=torch.int64)
    mixed = places * multiplier
    return (mixed ^ (mixed >> 29)) * multiplier | 1


def round_to_fp8_stochastic(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``x`` to one of its two FP8 neighbours, the upper with probability
    ``frac`` = its distance from the lower in units of their gap (to 2**-16), as float32.

    ``random`` holds integers in [0, 2**16), one an element (see `philox_uint16`). A value that FP8
    holds exactly never moves. Saturates; NaN stays NaN.
    """
    mantissa, _, spacing = _LAYOUT[dtype]
    x = x.clamp(-FP8_MAX[dtype], FP8_MAX[dtype])
    magnitude = x.abs()
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2**floor(log2|x|)
    gap = power.mul_(2.0**-mantissa).clamp_(min=spacing)
    # A NaN's power is Inf, and Inf / Inf is NaN again.
    steps = torch.add(magnitude.div_(gap), random, alpha=2.0**-16).floor_()
    return steps.mul_(gap).copysign_(x)


_PHILOX_ROUND = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def philox_uint16(row: Tensor, columns: int, step: Tensor, site: Tensor, seed: int) -> Tensor:
    """Random integers in [0, 2**16) for rows of a weight, int32 [..., columns].

    Philox-4x32-10 with key ``seed`` (64 bits) and counter (column // 8, row, step, site); the eight
    halves of the four words it yields, low half first, belong to eight neighbouring columns.
    ``row``, ``step`` and ``site`` are int64 and broadcast against each other, shape [...]. The same
    stream as Triton's ``tl.philox`` (Salmon et al., SC'11).
    """
    c0 = torch.arange((columns + 7) // 8, device=row.device)
    c1, c2, c3 = row.unsqueeze(-1), step.unsqueeze(-1), site.unsqueeze(-1)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # A 32x32-bit product wraps int64's sign but keeps its 64 bits; above 32 bits c1 and c3 hold
        # what nothing reads. Counters broadcast as late as they can: the first rounds are cheap.
        p0, p1 = c0 * _PHILOX_ROUND[0], c2 * _PHILOX_ROUND[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_MASK32),
            p1,
            ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_MASK32),
            p0,
        )
        k0, k1 = (k0 + _PHILOX_KEY[0]) & _MASK32, (k1 + _PHILOX_KEY[1]) & _MASK32
    words = torch.stack([c.to(torch.int32) for c in (c0, c1, c2, c3)], dim=-1)
    halves = words.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    return halves.flatten(start_dim=-2)[..., :columns]
