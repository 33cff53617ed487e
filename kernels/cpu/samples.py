"""Whether parts of matrices are still what copies of them hold, all in one call of compiled code:
``samples.cpp``, which `falqon_fx.kernels.cpu.build` compiles at need.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from falqon_fx.kernels.cpu.build import compiled

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


class _Sample(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("data", "seen")),
        *((name, _INT64) for name in ("rows", "columns")),
        *((name, _INT64) for name in ("row_stride", "column_stride", "size")),
    )


@functools.cache
def library() -> Any | None:
    """The compiled code; None where no compiler works, with the reason in the log."""
    return compiled(
        Path(__file__).with_suffix(".cpp"),
        ("unchanged",),
        "the code that looks whether base weights were written can't be compiled for this CPU and "
        "runs as ATen operations, some microseconds a layer and call slower",
    )


class Samples:
    """Parts [m, n] of matrices on a CPU, with copies of them. The copies are kept alive and the
    matrices are not: whoever asks has them at hand, where and as they were.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._copies = [seen for _, seen in pairs]
        self._places = (_Sample * len(pairs))(*(_place(*pair) for pair in pairs))

    def unchanged(self) -> bool:
        """Whether each part holds the bits of its copy. Asked only where there is compiled code."""
        if not self._copies:
            return True
        result = _INT64()
        built = library()
        assert built is not None
        built.falqon_unchanged(self._places, _INT64(len(self._copies)), ctypes.byref(result))
        return bool(result.value)


def _place(part: Tensor, seen: Tensor) -> _Sample:
    if part.dtype != seen.dtype or part.shape != seen.shape or not seen.is_contiguous():
        raise ValueError(f"{seen.dtype} {list(seen.shape)} is no copy of {list(part.shape)}")
    if part.device.type != "cpu" or seen.device.type != "cpu":
        raise ValueError(f"a tensor on {part.device} is not on the CPU")
    size = part.element_size()
    rows, columns = part.stride()
    return _Sample(part.data_ptr(), seen.data_ptr(), *part.shape, rows * size, columns * size, size)
