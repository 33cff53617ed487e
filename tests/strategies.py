"""Hypothesis strategies that several test files share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.sites import Site, dyadic, randn, site_of

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
RANKS = st.sampled_from([1, 2, 3, 4, 7, 8, 16, 17, 64])
SEEDS = st.integers(0, 2**32 - 1)


@dataclass
class Case:
    """A site, an input of any strides, a bias and a gradient."""

    site: Site
    x: Tensor
    bias: Tensor | None
    out_dtype: torch.dtype
    grad: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sizes stay where float16 doesn't overflow: |W| up to 16, |x| up to 32, K up to 70."""
    out, features, rank = draw(st.integers(1, 40)), draw(st.integers(1, 70)), draw(RANKS)
    seed = draw(SEEDS)
    base = randn(out, features, seed=seed) * 2.0 ** draw(st.integers(-6, 1))
    lora_a = randn(rank, features, seed=seed + 1) * 2.0 ** draw(st.integers(-6, 0))
    lora_b = randn(out, rank, seed=seed + 2) * draw(st.sampled_from([0.0, 2.0**-8, 0.25]))
    if draw(st.booleans()):
        base[draw(st.integers(0, out - 1))] = 0
        lora_a[draw(st.integers(0, rank - 1))] = 0
    site = site_of(
        base.to(draw(FLOATS)),
        lora_a.to(draw(FLOATS)),
        lora_b.to(draw(FLOATS)),
        scaling=draw(st.sampled_from([1.0, 0.3, 2.0, -1.5])),
        granularity=draw(st.sampled_from(["tensor", "row"])),
        scale=draw(st.sampled_from(["amax", "pow2"])),
        pending=draw(st.sampled_from(["hold", "drop", "apply"])),
        grad_dtype=draw(st.sampled_from(["e5m2", "e4m3"])),
    )
    site.step(seed=seed + 3, size=draw(st.sampled_from([0.0, 2.0**-8, 0.1])))  # now pending
    x = draw(inputs(features, seed + 4))
    out_dtype = draw(FLOATS)
    bias = randn(out, seed=seed + 5).to(draw(FLOATS)) if draw(st.booleans()) else None
    grad = randn(*x.shape[:-1], out, seed=seed + 6) * 2.0 ** draw(st.integers(-12, 1))
    return Case(site, x, bias, out_dtype, grad.to(out_dtype))


@st.composite
def siblings(draw: st.DrawFn) -> list[Case]:
    """Two to four sites that read the same x, with their own shapes, ranks and scalings."""
    first = draw(cases())
    plan, features = first.site.state.plan, first.x.shape[-1]
    found = [first]
    for i in range(draw(st.integers(1, 3))):
        out, rank, seed = draw(st.integers(1, 40)), draw(RANKS), draw(SEEDS)
        site = site_of(
            (randn(out, features, seed=seed) * 2.0 ** draw(st.integers(-6, 1))).to(draw(FLOATS)),
            randn(rank, features, seed=seed + 1) * 2.0 ** draw(st.integers(-6, 0)),
            randn(out, rank, seed=seed + 2) * draw(st.sampled_from([0.0, 2.0**-8, 0.25])),
            scaling=draw(st.sampled_from([1.0, 0.3, 2.0, -1.5])),
            granularity=plan.granularity,
            scale=plan.scale,
            pending=plan.pending,
            grad_dtype=plan.grad,
        )
        site.step(seed=seed + 3, size=draw(st.sampled_from([0.0, 2.0**-8, 0.1])))
        bias = None if first.bias is None else randn(out, seed=seed + 5).to(draw(FLOATS))
        grad = randn(*first.x.shape[:-1], out, seed=seed + 6 + i) * 2.0 ** draw(st.integers(-12, 1))
        found.append(Case(site, first.x, bias, first.out_dtype, grad.to(first.out_dtype)))
    return found


@st.composite
def inputs(draw: st.DrawFn, features: int, seed: int) -> Tensor:
    """x [..., features] with zero to eight tokens, contiguous or a view with other strides."""
    dtype, size = draw(FLOATS), 2.0 ** draw(st.integers(-6, 2))
    leading = draw(st.sampled_from([(0,), (1,), (5,), (2, 3), (2, 0), (2, 2, 2), ()]))
    layout = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded"]))
    shape = {
        "transposed": (features, *leading),
        "sliced": (*leading, 2 * features + 1),
        "expanded": (features,),
        "plain": (*leading, features),
    }[layout]
    memory = (randn(*shape, seed=seed) * size).to(dtype)
    if layout == "transposed":
        return memory.movedim(0, -1)
    if layout == "sliced":
        return memory[..., 1::2]
    return memory.expand(*leading, features)


@st.composite
def exact_sites(draw: st.DrawFn) -> list[Site]:
    """One to three sites of different shapes whose sums are exact: 21 bits in all."""
    options: dict[str, Any] = {
        "granularity": draw(st.sampled_from(["tensor", "row"])),
        "scale": "pow2",
        "rounding": draw(st.sampled_from(["nearest", "stochastic"])),
        "pending": draw(st.sampled_from(["hold", "apply", "drop"])),
        "topk": draw(st.sampled_from([1, 3, 0.2, "all"])),
        "seed": draw(st.sampled_from([0, 1, 2**33 + 5])),
    }
    dtype, ab_dtype = draw(FLOATS), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    made = []
    for i in range(draw(st.integers(1, 2))):
        out, rank = draw(st.sampled_from([3, 17, 70])), draw(st.sampled_from([1, 5, 8, 16]))
        width, seed = draw(st.sampled_from([1, 7, 8, 33, 64])), draw(st.integers(0, 2**32 - 9))
        base, lora_a = dyadic(out, width, seed), dyadic(rank, width, seed + 1)
        lora_b = dyadic(out, rank, seed + 2, bits=6, low=-6)
        made.append(
            site_of(base.to(dtype), lora_a.to(ab_dtype), lora_b.to(ab_dtype), 2.0**i, **options)
        )
    return made
