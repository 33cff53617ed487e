"""W rounded so that the errors of its columns make up for each other along what x is made of.

With L · Lᵀ = C [in, in], lower triangular, the error E = W - Ŵ costs ‖E · L‖², of which column j is

    E_j · L_jj + Σ_{i > j} E_i · L_ij

So from the last column to the first, each is rounded to nearest from where it makes up for the
errors of those behind it:

    Ŵ_j = q(W_j + Σ_{i > j} E_i · L_ij / L_jj)

This is GPTQ (arXiv 2210.17323) in the form of Babai's nearest plane (2507.18553). With the channels
in the order of E[x_c²], the largest last, those of which an error costs most come first, and all
others are there to make up for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from falqon_fx.site.base import Base, cast_base
from falqon_fx.site.numerics import encode_fp8, round_to_fp8
from falqon_fx.site.spec import SiteSpec

BLOCK = 128  # columns whose errors are brought to those before them in one product


def round_along(weight: Tensor, root: Tensor, spec: SiteSpec) -> Base:
    """W [out, in] in FP8 or INT8 for L = ``root`` [in, in], float32, with the scales that
    `cast_base` gives it. NVFP4, whose scales are of 16 columns, to nearest.
    """
    nearest = cast_base(weight, spec)
    if spec.base == "nvfp4":
        return nearest
    wide = (weight.to(torch.float32) / nearest.scale).t().contiguous()  # [in, out], in steps
    rounded, error = torch.empty_like(wide), torch.empty_like(wide)
    for stop in range(len(wide), 0, -BLOCK):
        first = max(0, stop - BLOCK)
        carried = root[stop:, first:stop].t() @ error[stop:]
        for j in range(stop - 1, first - 1, -1):
            value = wide[j] + carried[j - first] / root[j, j]
            rounded[j] = round_to_fp8(value[None], spec.operand)[0]
            error[j] = wide[j] - rounded[j]
            carried[: j - first].addr_(root[j, first:j], error[j])
    return Base(encode_fp8(rounded.t().contiguous(), spec.operand), nearest.scale)
