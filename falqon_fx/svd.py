"""Top right singular vectors of the FP8 error, for init="svd" (paper section 1)."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING = 10
_POWER_ITERATIONS = 4


def low_rank_rows(error: Tensor, rank: int, seed: int) -> Tensor:
    """Â = √S · Vᵀ of the best rank-``rank`` approximation of ``error`` [out, in], [rank, in].

    Randomized range finder with power iterations (Halko, Martinsson, Tropp, 2011), from a private
    generator: the user's RNG is left alone.
    """
    generator = torch.Generator(device=error.device).manual_seed(seed)
    width = min(rank + _OVERSAMPLING, *error.shape)
    probe = torch.randn(error.shape[1], width, generator=generator, device=error.device)
    basis = torch.linalg.qr(error @ probe).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(error.t() @ basis).Q
        basis = torch.linalg.qr(error @ basis).Q
    _, sigma, right = torch.linalg.svd(basis.t() @ error, full_matrices=False)
    rows = sigma[:rank].sqrt()[:, None] * right[:rank]
    # A rank above min(out, in) leaves rows of zeros: there is no more error to describe.
    return torch.nn.functional.pad(rows, (0, 0, 0, rank - rows.shape[0]))
