"""Top right singular vectors of the FP8 error, for init="svd" (paper section 1)."""

from __future__ import annotations

import torch
from torch import Tensor

_NARROWEST = 16  # columns of a block: fewer make its products no cheaper
_STEPS = 8


def low_rank_rows(error: Tensor, rank: int, seed: int) -> Tensor:
    """Â = √S · Vᵀ of the best rank-``rank`` approximation of ``error`` [out, in], [rank, in].

    Randomized block Krylov iteration (Musco and Musco, 2015), from a private generator: the user's
    RNG is left alone. It picks the best directions in the span of the blocks of all its steps. The
    error of a weight is nearly white noise, whose flat spectrum power iteration, which keeps the
    last block alone, resolves slowly. Blocks of half the rank in eight steps take 0.97 of the best
    rank's energy at 4096 x 11008 and rank 64; blocks of the whole rank take as many products to
    0.94 (`benchmarks/svd_init.py`).
    """
    width = max(rank // 2, _NARROWEST)
    if width * (_STEPS + 1) < min(error.shape):
        columns = _krylov(error, width, seed)
    else:  # small enough for all of it
        columns = error.t()
    vectors, sigma, _ = torch.linalg.svd(columns, full_matrices=False)
    rows = sigma[:rank, None].sqrt() * vectors[:, :rank].t()
    # A rank above min(out, in) leaves rows of zeros: there is no more error to describe.
    return torch.nn.functional.pad(rows, (0, 0, 0, rank - rows.shape[0]))


def _krylov(error: Tensor, width: int, seed: int) -> Tensor:
    """errorᵀ · Q [in, k], where Q [out, k] spans the blocks (error · errorᵀ)^i · noise."""
    generator = torch.Generator(device=error.device).manual_seed(seed)
    block = torch.randn(error.shape[0], width, generator=generator, device=error.device)
    basis = block[:, :0]
    products: list[Tensor] = []
    for _ in range(_STEPS + 1):
        if products:
            block = error @ products[-1]
        # All of it anew, though only the block is: Householder's Q is orthonormal even where the
        # error has a rank so low that nothing but rounding is left of a block beside the others.
        basis = torch.linalg.qr(torch.cat([basis, block], dim=1)).Q
        products.append(error.t() @ basis[:, -width:])
    return torch.cat(products, dim=1)
