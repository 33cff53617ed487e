"""The products of W in NVFP4 on the device, against float64 on what is really multiplied."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_check import BF16, Checked, check_grad_x, fp8, positive, run_all, with_adapter
from gpu_exact import product
from torch import Tensor

from falqon_fx.kernels.gemm.launch import Piece
from falqon_fx.kernels.products import dispatch
from falqon_fx.kernels.products.contest import Options
from falqon_fx.site import nvfp4
from falqon_fx.site.numerics import E4M3

# (tokens, out, in, rank): of sizes that kernels take, and of some that are decoded.
SHAPES = ((256, 512, 1024, 16), (100, 1040, 272, 64), (1, 256, 4096, 8))
TINY = ((17, 64, 64, 16),)


def packed(rows: int, columns: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """W of all codes and all block scales, and C · S in float64."""
    numbers = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=numbers)
    scales = torch.randint(0, 127, (rows, columns // 16), generator=numbers)
    weight = nvfp4.joined(codes.to(torch.uint8), scales.to(torch.uint8))
    values = nvfp4.decode(weight, 1.0, torch.float32)
    return weight.to(device), values.double().to(device)


def check_packed(device: str, options: Options | None = None) -> Iterator[Checked]:
    """O of two layers that share x, with adapters and biases and without; their dL/dx."""
    options = options or Options()
    for shape in SHAPES if device == "cuda" else TINY:
        yield from _check_forward(shape, device, options)
        yield from check_grad_x(shape, device, options, packed, " of NVFP4")


def _check_forward(
    shape: tuple[int, int, int, int], device: str, options: Options
) -> Iterator[Checked]:
    n, out, features, rank = shape
    q, q_scale = fp8(n, features, E4M3, device, 0), positive(n, device, 1)
    plain, adapted, alone, added = [], [], [], []
    for rows, seed in ((out, 2), (out // 2, 8)):
        weight, values = packed(rows, features, device, seed)
        scale = torch.tensor(0.013 * seed, device=device)
        plain.append(Piece(weight, scale))
        alone.append(product(q, values, q_scale.double() * scale.double()))
        piece, terms = with_adapter(plain[-1], n, rank, device, seed + 1)
        adapted.append(piece)
        added.append(alone[-1] + terms)
    for what, pieces, exact in (
        ("O of NVFP4", plain[:1], alone[:1]),
        ("O of NVFP4, siblings", plain, alone),
        ("O of NVFP4, adapter, bias", adapted[:1], added[:1]),
        ("O of NVFP4, siblings, adapters, bias", adapted, added),
    ):
        contest = dispatch.forward(q, q_scale, pieces, 0, BF16, BF16, options)
        yield from run_all(what, shape, contest, exact)
