"""The cast of x and of dL/dO by a generated kernel, or by ATen."""

from __future__ import annotations

import functools
from functools import partial

import torch
from torch import Tensor

from falqon_fx.kernels.activation_cast.launch import activation_cast
from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.hardware import cast_mode
from falqon_fx.kernels.products.contest import Contest, against_aten, where_runs
from falqon_fx.kernels.products.problem import dtype_name, fp8_format
from falqon_fx.kernels.spec import CastMode
from falqon_fx.site.casts import cast_fp8 as cast_as_aten
from falqon_fx.site.spec import parse_spec


def cast_fp8(x: Tensor, dtype: torch.dtype, spec_text: str) -> Contest:
    """[q, scale], x [n, k] ≈ q · scale, where Inductor can't cast (see
    `falqon_fx.ops.products`).
    """
    cast = cast_mode(where_runs(x))

    def plain() -> list[Tensor]:
        return [*cast_as_aten(x.to(torch.float32), dtype, spec_text)]

    def generated(made: ActivationCastSpec) -> list[Tensor]:
        return [*activation_cast(x, made)]

    made = partial(_cast_specs, x.shape[1], x.dtype, dtype, spec_text, cast)
    return against_aten(
        f"cast width={x.shape[1]}", x, made, generated, plain, parse_spec(spec_text).kernel
    )


@functools.lru_cache(maxsize=4096)
def _cast_specs(
    width: int, input_dtype: torch.dtype, dtype: torch.dtype, spec_text: str, cast: CastMode
) -> tuple[ActivationCastSpec, ...]:
    spec = parse_spec(spec_text)
    made = ActivationCastSpec.for_width(
        width,
        input_dtype=dtype_name(input_dtype),
        fp8=fp8_format(dtype),
        granularity=spec.granularity,
        scale=spec.scale,
        cast=cast,
    )
    return (made,)
