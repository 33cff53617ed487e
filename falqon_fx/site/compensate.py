"""What a calibration buys back: the cast error of W along what x is made of, and the cast error of
x in the channels that weigh most.

With C = E[x · xᵀ] [in, in] of the inputs x of a layer, E = W - dq(q(W)) [out, in] costs its output
tr(E · C · Eᵀ) a token. The best E of rank r is known (QERA, arXiv 2410.06040, theorem 1; LQER,
2402.02446, with C's diagonal alone):

    L · Lᵀ = C + δ · I          δ = 0.1 · mean(diag C), or few tokens would decide alone
    U · S · Vᵀ = E · L          its top r singular triples
    A_c = √S · Vᵀ · L⁻¹ [r, in]     B_c = U · √S [out, r]

so that ‖(E - B_c · A_c) · L‖² is the sum of the other S², the least that any rank r leaves. What
the product leaves of W is rounded anew along x (`falqon_fx.site.rounding`), and the product found
once more, for E = W - Ŵ: since rounding may err along the product, both together err less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from falqon_fx.site.svd import low_rank_rows

DAMPING = 0.1


@dataclass(frozen=True)
class ErrorFactors:
    """A_c [r, in] and B_c [out, r], float32; ``left`` is ‖(E - B_c · A_c) · L‖ / ``size``, and
    ``shares`` [r] what each rank takes off its square, the largest first. ``size`` is ‖E · L‖, or
    that of another error, with which this one is compared.
    """

    a: Tensor
    b: Tensor
    left: float
    shares: Tensor
    size: float

    def first(self, rank: int) -> ErrorFactors:
        """The factors of a lower rank."""
        left = (self.left**2 + float(self.shares[rank:].sum())) ** 0.5
        return ErrorFactors(self.a[:rank], self.b[:, :rank], left, self.shares[:rank], self.size)


def error_factors(
    error: Tensor, root: Tensor, rank: int, seed: int = 0, size: float | None = None
) -> ErrorFactors:
    """The factors of E [out, in] for L = ``root`` [in, in], see `damped_root`.

    The singular triples are those of `low_rank_rows`: exact for small matrices, else of a
    randomized iteration with ``seed``, from a private generator.
    """
    weighted = error.to(torch.float32) @ root
    rows = low_rank_rows(weighted, rank, seed)  # √S · Vᵀ
    sizes = rows.square().sum(1)  # S
    # The best B for these rows; where the error has a lower rank, they are zero.
    inverse = torch.where(sizes > 0, sizes.reciprocal(), 0.0)
    b = (weighted @ rows.t()) * inverse
    a = torch.linalg.solve_triangular(root.t(), rows.t(), upper=True).t()
    size = float(weighted.norm()) if size is None else size
    if not size > 0:
        return ErrorFactors(a, b, 0.0, torch.zeros_like(sizes), size)
    shares = b.square().sum(0) * sizes / size**2
    return ErrorFactors(a, b, float((weighted - b @ rows).norm() / size), shares, size)


def damped_root(moment: Tensor) -> Tensor:
    """L, float32: the lower Cholesky factor of C + δ · I, by way of float64."""
    wide = moment.to(torch.float64, copy=True)
    diagonal = wide.diagonal()
    diagonal += DAMPING * diagonal.mean()
    root: Tensor = torch.linalg.cholesky(wide, out=wide)
    return root.to(torch.float32)


def heaviest_channels(squares: Tensor, weight: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` channels c of x with the largest E[x_c²] · |W_c|², int32, the largest first,
    and what share of all channels' sum each has; for ``squares`` E[x_c²] [in].

    A token's cast error of x_c is a share of x_c, and reaches the output through column W_c of
    W [out, in]. Without ``weight``, those with the largest E[x_c²]: in INT8 it is these that the
    scale of all channels goes by, for each layer that reads x alike.
    """
    size = squares.double()
    if weight is not None:
        size = size * weight.to(torch.float32).square().sum(0).double()
    found, whole = size.topk(count), size.sum()
    shares = found.values / torch.where(whole > 0, whole, 1.0)  # a weight of zeros has none
    return found.indices.to(torch.int32), shares.float()
