"""Floats and FP8 codes to round."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from falqon_fx.site.numerics import (
    E4M3,
    E5M2,
    FP8_MAX,
)
from tests import tolerances as tol

FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
INF, NAN = float("inf"), float("nan")


def codes() -> Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8)


def values(dtype: torch.dtype) -> Tensor:
    """All finite values of the format, ascending, zero once."""
    value = codes().view(dtype).float()
    return value[value.isfinite()].unique()


def bits(x: Tensor) -> Tensor:
    """Bit patterns, all NaNs alike: tells -0 from 0, which `==` does not."""
    return torch.where(x.isnan(), 0x7FC00000, x.contiguous().view(torch.int32))


def near(dtype: torch.dtype, count: int, seed: int = 0) -> Tensor:
    """Random float32 within the format's range, all its binades alike."""
    generator = torch.Generator().manual_seed(seed)
    low = math.log2(tol.SUBNORMAL_SPACING[dtype]) - 3
    high = math.log2(FP8_MAX[dtype]) + 1
    exponent = torch.empty(count).uniform_(low, high, generator=generator)
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return exponent.exp2() * sign
