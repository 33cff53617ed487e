"""The casts before the products on a CPU as compiled code: ``casts.cpp``, built at need. Bit for
bit what `falqon_fx.ops.lowering` computes with ATen's operations.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falqon_fx.kernels.cpu.build import compiled

_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_FLOATS = (torch.float32, torch.bfloat16)
# (mantissa bits kept, spacing of the subnormals, 1.75 / largest) of an FP8 format
_LAYOUT = {
    torch.float8_e4m3fn: (3, 2.0**-9, 1.75 / 448.0),
    torch.float8_e5m2: (2, 2.0**-16, 1.75 / 57344.0),
}


@functools.cache
def library() -> Any | None:
    """The compiled code; None where no compiler works, with the reason in the log."""
    return compiled(
        Path(__file__).with_suffix(".cpp"),
        ("cast_rows",),
        "the FP8 casts can't be compiled for this CPU and run as ATen operations, several times "
        "slower",
    )


def cast_rows(
    x: Tensor,
    fp8: torch.dtype,
    columns: Tensor | None,
    to: Tensor | None,
    codes: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor | None:
    """Write the FP8 cast of x [n, k], times ``columns`` [k] where given, into ``to`` [n, k] as
    values times their scale: float32 or bfloat16, rows any distance apart; and into ``codes``
    [n, k] uint8 the E4M3 bytes, each where it is given. The scales, one power of two per row,
    float32 [n, 1]; None where there is no compiled code, or it doesn't take these.

    With ``ends``, int32 [G], ``columns`` are [G, k]: group g has the rows up to ``ends[g]``. Rows
    behind the last one's are left as they are, and their scales with them.
    """
    n, k = x.shape
    groups = 0 if ends is None else len(ends)
    stored = to is not None
    to = x if to is None else to  # for its dtype and strides alone
    usable = _plain(x, to) and {x.dtype, to.dtype} <= {*_FLOATS}
    if not usable or (
        columns is not None and not _dense(columns, torch.float32, k * (groups or 1))
    ):
        return None
    if ends is not None and (columns is None or not _dense(ends, torch.int32, groups)):
        return None
    if (k > 1 and (x.stride(1) != 1 or to.stride(1) != 1)) or to.shape != x.shape:
        return None
    if codes is not None and not _dense(codes, torch.uint8, n * k):
        return None
    built = library()
    if built is None:
        return None
    scale = torch.empty(n, 1, dtype=torch.float32, device="cpu")
    mantissa, spacing, factor = _LAYOUT[fp8]
    built.falqon_cast_rows(
        _POINTER(x.data_ptr()),
        _INT64(x.dtype == torch.bfloat16),
        _INT64(x.stride(0)),
        _POINTER(None if columns is None else columns.data_ptr()),
        _INT64(n),
        _INT64(k),
        _INT64(mantissa),
        _INT64(torch.get_num_threads()),
        _FLOAT(factor),
        _FLOAT(spacing),
        _POINTER(scale.data_ptr()),
        _POINTER(to.data_ptr() if stored else None),
        _INT64(to.dtype == torch.bfloat16),
        _INT64(to.stride(0)),
        _POINTER(None if codes is None else codes.data_ptr()),
        _POINTER(None if ends is None else ends.data_ptr()),
        _INT64(groups),
    )
    return scale


def _plain(*tensors: Tensor) -> bool:
    """Whether all have memory on this CPU; what is traced has none."""
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)


def _dense(tensor: Tensor, dtype: torch.dtype, count: int) -> bool:
    right = tensor.dtype == dtype and tensor.numel() == count and tensor.is_contiguous()
    return right and _plain(tensor)
