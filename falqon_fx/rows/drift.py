"""How far an FP8 weight has moved from the base weight that `prepare` freed.

Where rows are written from their own last bytes, each write adds a cast's error. The sum of these
errors is no longer known, but it can be estimated. Kept of each row of the base weight is one
number, ⟨base_k, σ_k⟩ with random signs σ_kj = ±1, so that at any time

    z_k = ⟨dq(W_k) - s · applied_k · Â - base_k, σ_k⟩

can be computed from what is at hand. Over the signs, z_k² is on average the squared error of row k,
however its parts hang together: of Σ_j Σ_l e_kj e_kl σ_kj σ_kl only the terms with j = l stay. So

    drift = (Σ_k z_k² / Σ_k ‖error of the first cast of row k‖²)^½

estimates the error of the weight relative to that of its first cast. The variance of z_k² is at
most 2 ‖e_k‖⁴, so where the rows err alike the standard deviation of the drift is at most 1/√(2 ·
out) of it: 3% for 576 rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from falqon_fx.errors import named
from falqon_fx.site.base import row_chunks
from falqon_fx.site.numerics import decode_fp8


class WrittenState(Protocol):
    """An FP8 weight W' = [W; A] that is written row by row (`falqon_fx.MergedAdapter`)."""

    @property
    def code(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def applied(self) -> Tensor: ...
    @property
    def origin(self) -> Tensor: ...
    @property
    def scaling(self) -> float: ...


LIMIT = 2.0  # beyond which a warning comes
_LEAST = 2.0**-12  # of a row's norm: the first cast of a weight that FP8 holds exactly has no error


def remember_(origin: Tensor, state: WrittenState, base: Tensor) -> None:
    """Fill ``origin`` [out, 2] from the base weight [out, in] while it is at hand: ⟨base_k, σ_k⟩,
    and the squared error of the cast of row k.
    """
    for chunk in row_chunks(base):
        rows = torch.arange(chunk.start, chunk.stop, device=base.device)
        wide = base[chunk].to(torch.float32)
        error = _without_adapter(state, rows) - wide
        least = _LEAST * torch.linalg.vector_norm(wide, dim=1)
        norm = torch.linalg.vector_norm(error, dim=1).maximum(least)
        origin[chunk] = torch.stack([signed_sums(wide, rows), norm.square()], 1)


@torch.no_grad()
def errors(state: WrittenState, rows: Tensor | None = None) -> Tensor:
    """z of some rows, or of all, float32 [n]."""
    device = state.origin.device
    if rows is None:
        rows = torch.arange(len(state.applied), device=device)
    found = torch.empty(len(rows), dtype=torch.float32, device=device)
    for chunk in row_chunks(rows[:, None].expand(-1, state.code.shape[1])):
        some = rows[chunk]
        sums = signed_sums(_without_adapter(state, some), some)
        found[chunk] = sums - state.origin[some, 0]
    return found


def is_unknown(state: WrittenState) -> bool:
    """Whether the base weight is at hand, or never was."""
    return bool(state.origin.isnan().any())


def estimate(state: WrittenState, z: Tensor) -> float:
    """The drift, from all rows' z."""
    return float((z.double().square().sum() / state.origin[:, 1].double().sum()).sqrt())


class Meter:
    """The drift of a site, whose rows other than those that are written stay as they are."""

    def __init__(self, state: WrittenState) -> None:
        self._state, self._z = state, None if is_unknown(state) else errors(state)
        self.passed = False

    def after(self, rows: Sequence[int]) -> float | None:
        """The drift when some rows have been written; None where it can't be told."""
        if self._z is None:
            return None
        index = torch.tensor(rows, dtype=torch.int64, device=self._z.device)
        self._z[index] = errors(self._state, index)
        return estimate(self._state, self._z)

    def passes(self, drift: float | None) -> bool:
        """Whether it is beyond the limit for the first time."""
        first = drift is not None and drift > LIMIT and not self.passed
        self.passed |= first
        return first


def warn(sites: Sequence[str]) -> None:
    """That the drift at ``sites`` has passed the limit."""
    warnings.warn(
        f"falqon: the FP8 weight of {named(sites)} is by now more than "
        f'{LIMIT:g} times as far from its base weight as its first cast was: with update="rows" '
        "after prepare(), which freed the base weight, every write of a row rounds it once more. "
        'Leave prepare() out, or set update="adapter".',
        stacklevel=3,
    )


def signed_sums(values: Tensor, rows: Tensor) -> Tensor:
    """⟨v_k, σ_k⟩ for float32 values [n, in] of the rows k, [n]: σ_kj is the top bit of p_k · q_j
    modulo 2**32, with random odd p and q.
    """
    p = _odd(rows, 0x9E3779B97F4A7C15)
    q = _odd(torch.arange(values.shape[1], device=values.device), 0x3F58476D1CE4E5B9)
    signs = (p[:, None] * q).bitwise_and_(-0x80000000)
    return signs.bitwise_xor_(values.contiguous().view(torch.int32)).view(torch.float32).sum(1)


def _odd(index: Tensor, multiplier: int) -> Tensor:
    """Random odd numbers, int32."""
    signed = multiplier - (1 << 64) if multiplier >> 63 else multiplier
    mixed = (index + 1) * signed
    mixed = (mixed ^ (mixed >> 31)) * 0x2545F4914F6CDD1D
    return (mixed >> 32).to(torch.int32) | 1


def _without_adapter(state: WrittenState, rows: Tensor) -> Tensor:
    """dq(W_k) - s · applied_k · Â of some rows, float32 [n, in]."""
    out = len(state.applied)
    per_row = state.scale.dim() == 2
    scale, a_scale = (state.scale[rows], state.scale[out:]) if per_row else [state.scale] * 2
    lora_a = decode_fp8(state.code[out:], a_scale, torch.float32)
    held = state.applied[rows].to(torch.float32) * state.scaling
    return torch.addmm(decode_fp8(state.code[rows], scale, torch.float32), held, lora_a, alpha=-1)
