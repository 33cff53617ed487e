"""The ops of one layer, with their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from falqon_fx.site.base import Base, cast_base, digest
from falqon_fx.site.spec import SiteSpec
from tests.sites import Site, randn
from tests.strategies import Case, Layer, Lora

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
falqon = torch.ops.falqon
ROW = SiteSpec("row", "pow2", "e5m2")


def layer(
    out: int = 24,
    features: int = 40,
    ranks: tuple[int, ...] = (4,),
    *,
    leading: tuple[int, ...] = (3,),
    dtype: torch.dtype = F32,
    spec: SiteSpec = ROW,
    bias: bool = False,
    seed: int = 0,
) -> Layer:
    """A layer with an adapter of each of ``ranks``."""
    weight = (randn(out, features, seed=seed) / 4).to(dtype)
    loras = [
        Lora(randn(r, features, seed=seed + 1 + j) / 4, randn(out, r, seed=seed + 5 + j) / 4, 2.0)
        for j, r in enumerate(ranks)
    ]
    b = randn(out, seed=seed + 9).to(dtype) if bias else None
    grad = randn(*leading, out, seed=seed + 10).to(dtype)
    return Layer(weight, cast_base(weight, spec), b, loras, grad)


def case(x: Tensor, *layers: Layer, out_dtype: torch.dtype | None = None, **given: Any) -> Case:
    spec = given.pop("spec", ROW)
    return Case(x, list(layers), out_dtype or x.dtype, spec, **given)


def base_args(base: Base, x: Tensor, bias: Tensor | None, spec: SiteSpec = ROW) -> tuple[Any, ...]:
    code, scale = base.code, base.scale
    return (x, code, scale.view(torch.int32), digest(code, scale), bias, str(spec))


def rows_args(site: Site, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    state = site.state
    return (x, state.code, *state.tensors[1:], bias, state.scaling, str(state.spec))
