"""One site of update="rows" without a model around it: random parameters, the state made from them,
and its operands in float64.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from falqon_fx import FalqonConfig, MergedAdapter
from falqon_fx._compat import scaled_mm
from falqon_fx.rows.state import STATE, create
from falqon_fx.site.numerics import amax_to_scale, round_to_fp8
from falqon_fx.site.spec import SiteSpec


@dataclass
class Site:
    """The parameters of a site and the state made from them; ``base`` None once it is freed."""

    base: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    state: MergedAdapter

    def step(self, seed: int = 0, size: float = 0.02) -> None:
        """Move B as an optimizer would."""
        with torch.no_grad():
            self.lora_b.add_(randn(*self.lora_b.shape, seed=seed) * size)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def takes_row_scales() -> bool:
    """Whether ``torch._scaled_mm`` takes one scale per row on CPU; torch 2.11's takes none."""
    q, scale = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        scaled_mm(q, q.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


needs_row_scales = pytest.mark.skipif(
    not takes_row_scales(), reason="torch's _scaled_mm takes no row scales on CPU"
)


def make_site(
    out: int = 24,
    features: int = 40,
    rank: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    b_size: float = 0.1,
    scaling: float = 2.0,
    seed: int = 0,
    **options: Any,
) -> Site:
    """A site with random W (rows of different size), A and B; ``b_size=0`` gives a new adapter.

    ``freed`` and the options are those of `site_of`.
    """
    base = randn(out, features, seed=seed) * randn(out, 1, seed=seed + 1).exp2()
    lora_a = randn(rank, features, seed=seed + 2) / 4
    lora_b = randn(out, rank, seed=seed + 3) * b_size
    return site_of(base.to(dtype), lora_a, lora_b, scaling, **options)


def site_of(
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 2.0,
    *,
    freed: bool = False,
    **options: Any,
) -> Site:
    """A site of these parameters; ``freed`` as behind `falqon_fx.prepare`, without
    its base weight.
    """
    config = FalqonConfig(**{"update": "rows", "init": "keep", "topk": "all", **options})
    state = create("site", base, lora_a, lora_b, scaling, config, frees_base=freed)
    return Site(None if freed else base, lora_a, lora_b, state)


def update(*sites: Site) -> None:
    """One `falqon::proxy_update_` for all sites."""
    states = [site.state for site in sites]
    torch.ops.falqon.proxy_update_(
        *([state.tensors[i] for state in states] for i in range(5)),
        [site.lora_b for site in sites],
        [site.lora_a for site in sites],
        [site.base for site in sites],
        [state.scaling for state in states],
        str(states[0].spec),
    )


def twins(sites: list[Site]) -> list[Site]:
    """The same sites again, in memory of their own."""
    others = []
    for site in sites:
        state = copy.copy(site.state)
        for part in STATE:
            setattr(state, part, getattr(state, part).clone())
        base = None if site.base is None else site.base.clone()
        others.append(Site(base, site.lora_a.clone(), site.lora_b.clone(), state))
    return others


def dyadic(rows: int, columns: int, seed: int, bits: int = 4, low: int = -3) -> Tensor:
    """Small integers times a power of two."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**bits), 2**bits + 1, (rows, columns), generator=generator) * 2.0**low


def step_alike(sites: list[Site], others: list[Site], seed: int, moves: Callable[[], bool]) -> None:
    """Move B of those for which ``moves()``, in both lists alike, and so that sums stay exact."""
    for site, other in zip(sites, others, strict=True):
        if moves():
            out, rank = site.lora_b.shape
            site.lora_b.add_(dyadic(out, rank, seed, bits=8, low=-8))
            other.lora_b.copy_(site.lora_b)


def snapshot(state: MergedAdapter) -> list[Tensor]:
    """Copies of what an update may write: bytes, scale, applied, counters, writes."""
    return [t.clone() for t in (state.code, *state.tensors[1:])]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def dequantized(state: MergedAdapter) -> Tensor:
    """W' = code · scale, exact in float64."""
    return state.weight.float().double() * state.scale.double()


def cast(x: Tensor, dtype: torch.dtype, spec: SiteSpec) -> Tensor:
    """Float32 x [n, k] after the library's FP8 cast, dequantized exactly in float64."""
    scale = cast_scale(x, dtype, spec)
    return round_to_fp8(x * scale.reciprocal(), dtype).double() * scale.double()


def cast_scale(x: Tensor, dtype: torch.dtype, spec: SiteSpec) -> Tensor:
    if spec.per_row:
        return amax_to_scale(x.abs().amax(1, keepdim=True), dtype, spec.scale)
    amax = x.abs().amax() if x.numel() else torch.zeros(())
    return amax_to_scale(amax, dtype, spec.scale)
