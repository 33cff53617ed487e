"""Host side of the transpose of W's bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import launch
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.transpose.spec import TransposeSpec


def transpose(x: Tensor, spec: TransposeSpec) -> Tensor:
    """xᵀ [columns, rows] of bytes x [rows, columns] without gaps; its rows start at multiples of 16
    bytes.

    Raises ValueError where x is something else.
    """
    rows, columns = x.shape
    if x.dtype != torch.uint8 or not x.is_contiguous():
        raise ValueError(f"transpose: {x.dtype} with strides {x.stride()}")
    words = torch.empty((columns, -(-rows // 16) * 4), dtype=torch.int32, device=x.device)
    if x.numel() == 0:
        return words.view(torch.uint8).narrow(1, 0, rows)
    grid = (-(-rows // spec.block), -(-columns // spec.block))
    kernel = load(spec, runs_interpreted(x)).transpose
    arguments = [x, words, rows, columns, words.stride(0)]
    (words,) = launch(kernel, grid, arguments, ["y_ptr"], num_warps=spec.num_warps)
    return words.view(torch.uint8).narrow(1, 0, rows)


def signatures(spec: TransposeSpec) -> dict[str, dict[str, str]]:
    """Argument types of the kernel, for `aot.compile_ahead`: aligned, sizes divisible by 16."""
    bytes_ = {"x_ptr": "*u8:16", "y_ptr": "*i32:16"}
    sizes = {"rows": "i32:16", "columns": "i32:16", "y_stride": "i32:16"}
    return {"transpose": bytes_ | sizes}
