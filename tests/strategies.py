"""Hypothesis strategies that several test files share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from falqon_fx.config import BaseDtype
from falqon_fx.kernels.fixed import NONE_FIXED, Fixed
from falqon_fx.ops.arguments import Merged
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.site.base import Base, cast_base
from falqon_fx.site.spec import SiteSpec
from tests.sites import Site, dyadic, randn, site_of

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
RANKS = st.sampled_from([1, 2, 3, 4, 7, 8, 16, 17, 64])
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def base_weights(
    draw: st.DrawFn,
    rows: tuple[int, int] = (1, 20),
    columns: tuple[int, int] = (1, 70),
    least: float = 2.0**-140,
) -> Tensor:
    """W [out, in] of so many ``rows`` and ``columns`` at least and at most, float32 or bfloat16:
    rows and columns alike or not, rows of zeros, and numbers up to the largest that is cast, 2**16,
    or all subnormal in float32 unless ``least`` is more.
    """
    out, features, seed = draw(st.integers(*rows)), draw(st.integers(*columns)), draw(SEEDS)
    spread = draw(st.sampled_from([0, 2, 6]))
    weight = randn(out, features, seed=seed) * (randn(out, 1, seed=seed + 1) * spread).exp2()
    weight = weight * (randn(1, features, seed=seed + 2) * spread).exp2()
    largest = draw(st.sampled_from([2.0**-140, 2.0**-100, 0.02, 1.0, 65000.0]))
    weight = weight * (max(largest, least) / weight.abs().amax())
    if draw(st.booleans()):
        weight[draw(st.integers(0, out - 1))] = 0
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@dataclass
class Lora:
    """One adapter; ``x``: what it reads where that is not what the layer reads (dropout).
    ``fixed``: what a calibration has made for it, and the ``channels`` of its columns.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    x: Tensor | None = None
    fixed: Fixed = NONE_FIXED
    channels: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rows of A and of A_c, and with these or columns of W up to a multiple of 16."""
        rank = len(self.lora_a) + sum(map(len, self.fixed.error_a))
        return -(-rank // 16) * 16 if any(self.fixed) else rank


@dataclass
class Layer:
    """A linear layer W ≈ base with its adapters, and a gradient of its output; with ``reached`` off
    no gradient comes.
    """

    weight: Tensor
    base: Base
    bias: Tensor | None
    adapters: list[Lora]
    grad: Tensor
    reached: bool = True


@dataclass
class Case:
    """Layers that share x and are one ``falqon::merged_linear``.

    ``adds_b``: whether the adapters are added to the outputs; not with "hold" of update="rows".
    """

    x: Tensor
    layers: list[Layer]
    out_dtype: torch.dtype
    spec: SiteSpec
    keep_x: bool = True
    adds_b: bool = True
    clamped: list[Tensor] = field(default_factory=list)
    turned: list[Tensor] = field(default_factory=list)
    joined: list[Tensor] = field(default_factory=list)

    @property
    def adapters(self) -> list[Lora]:
        return [lora for layer in self.layers for lora in layer.adapters]

    @property
    def owner(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) for _ in layer.adapters]

    @property
    def apart(self) -> bool:
        """Whether an adapter reads something else than x."""
        return any(lora.x is not None for lora in self.adapters)

    @functools.cached_property
    def casts(self) -> list[list[Tensor]]:
        """[Â, its scale, b] of each adapter, by ``falqon::proxy_update``, and α for b in FP8."""
        loras, wide = self.adapters, gemm_dtype(self.out_dtype, self.x.device) == torch.float32
        if not loras:
            return []
        scales = [layer.base.scale for layer in self.layers for _ in layer.adapters]
        in_fp8 = self.spec.adapter == "fp8"
        return [
            torch.ops.falqon.proxy_update(
                [lora.lora_a],
                [lora.lora_b],
                [lora.scaling],
                [scale] if in_fp8 else [],
                *lora.fixed,
                wide,
                str(self.spec),
            )
            for lora, scale in zip(loras, scales, strict=True)
        ]

    def arguments(self) -> Merged:
        """Those of the op. W as bytes and Â as E4M3: both take either."""
        loras = self.adapters
        return Merged(
            self.x,
            [layer.base.code for layer in self.layers],
            [layer.base.scale for layer in self.layers],
            [layer.bias for layer in self.layers if layer.bias is not None],
            [cast[0] for cast in self.casts],
            [cast[1] for cast in self.casts],
            [cast[2] for cast in self.casts] if self.adds_b else [],
            [cast[3] for cast in self.casts if len(cast) > 3],
            self.clamped,
            [lora.lora_a for lora in loras],
            [lora.lora_b for lora in loras],
            [self.x if lora.x is None else lora.x for lora in loras] if self.apart else [],
            self.owner,
            [lora.scaling for lora in loras],
            self.keep_x,
            self.turned,
            self.joined,
            [lora.channels for lora in loras if lora.channels is not None],
            self.out_dtype,
            str(self.spec),
        )

    def leaves(self) -> dict[str, Tensor]:
        """What has gradients, by name, each asking for them."""
        found = {"x": self.x}
        for i, layer in enumerate(self.layers):
            if layer.bias is not None:
                found[f"bias {i}"] = layer.bias
        for j, lora in enumerate(self.adapters):
            if self.keep_x:
                found[f"a {j}"] = lora.lora_a
            found[f"b {j}"] = lora.lora_b
            if lora.x is not None:
                found[f"x {j}"] = lora.x
        for tensor in found.values():
            tensor.requires_grad_()
        return found


@st.composite
def cases(draw: st.DrawFn, bases: Sequence[BaseDtype] = ("fp8",), corrected: bool = True) -> Case:
    """One to three layers with none to three adapters each, of all dtypes, shapes and strides, on
    one of ``bases``; ``corrected`` perhaps with what a calibration makes.

    Sizes stay where float16 doesn't overflow: |W| up to 16, |x| up to 32, K up to 70.
    """
    features, seed = draw(st.integers(1, 70)), draw(SEEDS)
    spec = SiteSpec(
        draw(st.sampled_from(["tensor", "row"])),
        draw(st.sampled_from(["amax", "pow2"])),
        draw(st.sampled_from(["e5m2", "e4m3"])),
        base=draw(st.sampled_from(bases)),
    )
    x, out_dtype, biased = draw(inputs(features, seed)), draw(FLOATS), draw(st.booleans())
    drops, adds_b = draw(st.booleans()), draw(st.sampled_from([True, True, False]))
    layers = []
    for i in range(draw(st.integers(1, 3))):
        at, out = seed + 100 * (i + 1), draw(st.integers(1, 40))
        weight = randn(out, features, seed=at) * 2.0 ** draw(st.integers(-6, 1))
        if draw(st.booleans()):
            weight[draw(st.integers(0, out - 1))] = 0
        weight = weight.to(draw(FLOATS))
        bias = randn(out, seed=at + 1).to(draw(FLOATS)) if biased else None
        grad = randn(*x.shape[:-1], out, seed=at + 2) * 2.0 ** draw(st.integers(-12, 1))
        fixed = corrected and adds_b
        loras = [
            draw(adapters(out, x, at + 10 * (j + 1), drops, fixed))
            for j in range(draw(st.integers(0, 3)))
        ]
        reached = draw(st.sampled_from([True, True, False]))
        base = cast_base(weight, spec)
        layers.append(Layer(weight, base, bias, loras, grad.to(out_dtype), reached))
    layers[-1].reached |= not any(layer.reached for layer in layers)
    return Case(x, layers, out_dtype, spec, draw(st.booleans()), adds_b)


@st.composite
def adapters(
    draw: st.DrawFn, out: int, x: Tensor, seed: int, drops: bool, corrects: bool = False
) -> Lora:
    """An adapter of a layer [out, in] that reads x, or with ``drops`` perhaps a dropped x; with
    ``corrects`` perhaps with what a calibration makes.
    """
    rank, features = draw(RANKS), x.shape[-1]
    lora_a = randn(rank, features, seed=seed) * 2.0 ** draw(st.integers(-6, 0))
    if draw(st.booleans()):
        lora_a[draw(st.integers(0, rank - 1))] = 0
    lora_b = randn(out, rank, seed=seed + 1) * draw(st.sampled_from([0.0, 2.0**-8, 0.25]))
    dropped = None
    if drops and draw(st.booleans()):
        dropped = x * ((randn(*x.shape, seed=seed + 2) > 0) * 2).to(x.dtype)
    scaling = draw(st.sampled_from([1.0, 0.3, 2.0, -1.5]))
    lora = Lora(lora_a.to(draw(FLOATS)), lora_b.to(draw(FLOATS)), scaling, dropped)
    if not corrects:
        return lora
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    error, count = draw(st.sampled_from([0, 0, 1, 4, 16])), draw(st.sampled_from([0, 0, 1, 5, 16]))
    count = min(count, features)
    of_error: list[list[Tensor]] = [[], []]
    if error and dropped is None:  # A_c reads x itself
        of_error[0].append((randn(error, features, seed=seed + 3) * 2.0**-4).to(dtype))
        of_error[1].append((randn(out, error, seed=seed + 4) * 2.0**-5).to(dtype))
    columns = [(randn(out, count, seed=seed + 5) * 0.25).to(dtype)] if count else []
    if count:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))  # siblings may agree
        order = torch.randperm(features, generator=generator)
        lora.channels = order[:count].sort().values.to(torch.int32)
    if of_error[0] or columns:
        lora.fixed = Fixed(of_error[0], of_error[1], columns)
    return lora


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
