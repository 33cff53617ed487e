"""init="svd": lora_A as the top right singular vectors of W's cast error (FALQON, 2510.24061)."""

from __future__ import annotations

import torch
from torch import Tensor

from falqon_fx.config import FalqonConfig
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import amax_to_scale, round_to_fp8
from falqon_fx.site.spec import RowsSpec, SiteSpec

_NARROWEST = 16  # columns of a block: fewer make its products no cheaper
_STEPS = 8


def init_lora_a_(base: Tensor, lora_a: Tensor, spec: SiteSpec, seed: int) -> None:
    """Overwrite A [r, in] with Â for the base weight W [out, in], rounded as it will be."""
    rows = low_rank_rows(_cast_error(base, spec), lora_a.shape[0], seed)
    a_amax = rows.abs().amax(1, keepdim=True) if spec.per_row else rows.abs().amax()
    if isinstance(spec, RowsSpec) and not spec.per_row:  # one scale for W' = [W; A]
        a_amax = torch.maximum(a_amax, base.abs().amax().to(torch.float32))
    a_scale = amax_to_scale(a_amax, spec.operand, spec.scale)
    lora_a.copy_(round_to_fp8(rows * a_scale.reciprocal(), spec.operand) * a_scale)


@torch.inference_mode(False)
@torch.no_grad()
def init_where_new(weight: Tensor, lora_a: Tensor, lora_b: Tensor, config: FalqonConfig) -> None:
    """`init_lora_a_` for an adapter that has not been trained yet: B is zero."""
    if not lora_b.any():
        with torch.autocast(weight.device.type, enabled=False):
            init_lora_a_(weight, lora_a, SiteSpec.from_config(config), config.seed)


def _cast_error(base: Tensor, spec: SiteSpec) -> Tensor:
    """base - dq(q(base)), float32 [out, in]."""
    value = cast_base(base, spec).dequantize()
    return torch.sub(base, value, out=value)


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
    size = (error.shape[0], width)
    block = torch.randn(size, generator=generator, dtype=torch.float32, device=error.device)
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
