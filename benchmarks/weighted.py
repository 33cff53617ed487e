"""What layers read, and ways to round W and to find a calibration's terms by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from forms import by_row
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from falqon_fx import FalqonConfig
from falqon_fx.site.compensate import damped_root, error_factors, heaviest_channels
from falqon_fx.site.numerics import E4M3, amax_to_scale, round_to_fp8
from falqon_fx.site.rounding import round_along
from falqon_fx.site.spec import SiteSpec

RANKS = CHANNELS = 16
BLOCK = 128  # columns that GPTQ corrects at a time
SPEC = SiteSpec.from_config(FalqonConfig())

# ---------------------------------------------------------------- what layers read


@dataclass
class Seen:
    """Sums over the tokens of a sample, of one layer."""

    inputs: Tensor  # Σ x · xᵀ
    units: Tensor  # Σ x · xᵀ / |x|²
    weighted: Tensor  # Σ |g|² · x · xᵀ, for the gradient g of a token's output
    outputs: Tensor  # Σ g · gᵀ
    tokens: int = 0
    weights: float = 0.0


Kept = list[tuple[str, Tensor, Tensor]]  # a layer, what it read, and its output


def keep_outputs(layers: Mapping[str, nn.Module], kept: Kept) -> list[RemovableHandle]:
    """Hooks that put into ``kept`` what each call reads, and an output that has a gradient."""

    def hook(name: str) -> Any:
        def keep(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            result = out if out.requires_grad else out.detach().requires_grad_().clone()
            kept.append((name, given[0].detach(), result))
            return result

        return keep

    return [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]


@torch.enable_grad()
def read(model: nn.Module, sites: dict[str, nn.Linear], batches: Sequence[Any]) -> dict[str, Seen]:
    """One pass forward and backward, with labels drawn from what the model says."""
    seen: dict[str, Seen] = {}
    for site, layer in sites.items():
        out, features = layer.weight.shape
        of_site = [torch.zeros(n, n) for n in (features, features, features, out)]
        seen[site] = Seen(of_site[0], of_site[1], of_site[2], of_site[3])
    kept: Kept = []
    hooks = keep_outputs(sites, kept)
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        kept.clear()
        logits = model(**batch).logits.flatten(0, 1).log_softmax(-1)
        drawn = torch.multinomial(logits.detach().exp(), 1, generator=generator)
        loss = -logits.gather(1, drawn).sum()
        grads = torch.autograd.grad(loss, [out for *_, out in kept])
        for (site, x, _), grad in zip(kept, grads, strict=True):
            sums, x, g = seen[site], x.flatten(0, -2), grad.flatten(0, -2)
            size = g.square().sum(1)
            sums.inputs.addmm_(x.t(), x)
            unit = nn.functional.normalize(x, dim=1)
            sums.units.addmm_(unit.t(), unit)
            sums.weighted.addmm_((x * size[:, None]).t(), x)
            sums.outputs.addmm_(g.t(), g)
            sums.tokens += len(x)
            sums.weights += float(size.sum())
    for of_layer in hooks:
        of_layer.remove()
    return seen


# ---------------------------------------------------------------- roundings


Rounding = Callable[[Tensor, Seen], Tensor]
Factors = Callable[[Tensor, Seen], tuple[Tensor, Tensor]]  # of an error: A_c, B_c
Weighting = Callable[[Seen], Tensor]
Outputs = Literal["all", "sizes"]


def of_inputs(seen: Seen) -> Tensor:
    """Every token counts as it is: what this library does."""
    return seen.inputs / seen.tokens


def of_units(seen: Seen) -> Tensor:
    """Every token counts the same, however large it is."""
    return seen.units / seen.tokens


def of_gradients(seen: Seen) -> Tensor:
    """A token counts by the square of the gradient of its output."""
    return seen.weighted / seen.weights


def nearest(weight: Tensor, seen: Seen) -> Tensor:
    return by_row(weight)


def searched(weight: Tensor, seen: Seen) -> Tensor:
    """The float32 scale of each row, of 16 between half and all of the power of two, that leaves
    least of the error weighted by E[x_c²]. Another power of two would change nothing of a floating
    format but its ends.
    """
    amax = weight.abs().amax(1, keepdim=True)
    most = amax_to_scale(amax, E4M3, "pow2")
    size = of_units(seen).diagonal()
    best, least = torch.empty_like(weight), torch.full((len(weight),), math.inf)
    for step in range(16):
        scale = most * 2 ** (-step / 16)
        cast = round_to_fp8(weight / scale, E4M3) * scale  # saturates
        error = ((cast - weight).square() * size).sum(1)
        better = error < least
        best[better], least[better] = cast[better], error[better]
    return best


def gptq(weighting: Weighting, damping: float = 0.1) -> Rounding:
    """GPTQ (arXiv 2210.17323), columns in the order of E[x_c²], the largest first: what rounding
    one of them costs the outputs is taken over by those that are still to come.
    """

    def rounded(weight: Tensor, seen: Seen) -> Tensor:
        moment = weighting(seen).double()
        order = moment.diagonal().argsort(descending=True)
        moment = moment[order][:, order]
        moment.diagonal().add_(damping * float(moment.diagonal().mean()))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        factor = torch.linalg.cholesky(inverse, upper=True).float()
        scale = amax_to_scale(weight.abs().amax(1, keepdim=True), E4M3, "pow2").t()
        rest, cast = weight[:, order].t().contiguous(), torch.empty(weight.shape[::-1])
        for first in range(0, len(rest), BLOCK):
            block = slice(first, min(first + BLOCK, len(rest)))
            own, of_block = rest[block], factor[block, block]
            errors = torch.empty_like(own)
            for i, column in enumerate(own):
                cast[first + i] = (round_to_fp8(column[None] / scale, E4M3) * scale)[0]
                errors[i] = (column - cast[first + i]) / of_block[i, i]
                own[i + 1 :].addr_(of_block[i, i + 1 :], errors[i], alpha=-1)
            rest[block.stop :].addmm_(factor[block, block.stop :].t(), errors, alpha=-1)
        back = torch.empty_like(weight)
        back[:, order] = cast.t()
        return back

    return rounded


# ---------------------------------------------------------------- corrections


def root_of_outputs(seen: Seen, kind: Outputs) -> Tensor:
    """L with L · Lᵀ = E[g · gᵀ], damped as that of inputs, or its diagonal alone."""
    moment = seen.outputs / seen.tokens
    return damped_root(moment if kind == "all" else moment.diagonal().diag())


def low_rank(weighting: Weighting, outputs: Outputs | None = None, ranks: int = RANKS) -> Factors:
    """As this library has it with `of_inputs`; with ``outputs`` E is weighted from the left too, by
    what its rows cost.
    """

    def factors(error: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        root = damped_root(weighting(seen))
        if outputs is None:
            found = error_factors(error, root, ranks)
            return found.a, found.b
        left = root_of_outputs(seen, outputs)
        found = error_factors(left.t() @ error, root, ranks)
        return found.a, torch.linalg.solve_triangular(left.t(), found.b, upper=True)

    return factors


def along(weighting: Weighting, ranks: int = RANKS) -> Rounding:
    """What `falqon_fx.prepare` makes of W with a calibration: what a product of low rank leaves of
    it is rounded along x, and the product found anew for the error of that; both together.
    """

    def made(weight: Tensor, seen: Seen) -> Tensor:
        moment = weighting(seen)
        order = moment.diagonal().argsort()
        root, wide = damped_root(moment[order][:, order]), weight[:, order]
        found = error_factors(wide - by_row(wide), root, ranks)
        cast = round_along(wide - found.b @ found.a, root, SPEC).dequantize()
        found = error_factors(wide - cast, root, ranks)
        back = torch.empty_like(weight)
        back[:, order] = cast + found.b.bfloat16().float() @ by_row(found.a.bfloat16().float())
        return back

    return made


def heaviest(
    weighting: Weighting, outputs: Outputs | None = None, count: int = CHANNELS
) -> Rounding:
    """The channels with the largest E[x_c²] · |W_c|², or E[x_c²] · W_cᵀ · E[g · gᵀ] · W_c."""

    def channels(weight: Tensor, seen: Seen) -> Tensor:
        left = root_of_outputs(seen, outputs).t() @ weight if outputs else weight
        return heaviest_channels(weighting(seen).diagonal(), left, count)[0].long()

    return channels
