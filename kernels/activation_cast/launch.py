"""Host side of the activation cast: allocates the outputs and launches the generated kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv

from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import launch
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import POINTER
from falqon_fx.site.numerics import FP8_DTYPES


def activation_cast(x: Tensor, spec: ActivationCastSpec) -> tuple[Tensor, Tensor]:
    """Casts x [n, width] to FP8 as ``spec`` says: (q [n, width], scale), with x ≈ q · scale.

    Per group (the tensor, or each row), as in `falqon_fx.site.numerics`::

        scale = max(amax|x| · (1/fp8_max), 2**-126)     rounded up to a power of two for "pow2";
                                                        1 where amax is 0
        q     = saturate(round(x · (1/scale)))          ties to even

    ``scale`` is float32, [] per tensor and [n, 1] per row. A NaN or Inf in a group makes its scale
    NaN or Inf, and NaN stays NaN in q. x may have any row stride; if its last dimension is not
    contiguous, it is copied first. An empty x launches nothing.

    Raises TypeError where x's dtype is not the spec's; ValueError where x is not 2-D, where its
    rows do not fit the spec's tile, or where ``cast="hardware"`` would be interpreted.
    """
    _check(x, spec)
    n, width = x.shape
    q = torch.empty((n, width), dtype=torch.uint8, device=x.device)
    scale_shape = (n, 1) if spec.granularity == "row" else ()
    if x.numel() == 0:
        return q.view(FP8_DTYPES[spec.fp8]), torch.ones(scale_shape, device=x.device)
    scale = torch.empty(scale_shape, dtype=torch.float32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    by = _by_rows if spec.granularity == "row" else _by_tiles
    q, scale = by(x, q, scale, spec)
    return q.view(FP8_DTYPES[spec.fp8]), scale


def signatures(spec: ActivationCastSpec) -> dict[str, dict[str, str]]:
    """Argument types of each kernel, for `aot.compile_ahead`: x aligned, width % 16 == 0."""
    x_ptr = POINTER[spec.input_dtype]
    sizes = {"n": "i32", "width": "i32:16", "x_stride": "i32:16"}
    q = {"q_ptr": "*u8:16", "scale_ptr": "*fp32:16"}
    if spec.granularity == "row":
        return {"cast_rows": {"x_ptr": x_ptr, **q, **sizes}}
    partial = {"x_ptr": x_ptr, "partial_ptr": "*i32:16"}
    return {"amax_tiles": {**partial, **sizes}, "cast_tiles": {**partial, **q, **sizes}}


def _check(x: Tensor, spec: ActivationCastSpec) -> None:
    if x.dim() != 2:
        raise ValueError(f"activation_cast: x has shape {tuple(x.shape)}, expected [n, width]")
    if x.dtype != getattr(torch, spec.input_dtype):
        raise TypeError(f"activation_cast: x is {x.dtype}, {spec} takes {spec.input_dtype}")
    if spec.granularity == "row" and not spec.loop and x.shape[1] > spec.block_width:
        raise ValueError(
            f"activation_cast: rows of {x.shape[1]} do not fit {spec}; a wider block_width or "
            "loop=True takes them"
        )
    if spec.cast == "hardware" and runs_interpreted(x):
        raise ValueError(
            "activation_cast: the interpreter's FP8 casts are wrong; use cast='integer' for "
            f"tensors on {x.device}"
        )


def _by_rows(x: Tensor, q: Tensor, scale: Tensor, spec: ActivationCastSpec) -> list[Tensor]:
    n, width = x.shape
    return launch(
        load(spec, runs_interpreted(x)).cast_rows,
        (cdiv(n, spec.block_rows),),
        [x, q, scale, n, width, x.stride(0)],
        ["q_ptr", "scale_ptr"],
        num_warps=spec.num_warps,
    )


def _by_tiles(x: Tensor, q: Tensor, scale: Tensor, spec: ActivationCastSpec) -> list[Tensor]:
    n, width = x.shape
    kernels = load(spec, runs_interpreted(x))
    tiles = cdiv(n, spec.block_rows) * cdiv(width, spec.block_width)
    # The cast reads one partial maximum for each program of the amax pass.
    grid = (min(tiles, spec.programs),)
    partial = torch.empty(grid, dtype=torch.int32, device=x.device)
    sizes, warps = [n, width, x.stride(0)], spec.num_warps
    arguments = [x, partial, *sizes]
    (partial,) = launch(kernels.amax_tiles, grid, arguments, ["partial_ptr"], num_warps=warps)
    arguments = [x, partial, q, scale, *sizes]
    return launch(kernels.cast_tiles, grid, arguments, ["q_ptr", "scale_ptr"], num_warps=warps)
