"""Host side of the transpose of W's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import launch
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import aligned
from falqon_fx.kernels.transpose.spec import TransposeSpec
from falqon_fx.site.numerics import E4M3


def transpose(matrices: Sequence[Tensor], spec: TransposeSpec) -> Tensor:
    """x_iᵀ [columns, rows_i] of each E4M3 matrix x_i [rows_i, columns], side by side in one tensor:
    each starts at a multiple of 16, with zeros between (see `starts`).

    Raises ValueError where a matrix is something else.
    """
    columns, device = matrices[0].shape[1], matrices[0].device
    if len(matrices) != spec.matrices or any(len(x.shape) != 2 for x in matrices):
        raise ValueError(f"transpose: {len(matrices)} matrices, {spec} takes others")
    for x in matrices:
        if x.dtype != E4M3 or not x.is_contiguous() or x.shape[1] != columns:
            raise ValueError(f"transpose: {x.dtype} {tuple(x.shape)} with strides {x.stride()}")
    interpreted = runs_interpreted(matrices[0])
    if interpreted and spec.fp8:
        raise ValueError("transpose: the interpreter needs fp8=False")
    rows, (*_, width) = [len(x) for x in matrices], starts(matrices)
    y = torch.empty((columns, width), dtype=E4M3, device=device)
    if y.numel():
        grid = (sum(-(-count // spec.block) for count in rows), -(-columns // spec.block))
        arguments: list[Any] = []
        for x in matrices:
            arguments += [x if spec.fp8 else x.view(torch.uint8), len(x)]
        arguments += [columns, y if spec.fp8 else y.view(torch.int32), y.shape[1] // 4]
        kernel = load(spec, interpreted).transpose
        (y,) = launch(kernel, grid, arguments, ["y_ptr"], num_warps=spec.num_warps)
    return y if spec.fp8 else y.view(E4M3)


def starts(matrices: Sequence[Tensor]) -> list[int]:
    """Where the columns of each begin, and where the last ones end."""
    widths = [aligned(len(x)) for x in matrices]
    return [sum(widths[:i]) for i in range(len(widths) + 1)]


def signatures(spec: TransposeSpec) -> dict[str, dict[str, str]]:
    """Argument types of the kernel, for `aot.compile_ahead`: aligned, sizes divisible by 16."""
    types: dict[str, str] = {}
    for i in range(spec.matrices):
        types |= {f"x{i}_ptr": "*fp8e4nv:16" if spec.fp8 else "*u8:16", f"rows{i}": "i32:16"}
    types["columns"] = "i32:16"
    return {
        "transpose": {
            **types,
            "y_ptr": "*fp8e4nv:16" if spec.fp8 else "*i32:16",
            "y_stride": "i32:16",
        }
    }
