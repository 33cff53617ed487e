"""What the bytes of a base weight look like in each form: FP8, INT8, NVFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from falqon_fx.site import nvfp4
from falqon_fx.site.numerics import amax_to_scale, as_operand, code_dtype
from falqon_fx.site.spec import SiteSpec


def code_of(out: int, features: int, spec: SiteSpec) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype of the bytes of W [out, in]."""
    if spec.base == "nvfp4":
        return nvfp4.packed_shape(out, features), torch.uint8
    return (out, features), code_dtype(spec.operand)


def scale_shape(out: int, spec: SiteSpec) -> tuple[int, ...]:
    """The shape of the scale of a base with ``out`` rows."""
    return (out, 1) if spec.base_per_row else ()


def whole_scale(amax: Tensor, spec: SiteSpec) -> Tensor:
    """The scale of rows, or of all of W, whose largest magnitude is ``amax``."""
    if spec.base == "nvfp4":
        return nvfp4.tensor_scale(amax, spec.scale)
    return amax_to_scale(amax, spec.operand, spec.scale)


def operand_of(code: Tensor) -> Tensor:
    """The bytes of a base as an op reads them."""
    return code if nvfp4.is_packed(code) else as_operand(code)
