"""What a GPU can do."""

from __future__ import annotations

import functools
import warnings

import torch


def architecture(device: torch.device) -> int:
    """90 for sm_90 and so on; 0 for a CPU, where kernels are interpreted.

    A GPU without FP8 tensor cores is named once: it saves memory, and no time.
    """
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        _warn_below_fp8(torch.cuda.get_device_name(device), major * 10 + minor)
    return major * 10 + minor


@functools.cache
def _warn_below_fp8(card: str, number: int) -> None:
    warnings.warn(
        f"falqon: {card} (sm_{number}) has no FP8 tensor cores (sm_89 and newer have): weights "
        "stay FP8 in memory, and are decoded to bfloat16 in every product. Memory is saved, time "
        "is not.",
        stacklevel=5,
    )
