"""The cast of a matrix to FP8 or INT8 with its scales, as ATen operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from falqon_fx.site.numerics import INT8, LARGEST, amax_to_scale
from falqon_fx.site.spec import SiteSpec, parse_spec


def scale_of(x: Tensor, dtype: torch.dtype, spec: SiteSpec) -> Tensor:
    """The scale of each row of ``x`` [n, k], float32 [n, 1], or of all of it, []."""
    amax = x.abs().amax(dim=1, keepdim=True)
    if not spec.per_row:
        # The padded zero is the amax of no tokens at all.
        amax = F.pad(amax, (0, 0, 0, 1)).amax()
    return amax_to_scale(amax, dtype, spec.scale)


def cast_fp8(x: Tensor, dtype: torch.dtype, spec_text: str) -> tuple[Tensor, Tensor]:
    """float32 ``x`` [n, k] ≈ q · scale: FP8 or INT8 q [n, k], scale float32 [n, 1] or []."""
    scale = scale_of(x, dtype, parse_spec(spec_text))
    return cast_with_scale(x, scale, dtype), scale


def cast_with_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``x`` [n, k] / scale, in FP8 or INT8, saturating."""
    largest = LARGEST[dtype]
    value = (x * scale.reciprocal()).clamp(-largest, largest)
    if dtype == INT8:  # a cast cuts off, and there is no NaN: the scale is one then
        value = value.round().nan_to_num(0.0)
    # A transposed x would stay so; the products read row by row.
    return value.to(dtype).contiguous()
