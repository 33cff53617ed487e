"""What a GPU can do."""

from __future__ import annotations

import functools
import warnings

import torch

from falqon_fx.kernels.spec import CastMode

FP8 = 89  # the first architecture with FP8 tensor cores
INT8 = 75  # that with INT8 ones


def architecture(device: torch.device) -> int:
    """90 for sm_90 and so on; 0 for a CPU, where kernels are interpreted.

    A GPU without FP8 tensor cores is named once: it saves memory, and no time.
    """
    number = _number(device)
    if 0 < number < FP8:
        _warn_below_fp8(torch.cuda.get_device_name(device), number)
    return number


def fp8_architecture(device: torch.device) -> int:
    """The same, but 0 where there are no FP8 tensor cores."""
    number = _number(device)
    return number if number >= FP8 else 0


def int8_architecture(device: torch.device) -> int:
    """The same, but 0 where there are no INT8 tensor cores."""
    number = _number(device)
    return number if number >= INT8 else 0


def memory(device: torch.device) -> int:
    """Bytes of a GPU's memory."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def family(architecture: int) -> int:
    """The architecture whose tensor cores sm_``architecture`` has: sm_103 (B300) those of sm_100,
    sm_121 (DGX Spark) those of sm_120.
    """
    return {103: 100, 121: 120}.get(architecture, architecture)


def multiplies_fp8(architecture: int) -> bool:
    """Whether Triton multiplies FP8 as it is on sm_``architecture``. Of sm_121 Triton 3.7 doesn't
    know that it can, and would decode both operands: there products are for the library.
    """
    return architecture >= FP8 and architecture != 121


def reads_columns(architecture: int) -> bool:
    """Whether FP8 products of sm_90 and so on take W as stored for dL/dx: sm_100's tensor cores
    read operands either way; the others would need W byte by byte. 0 is the interpreter.
    """
    return architecture in (0, 100)


def cast_mode(architecture: int) -> CastMode:
    """How kernels cast to FP8 on sm_90 and so on; 0 is the interpreter."""
    return "hardware" if architecture >= FP8 else "integer"


def _number(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def _warn_below_fp8(card: str, number: int) -> None:
    warnings.warn(
        f"falqon: {card} (sm_{number}) has no FP8 tensor cores (sm_89 and newer have): weights "
        "stay FP8 in memory, and are decoded to bfloat16 in every product. Memory is saved, time "
        "is not: where memory is no concern, leave falqon out.",
        stacklevel=5,
    )
