"""Products of rows that are sorted by expert with the stacked weights of all experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from falqon_fx.kernels.hardware import fp8_architecture
from falqon_fx.ops.lowering import decode
from falqon_fx.site.numerics import E4M3, as_operand

# Bytes of decoded weights that live at a time on a CPU: decoding a whole stack would take twice or
# four times the memory that FP8 has saved, and what is read again at once should lie in a cache.
_DECODED = 1 << 22


@dataclass(frozen=True)
class Routing:
    """Which expert each row of a product belongs to.

    Attributes:
        offs: int32 [E], the number of rows of the experts up to each one, itself included.
        rows: int64 [S], the row of x that each row of the product reads; None for its own.
        order: int64 [S], where each sorted row stands in the result; None where it is sorted.
    """

    offs: Tensor
    rows: Tensor | None
    order: Tensor | None

    def taken(self, x: Tensor) -> Tensor:
        """The rows of x [n, k] that are multiplied, [S, k]."""
        if self.rows is None:
            return x
        if x.dtype == E4M3:  # as bytes, which any device takes
            return x.view(torch.uint8).index_select(0, self.rows).view(E4M3)
        return x.index_select(0, self.rows)

    def sorted(self, y: Tensor) -> Tensor:
        """What belongs to the result [S, m], sorted by expert."""
        return y if self.order is None else y.index_select(0, self.order)

    def restored(self, y: Tensor) -> Tensor:
        """The inverse of `sorted`."""
        if self.order is None:
            return y
        made = torch.empty_like(y)
        if y.device.type == "cpu":
            return made.index_copy_(0, self.order, y)
        return made.index_copy(0, self.order, y)  # graphs are functional

    def added_up(self, y: Tensor, n: int) -> Tensor:
        """The inverse of `taken`: float32 [n, k], the sum of all that read the same row."""
        wide = y.to(torch.float32)
        if self.rows is None:
            return wide
        made = wide.new_zeros((n, y.shape[1]))
        if y.device.type == "cpu":
            return made.index_add_(0, self.rows, wide)
        return made.index_add(0, self.rows, wide)

    def experts(self, count: int) -> Tensor:
        """The expert of each of ``count`` sorted rows, int64; rows behind all get the last."""
        places = torch.arange(count, device=self.offs.device, dtype=self.offs.dtype)
        found = torch.bucketize(places, self.offs, right=True)
        return found.clamp(max=self.offs.shape[0] - 1)


def routing(groups: Tensor, by_id: bool, rows: Sequence[Tensor], experts: int) -> Routing:
    """What `falqon_fx.ops.experts.merged_experts` is given, sorted by expert: ``groups`` are the
    offsets of sorted rows, or with ``by_id`` the expert of each row, in any order.
    """
    taken = rows[0] if rows else None
    if not by_id:
        return Routing(groups.to(torch.int32), taken, None)
    ids = groups.reshape(-1).remainder(experts)  # indexing takes -1 for the last
    order = torch.argsort(ids, stable=True)
    counts = torch.zeros(experts, dtype=torch.int32, device=ids.device)
    counts = counts.index_add(0, ids, torch.ones_like(ids, dtype=torch.int32))
    offs = counts.cumsum(0, dtype=torch.int32)
    return Routing(offs, order if taken is None else taken.index_select(0, order), order)


def added(total: Tensor, term: Tensor) -> Tensor:
    """Their sum, in the place of ``total`` where nothing traces it."""
    return total.add_(term) if total.device.type == "cpu" else total + term


@dataclass(frozen=True)
class Stack:
    """The weights of all experts, E4M3 (or bytes) [E, m, k], with the scales [E, m, 1] that belong
    into their values; 1 where those are put elsewhere.
    """

    code: Tensor
    scale: Tensor | float

    @classmethod
    def of(cls, code: Tensor, scale: Tensor | float, experts: int) -> Stack:
        """A stack of matrices [E * m, k] and [E * m, 1]."""
        stacked = code.view(experts, -1, code.shape[1])
        return cls(stacked, scale.view(*stacked.shape[:2], 1) if isinstance(scale, Tensor) else 1.0)

    def part(self, first: int, last: int) -> Stack:
        """Some of the experts."""
        scale = self.scale[first:last] if isinstance(self.scale, Tensor) else self.scale
        return Stack(self.code[first:last], scale)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The values, [E, m, k]."""
        flat = self.scale.reshape(-1, 1) if isinstance(self.scale, Tensor) else self.scale
        return decode(self.code.flatten(0, 1), flat, dtype).view(self.code.shape)


