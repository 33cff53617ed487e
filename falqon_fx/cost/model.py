"""The cost model: what a layer's step takes on a card before the rewrite and after, and from how
many tokens on the rewrite pays.

A kernel of `falqon_fx.cost.variants` takes launch + max(FLOPs / rate, bytes / bandwidth,
casts / rate) (the roofline), and on a CPU the page faults of new memory: of what a layer hands out
or keeps for backward, since all layers' lives at once and is freed at the end of a step, whereas
one layer's temporaries become the next one's. A variant takes the sum, as on one stream. All terms
are affine in n, so the break-even is found exactly, segment by segment.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from falqon_fx.config import FalqonConfig
from falqon_fx.cost import cards
from falqon_fx.cost.cards import Card
from falqon_fx.cost.stacks import STACKS, StackShape
from falqon_fx.cost.variants import VARIANTS, Kernel, Shape, Variant
from falqon_fx.errors import FalqonError
from falqon_fx.kernels.hardware import reads_columns
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.report.data import Cost, Rejected, Site
from falqon_fx.site.numerics import dtype_name


def flops(kernels: list[Kernel], phase: str | None = None) -> Any:
    """FLOPs of the matrix products of a phase ("forward", "backward", "update"), or of all."""
    return sum(k.flops + k.added for k in kernels if phase in (None, k.phase))


def moved(kernels: list[Kernel], phase: str | None = None) -> Any:
    """Bytes to and from memory of a phase, or of all."""
    return sum(k.bytes for k in kernels if phase in (None, k.phase))


def seconds(kernels: list[Kernel], card: Card, phase: str | None = None) -> Any:
    """Predicted time of a phase, or of all: a number, or a sympy expression in what is symbolic.

    Raises:
        FalqonError: the card has no matrix unit for a kernel's dtype.
    """
    return sum(_time(k, card) for k in kernels if phase in (None, k.phase))


def _time(kernel: Kernel, card: Card) -> Any:
    bounds = _bounds(kernel, card)
    symbolic = any(getattr(bound, "free_symbols", None) for bound in bounds)
    longest = _symbolic_max(bounds) if symbolic else max(map(float, bounds))
    faults = kernel.kept / card.fresh if card.fresh else 0
    return kernel.launches * card.launch + longest + faults


def _symbolic_max(bounds: list[Any]) -> Any:
    import sympy

    return sympy.Max(*bounds)


def _bounds(kernel: Kernel, card: Card) -> list[Any]:
    """What each resource of the card alone would take."""
    bounds = [kernel.bytes / card.bandwidth]
    if kernel.flops != 0:
        name = _unit(kernel.dtype, card)
        bounds = [kernel.bytes / card.thin.get(name, card.bandwidth)]
        multiplying = kernel.flops / card.flops[name]
        if kernel.added != 0:
            multiplying += kernel.added / card.flops[_unit(kernel.added_dtype, card)]
        bounds.append(multiplying)
    if kernel.casts != 0 and card.casts:
        bounds.append(kernel.casts / card.casts)
    return bounds


def _unit(dtype: str, card: Card) -> str:
    name = "bfloat16" if dtype == "float16" else dtype
    if name == "int8" and name not in card.flops:
        name = "float32"  # where a CPU without units for integers multiplies them, exactly
    if name not in card.flops:
        raise FalqonError(card.name, f"has no {name} matrix units", "Compare another variant")
    return name


def break_even(before: Variant, after: Variant, shape: Shape, card: Card) -> int | None:
    """The least number of tokens from which on ``after`` is never slower than ``before``.

    1 where it never is, None where it is slower in the end. Exact: the difference of the two times
    is piecewise affine in n, and its pieces end where two bounds of a kernel cross.
    """

    def gain(n: float) -> float:
        at = replace(shape, n=n)
        return float(seconds(before(at), card)) - float(seconds(after(at), card))

    points = sorted({1.0, *_crossings(before, shape, card), *_crossings(after, shape, card)})
    end = 2 * points[-1] + 1
    slope = (gain(2 * end) - gain(end)) / end
    if slope < 0 or (slope == 0 and gain(end) < 0):
        return None
    if gain(end) < 0:  # the last piece rises above zero later
        return _ceil(end - gain(end) / slope)
    upper = end
    for lower in reversed(points):
        low, high = gain(lower), gain(upper)
        if low < 0:
            return _ceil(lower + (upper - lower) * -low / (high - low))
        upper = lower
    return 1


def _crossings(variant: Variant, shape: Shape, card: Card) -> Iterator[float]:
    """The n > 1 at which one bound of a kernel overtakes another."""
    first, second = (variant(replace(shape, n=n)) for n in (1, 2))
    for one, two in zip(first, second, strict=True):
        lines = [(a, b - a) for a, b in zip(_bounds(one, card), _bounds(two, card), strict=True)]
        for (a, slope_a), (b, slope_b) in itertools.combinations(lines, 2):
            if slope_a != slope_b and (n := 1 + (a - b) / (slope_b - slope_a)) > 1:
                yield float(n)


def _ceil(value: float) -> int:
    # An exact crossing may come out a rounding error above an integer.
    return max(1, math.ceil(value - 1e-6))


def variants_of(shape: Shape) -> dict[str, Variant]:
    """The variants of a linear layer, or those of a stack of experts."""
    return STACKS if isinstance(shape, StackShape) else VARIANTS


WIDTHS = {"fp8": 1, "int8": 1, "nvfp4": 9 / 16}  # bytes a weight, by base_dtype


def shape_of(site: Site, card: Card, siblings: int = 1, adapted: int = 1) -> Shape:
    """The layer of a site at the tokens of its call; ``siblings`` sites share its op, ``adapted``
    of them have an adapter. Tokens of a stack of experts are the rows of its x.
    """
    out = getattr(torch, site.out_dtype)
    # A CPU may multiply in another dtype than the card that is asked about.
    own = site.device == "cpu" and not site.architecture and not card.gpu
    device = torch.device("cpu" if own else "meta")
    made, more = Shape, {}
    if site.experts:
        top = site.gathered / max(site.tokens_hint, 1) if site.gathered else 1
        made = StackShape
        more = {"experts": site.experts, "top": top, "gathered": site.gathered > 0}
        more["library"] = site.kernel == "scaled_grouped_mm"
        more["by_columns"] = reads_columns(site.architecture)
    return made(
        **more,
        n=site.tokens_hint,
        features=site.in_features,
        out=site.out_features,
        rank=site.rank,
        dtype=site.out_dtype,
        adapter_dtype=site.adapter_dtype or site.out_dtype,
        train_a=site.train_a,
        train_b=site.train_b,
        siblings=siblings,
        adapted=max(adapted, 1),
        wide=dtype_name(gemm_dtype(out, device)),
        compensate=site.compensate,
        outliers=site.outliers,
        width=WIDTHS[site.options["base_dtype"]],
        integers=site.options["base_dtype"] == "int8",
    )


def variant_of(site: Site, card: Card) -> str:
    """The variant that a site runs by its plan."""
    integers = site.options["base_dtype"] == "int8" and card.gpu
    return "emulated" if site.kernel == "aten" and not integers else "merged"


TOKENS = tuple(2**i for i in range(4, 18))  # where a report states the speed-up


def predict(shape: Shape, after: str, card: Card, tokens: int) -> Cost:
    """What the rewrite of a layer from "lora" to the variant ``after`` is predicted to bring at
    ``tokens`` tokens and as a function of them.
    """
    known = variants_of(shape)
    old, new = known["lora"], known[after]

    def both(n: int) -> tuple[float, float]:
        at = replace(shape, n=n)
        return float(seconds(old(at), card)), float(seconds(new(at), card))

    at = replace(shape, n=tokens)
    return Cost(
        card=card.name,
        variant=after,
        tokens=tokens,
        seconds_before=both(tokens)[0],
        seconds_after=both(tokens)[1],
        flops_before=int(flops(old(at))),
        flops_after=int(flops(new(at))),
        moved_before=int(moved(old(at))),
        moved_after=int(moved(new(at))),
        break_even=break_even(old, new, shape, card),
        speedup={n: before / after for n in TOKENS for before, after in [both(n)]},
    )


def losing(site: Site, config: FalqonConfig, device: torch.device) -> Rejected | None:
    """The refusal of a site whose predicted gain lies below ``config.min_gain``.

    Raises:
        FalqonError: ``min_gain`` is set and nothing is known of the card.
    """
    if config.min_gain is None:
        return None
    card = cards.find(config.card) if config.card else cards.at_hand(device)
    if card is None:
        raise FalqonError("min_gain", *cards.unknown(device))
    shape = shape_of(site, card)
    known = variants_of(shape)
    before, after = (known[name](shape) for name in ("lora", variant_of(site, card)))
    gain = float(seconds(before, card)) / float(seconds(after, card))
    if gain >= config.min_gain:
        return None
    return Rejected(
        site.path,
        f"merged it is predicted to run {gain:.2f} times as fast at {site.tokens_hint} tokens on "
        f"{card.name}, below min_gain={config.min_gain:g}",
        "Use more tokens a step, or a lower min_gain",
        site.source,
    )
