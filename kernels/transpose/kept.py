"""Host side of transpose="store": making the copies Wᵀ, and bringing them up to date."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from falqon_fx import _compat
from falqon_fx.kernels.hardware import fp8_architecture
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import BACKWARD, with_last_columns
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import MAX_SIBLINGS, aligned
from falqon_fx.kernels.transpose import launch
from falqon_fx.kernels.transpose.spec import StoredSpec, TransposeSpec
from falqon_fx.site import transposed as stored
from falqon_fx.site.numerics import E4M3, filled
from falqon_fx.site.record import COUNTERS
from falqon_fx.site.transposed import Kept

_SPEC = StoredSpec(rows=16, width=256)
MOST = 2 * MAX_SIBLINGS  # matrices of one launch: W of each site and Â


def transposed(weight: Sequence[Tensor]) -> list[Tensor]:
    """Wᵀ [in, out] of each FP8 W [out, in], with zeros up to a multiple of 16 columns."""
    turned, starts = transposed_together(weight), launch.starts(weight)
    return [turned.narrow(1, start, end - start) for start, end in pairwise(starts)]


def transposed_together(weight: Sequence[Tensor]) -> Tensor:
    """The same side by side in one: by ATen where W has rows that start at no multiple of 16, or
    for more matrices than are compiled ahead.
    """
    interpreted = runs_interpreted(weight[0])
    if not interpreted and (weight[0].shape[1] % 16 or len(weight) > MOST):
        bytes_of = [filled(w, axis=0).view(torch.uint8) for w in weight]
        return torch.cat(bytes_of).t().contiguous().view(E4M3)
    fp8 = not interpreted and fp8_architecture(weight[0].device) > 0
    spec = TransposeSpec(len(weight), fp8, block=32 if interpreted else 128)
    return launch.transpose([w.contiguous() for w in weight], spec)


def with_room(turned: Tensor, columns: int) -> Tensor:
    """``turned`` with so many more columns, of zeros."""
    if not columns:
        return turned
    wide = turned.new_zeros((len(turned), turned.shape[1] + columns))
    wide.narrow(1, 0, turned.shape[1]).copy_(turned)
    return wide


def with_columns(whole: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``whole`` with the transposes of ``matrices`` in its last columns, written in place."""
    if not matrices:
        return whole

    def by_aten() -> Tensor:
        bytes_of = [filled(matrix, axis=0).view(torch.uint8) for matrix in matrices]
        return (bytes_of[0] if len(matrices) == 1 else torch.cat(bytes_of)).t().view(E4M3)

    # In a graph by whatever kernel Inductor writes them with.
    make = by_aten if _compat.is_fake(whole) else partial(transposed_together, matrices)
    return with_last_columns(whole, make, BACKWARD)


def kept(weight: Sequence[Tensor]) -> list[Tensor]:
    """The same from the copies that are kept beside W; made where there are none.

    W is constant, or, with update="rows", the first rows of W': then whoever calls this has run
    `refresh` since W was last written.
    """
    return [_kept(w) for w in weight]


def _kept(weight: Tensor) -> Tensor:
    found = stored.find(weight)
    if found is None or found.turned.shape != weight.shape[::-1]:
        (turned,) = transposed([weight])
        of_rows = turned.view(torch.uint8).narrow(1, 0, len(weight))
        found = stored.keep(weight, of_rows, COUNTERS)
    columns, rows = found.turned.shape
    wide = (columns, aligned(rows))  # zeros behind W's
    return found.turned.as_strided(wide, found.turned.stride()).view(E4M3)


def refresh(weight: Sequence[Tensor], writes: Sequence[Tensor], counters: Sequence[Tensor]) -> None:
    """Brings the copies of those of W' [out + r, in] that have one up to date: two launches.

    Rows whose number in ``writes`` changed are copied; all rows where ``counters`` speak of another
    A, W or site than when the copy was made, or of an earlier step.
    """
    found = [(stored.find(w), w, n, c) for w, n, c in zip(weight, writes, counters)]
    rows = [_row(k, w, n, c) for k, w, n, c in found if k is not None]
    if not rows:
        return
    table = _table(tuple(rows), weight[0].device)
    interpreted = runs_interpreted(table)
    kernels, spec = load(_SPEC, interpreted), _SPEC
    parts = max(-(-row[_OUT] // spec.rows) for row in rows)
    with torch.cuda.device_of(table):
        kernels.refresh[(len(rows), parts)](table, num_warps=spec.num_warps)
        kernels.seal[(len(rows),)](table, num_warps=spec.num_warps)


def signatures(spec: StoredSpec) -> dict[str, dict[str, str]]:
    """Argument types of each kernel, for `aot.compile_ahead`."""
    return {"refresh": {"table_ptr": "*i64:16"}, "seal": {"table_ptr": "*i64:16"}}


_OUT = 6  # the column of `out` in the table, before that of `width`; see the template


def _row(kept: Kept, weight: Tensor, writes: Tensor, counters: Tensor) -> tuple[int, ...]:
    tensors = (weight, kept.turned, writes, kept.seen, counters, kept.stamp)
    width, out = kept.turned.shape
    return (*(t.data_ptr() for t in tensors), out, width, kept.turned.stride(0))


@lru_cache(maxsize=64)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(device)