def times(x: Tensor, stack: Stack, offs: Tensor, *, turned: bool) -> Tensor:
    """x_e · W_eᵀ [S, m] of each expert's rows of x [S, k], or x_e · W_e with ``turned``, in x's
    dtype. Rows behind the last expert's are zeros on a CPU, and as torch leaves them elsewhere.

    A CPU decodes some experts at a time, of those that have rows.
    """

    def product(rows: Tensor, part: Stack, ends: Tensor) -> Tensor:
        weight = part.decoded(x.dtype)
        return padded_mm(rows, weight if turned else weight.transpose(1, 2), ends)

    count, m, k = stack.code.shape
    if x.device.type != "cpu":
        return product(x, stack, offs)
    y = x.new_empty((x.shape[0], k if turned else m))
    step = max(1, _DECODED // (m * k * x.dtype.itemsize))
    ends = [0, *offs.tolist()]
    y[ends[-1] :].zero_()
    for first in range(0, count, step):
        last = min(first + step, count)
        start, end = ends[first], ends[last]
        if start < end:
            of_part = offs[first:last] - start
            y[start:end] = product(x[start:end], stack.part(first, last), of_part)
    return y


def takes_fp8(x: Tensor, stack: Stack, dtype: torch.dtype) -> bool:
    """Whether torch multiplies a stack in FP8 as it is: on sm_90 and sm_100, in sizes of 16."""
    _, m, k = stack.code.shape
    known = fp8_architecture(x.device) in (90, 100)
    return known and dtype == torch.bfloat16 and m % 16 == 0 and k % 16 == 0


def fp8_times(
    q: Tensor, q_scale: Tensor, stack: Stack, scale: Tensor, offs: Tensor, fast: bool
) -> Tensor:
    """dq(q)_e · dq(W_e)ᵀ [S, m] in bfloat16, for q [S, k] E4M3 with a scale a row and W with the
    ``scale`` [E * m, 1]; ``fast`` lets tensor cores add up with fewer bits.
    """
    experts, m, _ = stack.code.shape
    product: Tensor = torch.ops.aten._scaled_grouped_mm(
        q,
        as_operand(stack.code).transpose(1, 2),
        q_scale.reshape(-1),
        scale.view(experts, m),
        offs,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )
    return product


def padded_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """`F.grouped_mm` of x [S, k] and weight [E, k, m] of any sizes: it takes rows of multiples of
    16 bytes alone.
    """
    m, unit = weight.shape[2], 16 // x.dtype.itemsize
    by_k, by_m = -x.shape[1] % unit, -m % unit
    if not by_k and not by_m:
        return F.grouped_mm(x, weight, offs=offs)
    x, weight = F.pad(x, (0, by_k)), F.pad(weight, (0, by_m, 0, by_k))
    return F.grouped_mm(x, weight, offs=offs).narrow(1, 0, m)


def grouped_outer(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """left_eᵀ · right_e [E, m, k] over the rows of each expert, of left [S, m], right [S, k]."""
    (m, k), unit = (left.shape[1], right.shape[1]), 16 // left.dtype.itemsize
    left, right = _padded(left, -m % unit), _padded(right, -k % unit)
    return F.grouped_mm(left.t(), right, offs=offs).narrow(1, 0, m).narrow(2, 0, k)


def _padded(x: Tensor, by: int) -> Tensor:
    """x [S, k] with ``by`` columns of zeros; itself without any."""
    return F.pad(x, (0, by)) if by else x
